"""One connection to an upstream, TCP or TLS, with many questions in flight (RFC 7766, RFC 7858).

Its socket is raw and non-blocking and is driven by callbacks of the loop, so that connecting needs no task either. The
connection ends when it was idle, when the upstream ends it, or when the upstream sends what is no DNS message.
"""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Generic, TypeVar

from dnsgw.message.question import HEADER_SIZE
from dnsgw.turns import PORTION, Turns

log = logging.getLogger(__name__)

IDLE_S = 10.0  # RFC 7766 section 6.2.3 asks clients to close what they do not need; upstreams commonly wait as long
_READ = 65536

PendingT = TypeVar("PendingT", bound=dict[int, Any])


class StreamClient(Generic[PendingT]):
    """A connection that is opened at once and takes messages before it is there. `pending` is kept by its user."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pending: PendingT,
        *,
        received: Callable[[bytes, PendingT], None],
        lost: Callable[["StreamClient[PendingT]"], None],
        turns: Turns,
        tls: ssl.SSLContext | None = None,
        server_name: str = "",
    ) -> None:
        """Prepare; `received` gets each message with its id, `lost` is called once, however the connection ends."""
        self._received_bytes = ssl.MemoryBIO()
        self._sent_bytes = ssl.MemoryBIO()
        self._tls = tls.wrap_bio(self._received_bytes, self._sent_bytes, server_hostname=server_name) if tls else None
        self._secure = tls is None
        self._plain = bytearray()
        """What waits for the handshake."""
        self.pending = pending
        self.closed = False
        self.source = b""
        """The address that it is from."""
        self._loop = loop
        self._received = received
        self._lost = lost
        self._turns = turns
        self._sock: socket.socket | None = None
        self._connected = False
        self._writing = False
        self._failed = False
        self._out = bytearray()
        self._in = bytearray()
        self._idle_timer: asyncio.TimerHandle | None = None

    def open(self, family: socket.AddressFamily, destination: tuple[str, int]) -> None:
        """Begin to connect. Raises OSError when that fails at once."""
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        error = sock.connect_ex(destination)
        if error not in (0, errno.EINPROGRESS):
            sock.close()
            self.closed = True
            raise OSError(error, f"connect: {errno.errorcode.get(error, error)}")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.source = ip_address(sock.getsockname()[0].partition("%")[0]).packed
        self._sock = sock
        self._loop.add_reader(sock, self._readable)
        self._loop.add_writer(sock, self._writable)
        self._writing = True
        self._idle_timer = self._loop.call_later(IDLE_S, self._idle)

    def send(self, message: bytes) -> None:
        """Send a message with its length in front, in one write (RFC 7766 section 8)."""
        framed = len(message).to_bytes(2, "big") + message
        if self._tls is None:
            self._out += framed
        else:
            self._plain += framed
            if self._secure:
                self._encrypt()
        if self._connected and not self._writing:
            self._flush()

    def close(self) -> None:
        """End the connection; whatever is pending is lost."""
        if self.closed:
            return
        self.closed = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        sock, self._sock = self._sock, None
        if sock is not None:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)
            sock.close()
        self._out.clear()
        self._in.clear()
        self._lost(self)

    def _idle(self) -> None:
        if self.pending:
            self._idle_timer = self._loop.call_later(IDLE_S, self._idle)
        else:
            self.close()

    def _writable(self) -> None:
        if self._sock is None:
            return
        if not self._connected:
            if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.close()
                return
            self._connected = True
            self._shake_hands()
        self._flush()

    def _shake_hands(self) -> None:
        """Go on with the handshake as far as it goes."""
        if self._secure or self._tls is None:
            return
        try:
            self._tls.do_handshake()
            self._secure = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            log.warning("dns_upstream_refused", extra={"event": {"error": str(error)[:200]}})
            self._failed = True
        self._encrypt()

    def _encrypt(self) -> None:
        if self._tls is not None and self._secure and self._plain:
            self._tls.write(self._plain)  # into memory: all of it goes
            self._plain.clear()
        self._out += self._sent_bytes.read()

    def _decrypted(self, data: bytes) -> bytes:
        """What the peer said in these bytes. Raises ssl.SSLError."""
        if self._tls is None:
            return data
        self._received_bytes.write(data)
        self._shake_hands()
        said = []
        try:
            while self._secure and (part := self._tls.read(_READ)):
                said.append(part)
        except ssl.SSLWantReadError:
            pass
        self._encrypt()
        return b"".join(said)

    def _flush(self) -> None:
        if self._sock is None:
            return
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()
            return
        if self._out and not self._writing:
            self._loop.add_writer(self._sock, self._writable)
        elif self._writing and not self._out:
            self._loop.remove_writer(self._sock)
        self._writing = bool(self._out)

    def _readable(self) -> None:
        if self._sock is None:
            return
        try:
            data = self._sock.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            self._in += self._decrypted(data)
        except ssl.SSLError:
            self._failed = True
        if self._failed:
            self.close()
            return
        if self._out and not self._writing:
            self._flush()
        if self._handle() and self._sock is not None:
            self._loop.remove_reader(self._sock)  # until it is handled
            self._turns.add(self._turn)

    def _turn(self) -> bool:
        """Go on with what was read; then read on."""
        more = self._handle()
        if not more and self._sock is not None:
            self._loop.add_reader(self._sock, self._readable)
        return more

    def _handle(self) -> bool:
        """Hand on a few of the messages that were read; tell whether there are more."""
        begin = 0
        for _ in range(PORTION):
            if self.closed:
                return False
            if len(self._in) - begin < 2:
                break
            end = begin + 2 + int.from_bytes(self._in[begin : begin + 2], "big")
            if end - begin - 2 < HEADER_SIZE:
                self.close()
                return False
            if len(self._in) < end:
                break
            self._received(bytes(self._in[begin + 2 : end]), self.pending)
            begin = end
        del self._in[:begin]
        return not self.closed and self._is_whole()

    def _is_whole(self) -> bool:
        """Tell whether a message, or what is none, is there to be handled."""
        if len(self._in) < 2:
            return False
        size = int.from_bytes(self._in[:2], "big")
        return size < HEADER_SIZE or len(self._in) >= 2 + size
