"""A connected TCP socket, raw and non-blocking, on the running loop.

Reads and writes are tried at once and wait for readiness only if the kernel has or takes nothing. A watched descriptor stays
watched between two waits, and is unwatched when it fires while nothing waits: a stream in steady state makes no epoll_ctl calls.
"""

import asyncio
import errno
import fcntl
import ipaddress
import socket
import struct
import termios
from collections.abc import Iterable
from typing import ClassVar

from sniproxy.engine.byte_stream import DEFAULT_READ_BYTES, Buffer, StreamClosed
from sniproxy.engine.quantum import Quantum
from sniproxy.engine.socket_memory import SocketMemory
from sniproxy.engine.tcp_liveness import UNANSWERED_S, bound_retransmissions, unanswered_s

KEEPALIVE_IDLE_S = 15
KEEPALIVE_INTERVAL_S = 4
KEEPALIVE_PROBES = 3
"""A far end that vanished is detected after 15 + 3 × 4 = 27 s of silence. TCP_USER_TIMEOUT is not set: Linux counts the time that a
reader pauses (zero window, probes answered) against it, so it would cut streams whose client merely waits."""

FLUSH_POLL_S = 0.02
"""How often `flushed` looks at the kernel's send queue."""

_TCP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_GONE = (errno.ENOTCONN, errno.EINVAL, errno.EBADF)


def plain_address(text: str) -> str:
    """Return an address from the system without its scope, and an IPv4-mapped one as IPv4."""
    if ":" not in text:
        return text
    address = ipaddress.IPv6Address(text.partition("%")[0])
    return str(address.ipv4_mapped or address)


def _endpoint(name: object) -> tuple[str, int]:
    if isinstance(name, tuple) and len(name) >= 2:
        return plain_address(str(name[0])), int(name[1])
    return "", 0  # a socket pair, in tests


def tune(sock: socket.socket) -> None:
    """Turn off Nagle's algorithm and turn on keep-alive. On Linux, accepted sockets inherit these from the listening socket."""
    if sock.family not in _TCP_FAMILIES:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    bound_retransmissions(sock)


