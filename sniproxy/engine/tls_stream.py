"""TLS over a raw socket: a stream with the same methods, copied and never spliced.

An `ssl.SSLObject` between two memory buffers does the cryptography, and the socket stays ours, as with a plain stream. Differences:

- An end is close_notify, then FIN; reading may go on after writing has ended. A FIN without close_notify is a cut (RFC 8446,
  section 6.1) and is reported as a reset.
- `try_send` may take bytes whose ciphertext the socket does not take at once. The rest goes out as the socket becomes writable, and
  nothing more is taken before. `send` returns when the socket has all of it, so that a following `close` loses nothing.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import Iterable

from sniproxy.engine.byte_stream import DEFAULT_READ_BYTES, Buffer, StreamClosed
from sniproxy.engine.connect import connect_socket
from sniproxy.engine.quantum import QUANTUM_MESSAGES
from sniproxy.engine.socket_stream import FLUSH_POLL_S, SocketStream

HANDSHAKE_TIMEOUT_S = 5.0
"""For a listener: as long as a client has for its ClientHello; enough for two round trips over any network."""

MAX_RECORDS_AT_ONCE = 32
"""Records that one read decrypts: as many full ones as two full reads hold. Bounds the cost of records of one byte."""

_MESSAGES_A_HANDSHAKE = QUANTUM_MESSAGES
"""A step of a handshake that signs or verifies costs a millisecond or two: as much as a whole quantum."""

_MESSAGES_A_RECORD = 0.25
"""The cost of decrypting a small record, relative to handling a message."""

MAX_WITHOUT_PAYLOAD = 64 * 1024
"""Bytes in a row without payload, such as repeated KeyUpdates: four records of the largest size. No honest peer sends more."""

MAX_ENCRYPTED_AT_ONCE = 64 * 1024
"""Plaintext that is encrypted at once. Nothing more is until the socket has taken it, so this bounds the queue."""


class TlsStream(SocketStream):
    """A connected stream socket with TLS. `await handshake()` before anything else."""

    spliceable = False

    __slots__ = (
        "_drained",
        "_established",
        "_fin_due",
        "_from_net",
        "_queue",
        "_said_end",
        "_tls",
        "_to_net",
        "_write_error",
    )

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        resume: ssl.SSLSession | None = None,
    ) -> None:
        """Take ownership of a connected socket; nothing is sent yet.

        Args:
            sock: as for `SocketStream`.
            context: how to speak TLS.
            server_side: this is the server's side.
            server_hostname: what the client asks for, and verifies if the context says so: a name or an IP address.
            resume: a session of an earlier connection to this server with the same context, which verified the certificate.
        """
        super().__init__(sock)
        self._from_net, self._to_net = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._from_net, self._to_net, server_side=server_side, server_hostname=server_hostname, session=resume
        )
        self._queue = b""  # ciphertext that the socket has not taken yet
        self._established = self._said_end = self._fin_due = False
        self._drained = False  # TLS needs more ciphertext
        self._write_error: OSError | None = None

    @property
    def session(self) -> ssl.SSLObject:
        """The TLS session: version, cipher, certificate."""
        return self._tls

    async def handshake(self, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> None:
        """Complete the handshake. After an error the stream can only be closed; the alert has been sent to the peer.

        Raises:
            ssl.SSLError: (an OSError) no agreement, or the certificate does not verify.
            OSError: the connection was cut.
            TimeoutError: not complete within `timeout_s` seconds.
        """
        async with asyncio.timeout(timeout_s):
            while not self._established:
                await self.take_turn()
                self.quantum.spend(0, _MESSAGES_A_HANDSHAKE)
                try:
                    self._tls.do_handshake()
                    self._established = True
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError:
                    self._push()
                    raise
                while not self._push():
                    await self.writable()
                if not self._established:
                    await self._read_net()

    # Reading

    async def recv(self, limit: int = DEFAULT_READ_BYTES, *, low: int = 1) -> bytes:
        """Read what is available, as `SocketStream.recv`; b"" after the peer's close_notify. `low` has no effect.

        Raises:
            OSError: reset, cut without close_notify, or not TLS.
            TimeoutError: `expire` was called.
            StreamClosed: our own side closed the stream meanwhile.
        """
        del low
        if self._unread:
            return await super().recv(limit)
        await self.take_turn()
        without_payload = 0
        while True:
            if not self._drained:
                plain = self._decrypt(limit)
                if plain is not None:
                    return plain
            if without_payload > MAX_WITHOUT_PAYLOAD:
                raise ConnectionAbortedError(errno.ECONNABORTED, "too many TLS records without payload in a row")
            without_payload += await self._read_net()

    def try_recv(self, limit: int = DEFAULT_READ_BYTES) -> bytes:
        """Read what can be decrypted right now; b"" if that is nothing, or at the end of the stream. Raises OSError as `recv`."""
        if self._unread:
            return super().try_recv(limit)
        plain = None if self._drained else self._decrypt(limit)
        if plain is None and (ciphertext := super().try_recv()):
            self._feed(ciphertext)
            plain = self._decrypt(limit)
        return plain or b""

    def _decrypt(self, limit: int) -> bytes | None:
        """Return the payload of complete records, up to `limit` bytes; None if there is none, b"" after close_notify."""
        if self.closed:
            raise StreamClosed(errno.EBADF, "closed on our side")
        parts: list[bytes] = []
        left = limit
        while left and len(parts) < MAX_RECORDS_AT_ONCE:
            try:
                part = self._tls.read(left)  # at most one record
            except ssl.SSLWantReadError:
                self._drained = True
                break
            except ssl.SSLZeroReturnError:
                part = b""
            if not part:
                return b"".join(parts)  # the next read sees the end again
            parts.append(part)
            left -= len(part)
        self.quantum.spend(0, len(parts) * _MESSAGES_A_RECORD)
        if self._to_net.pending:
            self._push_later()  # what TLS answers to what was read, such as new keys
        return b"".join(parts) if parts else None

    async def _read_net(self) -> int:
        """Wait for ciphertext, and return how many bytes came."""
        self._check_readable()
        await self.take_turn()
        while True:
            try:
                data = self._sock.recv(DEFAULT_READ_BYTES)
            except BlockingIOError:
                pass
            else:
                break
            await self.readable()
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the connection ended without close_notify")
        self._feed(data)
        return len(data)

    def _feed(self, ciphertext: bytes) -> None:
        self.quantum.spend(len(ciphertext))
        self._from_net.write(ciphertext)
        self._drained = False

    # Writing

    def try_send(self, buffers: Iterable[Buffer], flags: int = 0) -> int:  # noqa: ARG002 - records have no flags
        """Encrypt what can be taken right now and return how many bytes that were; 0 while the socket is full.

        Raises:
            OSError: the connection is gone, or our direction has ended.
            StreamClosed: our own side closed the stream.
        """
        if self.closed:
            raise StreamClosed(errno.EBADF, "closed on our side")
        if self._write_error is not None:
            raise self._write_error
        if self._said_end:
            raise BrokenPipeError(errno.EPIPE, "the sending side has ended")
        if (self._queue or self._to_net.pending) and not self._push():
            return 0
        data = memoryview(b"".join(buffers))[:MAX_ENCRYPTED_AT_ONCE]
        taken = 0
        while taken < len(data):
            taken += self._tls.write(data[taken:])
        self._push()
        return taken

    async def send(self, *buffers: Buffer, more: bool = False) -> None:  # noqa: ARG002 - each record is sent at once
        """Write all of `buffers`. Raises as `try_send`."""
        data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        rest = memoryview(data)
        while rest:
            rest = rest[self.try_send((rest[:MAX_ENCRYPTED_AT_ONCE],)) :]
            while self._queue:
                await self.writable()
                if self._write_error is not None:
                    raise self._write_error

    def _push(self) -> bool:
        """Write what the socket takes of the ciphertext; return whether that was all. The rest follows when it is writable."""
        data = self._queue + self._to_net.read() if self._queue else self._to_net.read()
        if data:
            sent = super().try_send((data,))
            self._queue = data[sent:]
            if self._queue:
                self._watch_writable()
        return not self._queue

    def _push_later(self) -> None:
        """Push during a read, which must not raise an error of writing: keep it for the next write."""
        try:
            self._push()
        except OSError as error:
            self._write_failed(error)

    def _write_failed(self, error: OSError) -> None:
        self._write_error = error
        self._queue = b""
        self._to_net.read()

    def _watch_writable(self) -> None:
        if not self._writing:
            self._loop.add_writer(self.fd, self._on_writable)
            self._writing = True

    def _on_writable(self) -> None:
        self._push_later()
        if not self._queue:
            if self._fin_due:
                self._fin_due = False
                super().shutdown_write()
            super()._on_writable()

    async def flushed(self, limit_s: float) -> bool:
        """Wait until the peer's kernel has acknowledged everything we wrote, as `SocketStream.flushed`."""
        deadline = self._loop.time() + limit_s
        while self._queue and not self.closed and self._loop.time() < deadline:
            await asyncio.sleep(FLUSH_POLL_S)
        return not self._queue and await super().flushed(max(0.0, deadline - self._loop.time()))

    # Ending

    def shutdown_write(self) -> None:
        """Send close_notify and FIN; reading goes on. Does nothing if the connection is already gone."""
        if self.closed or self._said_end:
            return
        self._said_end = True
        if self._established and self._write_error is None:
            self._say_end()
        if self._queue:
            self._fin_due = True
        else:
            super().shutdown_write()

    def _say_end(self) -> None:
        # `unwrap` calls SSL_shutdown twice, which fails if payload waits to be read: take it out first.
        while self._tls.pending():
            self._unread = bytes(self._unread) + self._tls.read(self._tls.pending())
        waiting = self._from_net.read()
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # SSLWantReadError: sent, and the peer's own end is still to come; otherwise the session is already broken
        self._from_net.write(waiting)
        self._drained = False
        self._push_later()

    def close(self) -> None:
        """Close with close_notify, unless it was already sent. What the socket does not take at once is dropped.

        Unread payload makes it a reset, as for a plain stream.
        """
        if self.closed:
            return
        if self._established and self._has_payload():
            self.reset()
        else:
            self.shutdown_write()
            super().close()

    def _has_payload(self) -> bool:
        """Return whether unread payload is left. Reads the socket, because unread session tickets would make the kernel reset."""
        try:
            self._from_net.write(self._sock.recv(DEFAULT_READ_BYTES))
        except OSError:
            pass
        try:
            return bool(self._decrypt(1))
        except OSError:
            return False

    def reset(self) -> None:
        """Close with RST and without close_notify."""
        self._said_end, self._established = True, False  # `close`, which the base class calls, sends nothing more
        super().reset()


async def connect_tls(
    address: str,
    port: int,
    *,
    context: ssl.SSLContext,
    server_hostname: str,
    timeout_s: float,
    sock: socket.socket | None = None,
    resume: ssl.SSLSession | None = None,
) -> TlsStream:
    """Connect to an IP literal and port, and complete the handshake, both within `timeout_s` seconds.

    Args:
        server_hostname: sent as SNI, and what the certificate must be for: a name or an IP address.
        sock: as for `connect`.
        resume: as for `TlsStream`.

    Raises:
        ssl.SSLError: no agreement, or the certificate does not verify.
        OSError: refused, unreachable or reset.
        TimeoutError: not complete in time.
        ValueError: `address` is not an IP literal, or `server_hostname` is not a name.
    """
    async with asyncio.timeout(timeout_s):
        raw = await connect_socket(address, port, timeout_s=timeout_s, sock=sock)
        try:
            stream = TlsStream(raw, context, server_hostname=server_hostname, resume=resume)
        except BaseException:
            raw.close()
            raise
        try:
            await stream.handshake(timeout_s)
        except BaseException:
            stream.close()
            raise
        return stream
