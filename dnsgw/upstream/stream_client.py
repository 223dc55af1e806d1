"""One connection to an upstream, TCP or TLS, with many questions in flight (RFC 7766, RFC 7858).

It accepts messages before it is connected. It ends when it is idle, when the upstream closes it or sends something that is not a
DNS message, or when the upstream does not read.
"""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Generic, TypeAlias, TypeVar

from dnsgw.message.question import HEADER_SIZE
from sniproxy.engine import SocketStream, connect, connect_tls
from sniproxy.engine.socket_address import socket_address

log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""Bytes that wait for the upstream to read. A forwarder's questions in flight, some 300 bytes each, are far less."""

_CHUNK = 64 * 1024  # bytes per write

_MESSAGE_COST = 0.5
"""In messages of the engine's quantum: to check and pass on an answer takes about 50 µs."""

Spawn: TypeAlias = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Runs a coroutine in a task of the server's group."""

PendingT = TypeVar("PendingT", bound=dict[int, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTiming:
    """Timeouts of a connection, in seconds."""

    connect_s: float = 5.0
    """For connecting and the TLS handshake. Questions give up sooner; a slower connection would not help later ones either."""

    idle_s: float = 10.0
    """Without a question. RFC 7766 section 6.2.3 asks clients to close idle connections; upstreams wait about as long."""


STREAM_TIMING = StreamTiming()


class StreamClient(Generic[PendingT]):
    """A connection that accepts messages at once. `pending`, the outstanding questions, is maintained by the caller."""

    def __init__(
        self,
        pending: PendingT,
        *,
        spawn: Spawn,
        received: Callable[[bytes, PendingT], None],
        lost: Callable[["StreamClient[PendingT]"], None],
        tls: ssl.SSLContext | None = None,
        server_name: str = "",
        timing: StreamTiming = STREAM_TIMING,
    ) -> None:
        """Runs on the running loop; `open` connects.

        Args:
            pending: the outstanding questions by id. While there are any, the connection is not idle.
            spawn: runs the connection's tasks.
            received: called with each message and `pending`.
            lost: called once, however the connection ends, except when its task is cancelled.
            tls: for DNS over TLS; None: TCP.
            server_name: name or IP address that the certificate must be valid for.
            timing: timeouts.
        """
        self.pending = pending
        self.closed = False
        self.source = b""
        """Our address on this connection, packed."""
        self._loop = asyncio.get_running_loop()
        self._spawn = spawn
        self._received = received
        self._lost = lost
        self._tls = tls
        self._server_name = server_name
        self._timing = timing
        self._stream: SocketStream | None = None
        self._task: asyncio.Task[None] | None = None
        self._unsent = bytearray()
        self._sending = False
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def connected(self) -> bool:
        """Whether it has been established, and the TLS handshake has succeeded."""
        return self._stream is not None

    def open(self, family: socket.AddressFamily, destination: tuple[str, int]) -> None:
        """Start to connect. Raises OSError if that fails at once."""
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            error = sock.connect_ex(socket_address(*destination))
            if error not in (0, errno.EINPROGRESS):
                raise OSError(error, f"connect: {errno.errorcode.get(error, error)}")
            self.source = ip_address(sock.getsockname()[0].partition("%")[0]).packed
        except OSError:
            self.closed = True
            sock.close()
            raise
        self._task = self._spawn(self._run(sock, destination))
        self._task.add_done_callback(lambda _: sock.close())  # a task may be cancelled before its first step
        self._idle_timer = self._loop.call_later(self._timing.idle_s, self._check_idle)

    def send(self, message: bytes) -> None:
        """Send a message and its length in one write (RFC 7766 section 8), together with others of this pass of the loop."""
        self._unsent += len(message).to_bytes(2, "big")
        self._unsent += message
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self._loop.call_soon(self.close)
        elif self._stream is not None and not self._sending:
            self._sending = True
            self._loop.call_soon(self._flush, self._stream)

    def _flush(self, stream: SocketStream) -> None:
        """Write what is unsent; a task writes what the socket does not take at once."""
        self._send_some(stream)
        self._sending = bool(self._unsent) and not stream.closed
        if self._sending:
            self._spawn(self._send_rest(stream))

    def _send_some(self, stream: SocketStream) -> None:
        try:
            del self._unsent[: stream.try_send((bytes(self._unsent[:_CHUNK]),))]
        except OSError:
            stream.close()  # wakes the reader, which reports the loss

    async def _send_rest(self, stream: SocketStream) -> None:
        try:
            while self._unsent:
                await stream.writable()
                self._send_some(stream)
        except OSError:
            pass  # closed
        self._sending = False

    def close(self) -> None:
        """Close the connection; all pending questions are lost."""
        if self.closed:
            return
        self._release()
        if self._stream is None and self._task is not None:
            self._task.cancel()
        self._lost(self)

    def _release(self) -> None:
        self.closed = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._stream is not None:
            self._stream.close()  # wakes the task
        self._unsent.clear()

    def _check_idle(self) -> None:
        if self.pending:
            self._idle_timer = self._loop.call_later(self._timing.idle_s, self._check_idle)
        else:
            self.close()

    async def _run(self, sock: socket.socket, destination: tuple[str, int]) -> None:
        try:
            try:
                await self._read(await self._connected(sock, *destination))
            except ssl.SSLError as error:
                if self._stream is None:
                    log.warning("dns_upstream_refused", extra={"event": {"error": str(error)[:200]}})
            except OSError:
                pass  # refused, reset, timed out, or closed by us: the same for the waiting questions
            self.close()
        except asyncio.CancelledError:
            self._release()  # either `close` has called `lost`, or the server is stopping
            raise
        except Exception:  # an error in this program must not end the server
            log.exception("dns_upstream_failed")
            self._release()

    async def _connected(self, sock: socket.socket, host: str, port: int) -> SocketStream:
        """Connect, and send the messages that wait for the connection."""
        limit_s = self._timing.connect_s
        if self._tls is None:
            stream = await connect(host, port, timeout_s=limit_s, sock=sock)
        else:
            stream = await connect_tls(
                host, port, context=self._tls, server_hostname=self._server_name, timeout_s=limit_s, sock=sock
            )
        self._stream = stream
        if self._unsent:
            self._flush(stream)
        return stream

    async def _read(self, stream: SocketStream) -> None:
        """Pass on every message, until the connection ends or receives something that is not a message."""
        buffer = bytearray()
        while data := await stream.recv():
            buffer += data
            begin = 0
            while len(buffer) - begin >= 2:
                size = int.from_bytes(buffer[begin : begin + 2], "big")
                if size < HEADER_SIZE:
                    return
                end = begin + 2 + size
                if len(buffer) < end:
                    break
                self._received(bytes(buffer[begin + 2 : end]), self.pending)
                if self.closed:
                    return
                begin = end
                stream.quantum.spend(0, _MESSAGE_COST)
                if stream.quantum.used_up:
                    await stream.take_turn()
            del buffer[:begin]
