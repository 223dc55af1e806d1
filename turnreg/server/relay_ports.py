"""The relay address of one family: opens a port of the configured range for each allocation."""

import asyncio
import errno
import itertools
import logging
import secrets
import socket
from collections.abc import Callable, Iterator

from sniproxy.engine import Listener
from sniproxy.engine.listener import DEFAULT_BACKLOG
from turnreg.server.datagrams import DatagramSocket
from turnreg.server.ports import PortRange
from turnreg.stun.message import FAMILY_IPV4, FAMILY_IPV6

log = logging.getLogger(__name__)

MAX_PORT_TRIES = 1000
"""Busy ports that one Allocate tries at most (some 10 ms): the range is somebody else's then."""

RESERVED_S = 30.0
"""How long a reserved port waits for its Allocate (RFC 8656, section 7.2, wants at least that)."""
MAX_RESERVED = 256
"""Reserved ports at once, and no more than a fourth of the range; what is asked beyond is refused for want of capacity."""
TOKEN_BYTES = 8

_PORT_ERRNOS = frozenset({errno.EADDRINUSE, errno.EACCES})


class RelayPorts:
    """Ports for peers' connections and for datagrams, which have nothing to do with each other."""

    def __init__(
        self,
        address: str,
        first: int,
        last: int,
        *,
        shared: bool = False,
        randbelow: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        """Take an address and the first and last port. `shared`: active Connects leave from the ports that are listened on."""
        self.address = address
        self.family = FAMILY_IPV6 if ":" in address else FAMILY_IPV4
        self.streams = PortRange(first, last, randbelow)
        self.datagrams = PortRange(first, last, randbelow)
        self.shared = shared
        self._reserved: dict[bytes, DatagramSocket] = {}
        self._max_reserved = min(MAX_RESERVED, max(1, (last - first + 1) // 4))

    async def listen(self, now: float) -> Listener | None:
        """Listen on a random free port; None if there is none."""
        for port in itertools.islice(self.streams.candidates(now), MAX_PORT_TRIES):
            try:
                listener = await self._open_listener(port)
            except OSError as exc:
                if exc.errno in _PORT_ERRNOS:
                    continue
                self._tell(exc)  # no such address, out of descriptors: the next port would fail alike
                return None
            self.streams.take(port)
            return listener
        return None

    async def _open_listener(self, port: int) -> Listener:
        if not self.shared:
            return await Listener.open(self.address, port)
        family = socket.AF_INET6 if self.family == FAMILY_IPV6 else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.address, port))
            sock.listen(DEFAULT_BACKLOG)
            # Only now: whoever else listens there must have made the bind fail.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            return Listener(sock)
        except OSError:
            sock.close()
            raise

    def bind(self, now: float, *, even: bool, pair: bool) -> tuple[DatagramSocket, bytes] | None:
        """Bind a random free UDP port; None if there is none.

        Args:
            even: only an even one will do.
            pair: reserve the port above it too; the token that claims it is returned with the socket.
        """
        if pair and len(self._reserved) >= self._max_reserved:
            return None
        for port in itertools.islice(self._wanted(now, even=even), MAX_PORT_TRIES):
            try:
                sock = DatagramSocket.open(self.address, port)
            except OSError as exc:
                if exc.errno in _PORT_ERRNOS:
                    continue
                self._tell(exc)
                return None
            token = self._reserve(port + 1) if pair else b""
            if token is None:
                sock.close()
                continue
            self.datagrams.take(port)
            return sock, token
        return None

    def _tell(self, why: OSError) -> None:
        log.error("turn_no_port", extra={"event": {"address": self.address, "detail": str(why)}})

    def claim(self, token: bytes) -> DatagramSocket | None:
        """Return the port that was reserved with that token, once."""
        return self._reserved.pop(token, None)

    def _wanted(self, now: float, *, even: bool) -> Iterator[int]:
        return (port for port in self.datagrams.candidates(now) if not (even and port % 2))

    def _reserve(self, port: int) -> bytes | None:
        if port > self.datagrams.last or self.datagrams.is_taken(port):
            return None
        try:
            sock = DatagramSocket.open(self.address, port)
        except OSError:
            return None
        self.datagrams.take(port)
        token = secrets.token_bytes(TOKEN_BYTES)
        self._reserved[token] = sock
        asyncio.get_running_loop().call_later(RESERVED_S, self._forget, token)
        return token

    def _forget(self, token: bytes) -> None:
        sock = self._reserved.pop(token, None)
        if sock is not None:
            self.datagrams.give_back(sock.address[1], asyncio.get_running_loop().time())
            sock.close()

    def close(self) -> None:
        """Close the reserved ports."""
        for token in tuple(self._reserved):
            self._forget(token)