class SocketStream:
    """A connected stream socket. One reader and one writer at a time, which may be two tasks.

    `peer` and `local` are (address, port), with IPv4-mapped addresses written as IPv4. Reading lets other connections run whenever
    this one has used up its quantum, however fast the peer sends.
    """

    spliceable: ClassVar[bool] = True
    """The descriptor carries the stream's own bytes, so os.splice may move them."""

    __slots__ = (
        "_expired",
        "_full_at",
        "_full_s",
        "_loop",
        "_low",
        "_read_waiter",
        "_reading",
        "_sock",
        "_unanswered_since",
        "_unread",
        "_write_waiter",
        "_writing",
        "closed",
        "fd",
        "local",
        "memory",
        "peer",
        "quantum",
    )

    def __init__(self, sock: socket.socket, peer: object = None) -> None:
        """Take ownership of a connected socket.

        Args:
            sock: used by nothing else from now on. The caller has called `tune`; accepted sockets inherit it from the listener.
            peer: the address from accept(2) or connect(2), because getpeername(2) fails once the peer has reset.

        Raises:
            OSError: the connection is already gone; the socket stays the caller's.
        """
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._unread: Buffer = b""
        self._low = 1
        self._expired = False
        self._reading = self._writing = False
        self._unanswered_since: float | None = None
        self._read_waiter: asyncio.Future[None] | None = None
        self._write_waiter: asyncio.Future[None] | None = None
        self._full_at = self._full_s = 0.0
        self.memory: SocketMemory | None = SocketMemory(sock) if sock.family in _TCP_FAMILIES else None
        """The kernel's memory of the socket; None if it is not TCP."""
        self.quantum = Quantum()
        """What may still be read before other connections run. Code that parses messages from it spends the quantum too."""
        self.closed = False
        self.fd = sock.fileno()
        self.local = _endpoint(sock.getsockname())
        self.peer = _endpoint(peer if peer is not None else sock.getpeername())

    def __repr__(self) -> str:
        return f"<SocketStream {self.local} to {self.peer}{' closed' if self.closed else ''}>"

    # Reading

    def unread(self, data: Buffer) -> None:
        """Give bytes back: the next read returns them first."""
        self._unread = bytes(data) + bytes(self._unread) if self._unread else bytes(data)

    @property
    def holds_unread(self) -> bool:
        """Whether bytes were given back by `unread` and not read again."""
        return bool(self._unread)

    def take_unread(self) -> bytes:
        """Remove and return the bytes that were given back, without reading the socket."""
        data, self._unread = bytes(self._unread), b""
        return data

    async def recv(self, limit: int = DEFAULT_READ_BYTES, *, low: int = 1) -> bytes:
        """Read what is available, up to `limit` bytes, and wait for the first byte if nothing is; b"" at the end of the stream.

        Args:
            limit: the most bytes to return.
            low: if nothing is available, wait for this many bytes. So a reader that needs them is not woken for each byte of a
                peer that sends them one by one. What is already available is returned, however little.

        Raises:
            OSError: the peer reset the connection, or keep-alive found it gone.
            TimeoutError: `expire` was called.
            StreamClosed: our own side closed the stream meanwhile.
        """
        if self._unread:
            await self.take_turn()
            data = self._unread_up_to(limit)
            self.quantum.spend(len(data))
            return data
        if self.quantum.used_up:
            await self.take_turn()
        while True:
            # Read again even after a short read: a reset behind those bytes has already ended the watch (uvloop stops watching a
            # descriptor that reports an error), and then only the socket itself reports it.
            try:
                data = self._sock.recv(limit)
            except BlockingIOError:
                pass
            else:
                self.quantum.spend(len(data))
                return data
            await self.readable(low)

    async def take_turn(self) -> None:
        """Let other connections run if the quantum is used up. Raises as `readable`."""
        if self.quantum.used_up:
            await self.quantum.renew()
            self._check_readable()

    def try_recv(self, limit: int = DEFAULT_READ_BYTES) -> bytes:
        """Read what is available right now; b"" if that is nothing, or at the end of the stream. Raises OSError as `recv`."""
        if self._unread:
            return self._unread_up_to(limit)
        try:
            return self._sock.recv(limit)
        except BlockingIOError:
            return b""

    def _unread_up_to(self, limit: int) -> bytes:
        data = self.take_unread()
        if len(data) > limit:
            data, self._unread = data[:limit], data[limit:]
        return data

    async def recv_exactly(self, count: int) -> bytes:
        """Read exactly `count` bytes and not one more.

        Raises:
            EOFError: the stream ended earlier.
            OSError: as for `recv`.
        """
        data = b""
        while len(data) < count:
            more = await self.recv(count - len(data))
            if not more:
                raise EOFError(f"stream ended {count - len(data)} bytes short of {count}")
            data = data + more if data else more
        return data

    async def readable(self, low: int = 1) -> None:
        """Wait until a read would return at once: with `low` bytes, the end, or an error.

        Raises:
            TimeoutError: `expire` was called.
            StreamClosed: our own side closed the stream.
        """
        self._check_readable()
        if low != self._low:
            # The kernel wakes us for fewer bytes if its buffer cannot hold so many, and always at the end and for errors.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
            self._low = low
        assert self._read_waiter is None or self._read_waiter.done(), (
            "one reader at a time: the first would sleep for ever"
        )
        self._read_waiter = waiter = self._loop.create_future()
        if not self._reading:
            self._loop.add_reader(self.fd, self._on_readable)
            self._reading = True
        try:
            await waiter
        finally:
            if self._read_waiter is waiter:  # not the next reader's, if this one was cancelled
                self._read_waiter = None
            del waiter  # it holds the exception, which holds this frame: a reference cycle for each stream that is cut
        self.quantum.waited()

    def _check_readable(self) -> None:
        if self.closed:
            raise StreamClosed(errno.EBADF, "closed on our side")
        if self._expired:
            raise TimeoutError

    def expire(self) -> None:
        """Make pending and later reads raise TimeoutError."""
        self._expired = True
        if self._read_waiter is not None and not self._read_waiter.done():
            self._read_waiter.set_exception(TimeoutError())

    def _on_readable(self) -> None:
        waiter = self._read_waiter
        if waiter is None:
            # Level-triggered: if it stayed registered while nothing reads, the loop would spin.
            self._loop.remove_reader(self.fd)
            self._reading = False
        elif not waiter.done():
            waiter.set_result(None)

    # Writing

    def try_send(self, buffers: Iterable[Buffer], flags: int = 0) -> int:
        """Write what the socket takes right now, in one system call, and return how many bytes it took.

        Raises:
            OSError: the connection is gone.
            StreamClosed: our own side closed the stream.
        """
        if self.closed:
            raise StreamClosed(errno.EBADF, "closed on our side")
        try:
            return self._sock.sendmsg(buffers, (), flags)
        except BlockingIOError:
            return 0

    async def send(self, *buffers: Buffer, more: bool = False) -> None:
        """Write all of `buffers`, in one system call if the socket takes it. `more`: more data follows at once (MSG_MORE).

        Raises:
            OSError: the connection is gone.
            StreamClosed: our own side closed the stream.
        """
        flags = socket.MSG_MORE if more else 0
        total = sum(map(len, buffers))
        sent = self.try_send(buffers, flags)
        if sent == total:
            return
        rest = memoryview(b"".join(buffers))[sent:]
        while rest:
            await self.writable()
            rest = rest[self.try_send((rest,), flags) :]

    async def writable(self) -> None:
        """Wait until the socket takes more bytes, or the connection is gone."""
        if self.closed:
            raise StreamClosed(errno.EBADF, "closed on our side")
        assert self._write_waiter is None or self._write_waiter.done(), "one writer at a time"
        self._write_waiter = waiter = self._loop.create_future()
        self._full_at = self._loop.time()
        if not self._writing:
            self._loop.add_writer(self.fd, self._on_writable)
            self._writing = True
        try:
            await waiter
        finally:
            if self._write_waiter is waiter:
                self._write_waiter = None
            self._full_s = max(self._full_s, self._loop.time() - self._full_at)
            del waiter

    @property
    def is_full(self) -> bool:
        """Whether a writer waits until the peer has read more."""
        return self._write_waiter is not None and not self._write_waiter.done()

    def take_full_s(self) -> float:
        """Return the longest time for which a writer has waited since the last call, or waits now."""
        longest, self._full_s = self._full_s, 0.0
        return max(longest, self._loop.time() - self._full_at) if self.is_full else longest

    def wake_writer(self) -> None:
        """Let a waiting writer try again."""
        if self._write_waiter is not None and not self._write_waiter.done():
            self._write_waiter.set_result(None)

    def lost_peer(self) -> bool:
        """Return whether the peer has stopped answering what is in flight (`tcp_liveness`). To be asked every few seconds."""
        unanswered = 0.0 if self.closed else unanswered_s(self._sock)
        if not unanswered:
            self._unanswered_since = None
            return False
        now = self._loop.time()
        if self._unanswered_since is None:
            self._unanswered_since = now
        return min(unanswered, now - self._unanswered_since) >= UNANSWERED_S

    @property
    def in_flight(self) -> int:
        """Bytes that the peer's kernel has not acknowledged, our FIN counted as one; also after the peer's reset."""
        return int(struct.unpack("i", fcntl.ioctl(self.fd, termios.TIOCOUTQ, b"\0\0\0\0"))[0])

    def has_delivered(self, *, all_but: int) -> bool:
        """Return whether the peer's kernel has received all that we wrote but so many bytes; also after its reset.

        It may hold back its acknowledgement of two segments (RFC 9293, section 3.8.6.3).
        """
        if self.closed or self._sock.family not in (socket.AF_INET, socket.AF_INET6):
            return True
        segment = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        return self.in_flight <= 2 * segment + all_but

    async def flushed(self, limit_s: float) -> bool:
        """Wait at most `limit_s` seconds until the peer's kernel has acknowledged everything we wrote; return whether it has."""
        deadline = self._loop.time() + limit_s
        while not self.closed:
            if not self.in_flight:
                return True
            if self._loop.time() >= deadline:
                return False
            await asyncio.sleep(FLUSH_POLL_S)  # the kernel has no event for this
        return False

    def _on_writable(self) -> None:
        waiter = self._write_waiter
        if waiter is None:
            self._loop.remove_writer(self.fd)
            self._writing = False
        elif not waiter.done():
            waiter.set_result(None)

    # Ending

    def shutdown_write(self) -> None:
        """Send FIN; reading goes on. Does nothing if the connection is already gone."""
        if not self.closed:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno not in _GONE:
                    raise

    def close(self) -> None:
        """Close; pending reads and writes raise StreamClosed. The kernel sends RST if unread bytes are left."""
        if self.closed:
            return
        self.closed = True
        if self._reading:
            self._loop.remove_reader(self.fd)
        if self._writing:
            self._loop.remove_writer(self.fd)
        for waiter in (self._read_waiter, self._write_waiter):
            if waiter is not None and not waiter.done():
                waiter.set_exception(StreamClosed(errno.EBADF, "closed on our side"))
        self._sock.close()
        self.fd = -1  # another socket may get the number at once

    def reset(self) -> None:
        """Close with RST, so that the peer cannot mistake a cut for a regular end. Unsent bytes are dropped."""
        if not self.closed:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            except OSError:
                pass  # already gone, so only closing is left
            self.close()

    async def drain_and_close(self, *, limit_bytes: int = 64 * 1024, limit_s: float = 1.0) -> None:
        """Send FIN, read and discard within these limits, then close, so that our last bytes arrive instead of a reset."""
        try:
            self.shutdown_write()
            self._unread = b""
            async with asyncio.timeout(limit_s):
                left = limit_bytes
                while left > 0 and (data := await self.recv(left)):
                    left -= len(data)
        except (OSError, TimeoutError):
            pass  # the peer is gone, or does not stop sending
        finally:
            self.close()
