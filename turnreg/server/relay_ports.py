"""One relay address: opens a port of the configured range for each allocation."""

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
"""Most busy ports that are tried for one Allocate (about 10 ms). If so many are busy, another program uses the range."""

RESERVED_S = 30.0
"""How long a reserved port waits for its Allocate (RFC 8656, section 7.2, requires at least that)."""
MAX_RESERVED = 256
"""Most reserved ports at once, and no more than a quarter of the range. Further requests are refused for lack of capacity."""
TOKEN_BYTES = 8

_PORT_ERRNOS = frozenset({errno.EADDRINUSE, errno.EACCES})


class RelayPorts:
    """TCP and UDP ports of one relay address, managed independently of each other."""

    def __init__(
        self,
        address: str,
        first: int,
        last: int,
        *,
        shared: bool = False,
        randbelow: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        """Use the ports `first` to `last` of an address. `shared`: active Connects use the ports that allocations listen on."""
        self.address = address
        self.family = FAMILY_IPV6 if ":" in address else FAMILY_IPV4
        self.streams = PortRange(first, last, randbelow)
        self.datagrams = PortRange(first, last, randbelow)
        self.shared = shared
        self._reserved: dict[bytes, DatagramSocket] = {}
        self._max_reserved = min(MAX_RESERVED, max(1, (last - first + 1) // 4))

    async def listen(self, now: float) -> Listener | None:
        """Listen on a random free port. Returns None if there is none."""
        for port in itertools.islice(self.streams.candidates(now), MAX_PORT_TRIES):
            try:
                listener = await self._open_listener(port)
            except OSError as exc:
                if exc.errno in _PORT_ERRNOS:
                    continue
                self._log_error(exc)  # no such address, out of descriptors: the next port would fail too
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
            # Set after bind and listen, which must fail if another program listens there.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            return Listener(sock)
        except OSError:
            sock.close()
            raise

    def bind(self, now: float, *, even: bool, pair: bool) -> tuple[DatagramSocket, bytes] | None:
        """Bind a random free UDP port. Returns None if there is none.

        Args:
            even: the port must be even.
            pair: also reserve the next higher port, and return its token with the socket.
        """
        if pair and len(self._reserved) >= self._max_reserved:
            return None
        for port in itertools.islice(self._wanted(now, even=even), MAX_PORT_TRIES):
            try:
                sock = DatagramSocket.open(self.address, port)
            except OSError as exc:
                if exc.errno in _PORT_ERRNOS:
                    continue
                self._log_error(exc)
                return None
            token = self._reserve(port + 1) if pair else b""
            if token is None:
                sock.close()
                continue
            self.datagrams.take(port)
            return sock, token
        return None

    def _log_error(self, why: OSError) -> None:
        log.error("turn_no_port", extra={"event": {"address": self.address, "detail": str(why)}})

    def claim(self, token: bytes) -> DatagramSocket | None:
        """Return the socket that was reserved under that token, once; None if there is none."""
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
