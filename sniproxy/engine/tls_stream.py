"""TLS over a raw descriptor: a wire with the same methods whose bytes are ciphertext, copied and never spliced.

An `ssl.SSLObject` between two memory buffers does the cryptography; the socket stays ours, as with any other wire. What differs:

- an end is close_notify, then FIN; reading may go on after writing has ended. A FIN without close_notify is a cut (RFC 8446,
  section 6.1) and reads as a reset;
- `try_send` may take bytes whose ciphertext the socket does not take at once: it goes out as the socket can, and nothing more is
  taken before. `send` returns when the socket has all of it, so that a `close` behind it loses nothing.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import Iterable

from sniproxy.engine.byte_stream import DEFAULT_READ_BYTES, Buffer, StreamClosed
from sniproxy.engine.quantum import QUANTUM_MESSAGES
from sniproxy.engine.socket_stream import FLUSH_POLL_S, SocketStream, connect_socket

HANDSHAKE_TIMEOUT_S = 5.0
"""For a listener: as long as a client gets for its ClientHello, and two round trips over any network."""

MAX_RECORDS_AT_ONCE = 32
"""Records that one read opens: two full reads' worth of full ones. A peer that sends a byte in each gets no more of our time."""

_MESSAGES_A_HANDSHAKE = QUANTUM_MESSAGES
"""A step of a handshake costs a millisecond or two, where it signs or verifies: as much as a whole quantum."""

_MESSAGES_A_RECORD = 0.25
"""What opening a small record costs beside handling a message."""

MAX_WITHOUT_PAYLOAD = 64 * 1024
"""Bytes in a row that bring no payload, such as new keys again and again: four of the largest records.
No honest peer sends more."""

MAX_ENCRYPTED_AT_ONCE = 64 * 1024
"""Plaintext that is encrypted before the socket has taken what was encrypted before: the bound of the queue."""


class TlsStream(SocketStream):
    """A connected stream socket that speaks TLS. `await handshake()` before anything else."""

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
        """Take a connected socket; nothing is sent yet.

        Args:
            server_hostname: what the client side asks for, and verifies where the context says so: a name or an IP address.
            resume: a session of an earlier connection to this server by the same context, whose certificate was verified then.
        """
        super().__init__(sock)
        self._from_net, self._to_net = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._from_net, self._to_net, server_side=server_side, server_hostname=server_hostname, session=resume
        )
        self._queue = b""  # ciphertext that the socket did not take yet
        self._established = self._said_end = self._fin_due = False
        self._drained = False  # TLS has said that it needs more of the connection's bytes
        self._write_error: OSError | None = None

    @property
    def session(self) -> ssl.SSLObject:
        """The TLS session, to ask for version, cipher, certificate."""
        return self._tls

    async def handshake(self, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> None:
        """Shake hands. After an error the wire is of no use but to be closed; the peer has been sent the alert.

        Raises:
            ssl.SSLError: (an OSError) no agreement, or a certificate that does not verify.
            OSError: the connection was cut.
            TimeoutError: not done within `timeout_s` seconds.
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
        """Read what is there, as `SocketStream.recv`; b"" at the peer's close_notify. `low` changes nothing: TLS has records.

        Raises:
            OSError: reset, cut without close_notify, or bytes that are no TLS.
            WireClosed: our own side closed it meanwhile.
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
                raise ConnectionAbortedError(errno.ECONNABORTED, "TLS records without payload, one after the other")
            without_payload += await self._read_net()

    def try_recv(self, limit: int = DEFAULT_READ_BYTES) -> bytes:
        """Read what can be decrypted right now; b"" if that is nothing, or the end. Raises OSError as `recv` does."""
        if self._unread:
            return super().try_recv(limit)
        plain = None if self._drained else self._decrypt(limit)
        if plain is None and (ciphertext := super().try_recv()):
            self._feed(ciphertext)
            plain = self._decrypt(limit)
        return plain or b""

    def _decrypt(self, limit: int) -> bytes | None:
        """Return what whole records hold, up to `limit` bytes; None where there is none, b"" after close_notify."""
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
                return b"".join(parts)  # the end itself is seen again by the next read
            parts.append(part)
            left -= len(part)
        self.quantum.spend(0, len(parts) * _MESSAGES_A_RECORD)
        if self._to_net.pending:
            self._push_later()  # what reading made TLS answer, such as new keys
        return b"".join(parts) if parts else None

    async def _read_net(self) -> int:
        """Wait for bytes of the connection, and say how many came."""
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

    def try_send(self, buffers: Iterable[Buffer], flags: int = 0) -> int:  # noqa: ARG002 - records take no flags
        """Encrypt what may be taken right now and say how many bytes that were; 0 while the socket is full.

        Raises:
            OSError: the connection is gone, or its sending side has ended.
            WireClosed: our own side closed it.
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

    async def send(self, *buffers: Buffer, more: bool = False) -> None:  # noqa: ARG002 - a record is sent as it is made
        """Write all of `buffers`; errors as for `try_send`."""
        data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        rest = memoryview(data)
        while rest:
            rest = rest[self.try_send((rest[:MAX_ENCRYPTED_AT_ONCE],)) :]
            while self._queue:
                await self.writable()
                if self._write_error is not None:
                    raise self._write_error

    def _push(self) -> bool:
        """Give the socket what it takes of the ciphertext; say whether that was all. The rest goes as it can."""
        data = self._queue + self._to_net.read() if self._queue else self._to_net.read()
        if data:
            sent = super().try_send((data,))
            self._queue = data[sent:]
            if self._queue:
                self._watch_writable()
        return not self._queue

    def _push_later(self) -> None:
        """Push from inside a read, where an error of writing is not to be told."""
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
        """Send close_notify and FIN; reading goes on. Quietly nothing where the connection is gone already."""
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
        # SSL_shutdown, asked twice by `unwrap`, would take payload that waits in its way for an error: out of its way with it.
        while self._tls.pending():
            self._unread = bytes(self._unread) + self._tls.read(self._tls.pending())
        waiting = self._from_net.read()
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # SSLWantReadError: said, and the peer's own end is still to come; else the session is broken already
        self._from_net.write(waiting)
        self._drained = False
        self._push_later()

    def close(self) -> None:
        """Close with close_notify, unless it was sent; what the socket does not take at once is dropped.

        As with any wire, unread payload makes it a reset.
        """
        if self.closed:
            return
        if self._established and self._has_payload():
            self.reset()
        else:
            self.shutdown_write()
            super().close()

    def _has_payload(self) -> bool:
        """Tell payload from what TLS says to itself: tickets left in the socket would make the kernel reset what we sent."""
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
        self._said_end, self._established = True, False  # `close`, which the base ends with, has nothing left to say
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
    """Connect to an IP literal and port, and shake hands; both within `timeout_s`.

    Args:
        server_hostname: asked for by SNI, and what the certificate must be for: a name or an IP address.
        sock: as for `connect`.
        resume: as for `TlsStream`.

    Raises:
        ssl.SSLError: no agreement, or a certificate that does not verify.
        OSError: refused, unreachable, reset.
        TimeoutError: not there in time.
        ValueError: `address` is not an IP literal, or `server_hostname` is no name.
    """
    async with asyncio.timeout(timeout_s):
        raw = await connect_socket(address, port, timeout_s=timeout_s, sock=sock)
        try:
            wire = TlsStream(raw, context, server_hostname=server_hostname, resume=resume)
        except BaseException:
            raw.close()
            raise
        try:
            await wire.handshake(timeout_s)
        except BaseException:
            wire.close()
            raise
        return wire
