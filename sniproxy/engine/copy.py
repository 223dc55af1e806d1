"""Moves the bytes of a stream: copied while there are few, spliced through a pipe in bulk.

`splice` joins two streams both ways. The bridge of sniproxy.tunnel uses the same parts, one direction at a time.
"""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from sniproxy.engine.byte_stream import DEFAULT_READ_BYTES, ByteStream
from sniproxy.engine.idle_timer import IdleTimer
from sniproxy.engine.pipes import PIPE_BYTES, Pipe, PipePool

BULK_READS = 4
"""Full reads in a row after which a direction is spliced: 256 KiB, more than any handshake or ordinary answer."""

SMALL_SPLICES = 16
"""Splices in a row, each smaller than a full read, after which a direction gives its pipe back."""

LIMIT_STALLED_S = 10.0
"""After one side was lost: how long the bytes that it had sent may make no progress towards the other."""

MAX_UNREAD = 4096
"""How many bytes a client may leave unread without having been cut off: a close_notify alert (24 bytes), HTTP/2's GOAWAY, session
tickets. An aborted download leaves more."""

TAIL_BYTES = 31
"""Of each copied piece, what is kept: as long as a close_notify."""

Farewell = Callable[[bytes, int], bool]
"""Gets the tail and the size of a direction's last piece, and returns whether that looks like the last one that will come."""

POOL = PipePool()
"""The pipes of this process. The kernel limits them per user, so all streams share one pool."""

_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class CopyDirection:
    """One direction of a stream: what it has moved, and its pipe while it is worth one."""

    __slots__ = (
        "_full_reads",
        "_pool",
        "_small_splices",
        "_spliceable",
        "activity",
        "first_at",
        "is_answered",
        "last_size",
        "moved",
        "opposite",
        "pace",
        "pipe",
        "tail",
    )

    def __init__(
        self,
        activity: IdleTimer,
        *streams: ByteStream,
        pool: PipePool = POOL,
        pace: Callable[[int], float] | None = None,
    ) -> None:
        """Prepare one direction between these streams.

        Args:
            activity: is touched for every move.
            streams: both ends; a pipe is used only if all of them are spliceable.
            pool: the pool that the pipe comes from.
            pace: gets the number of bytes moved, and returns for how many seconds to pause.
        """
        self.moved = 0
        """Payload bytes moved. Final once the direction has ended."""
        self.first_at: float | None = None
        """When the first byte was moved, by time.monotonic()."""
        self.tail = b""
        """The last bytes of the last piece, as far as needed to tell how a stream has ended. Nothing if it was spliced."""
        self.last_size = 0
        """Bytes in the last piece."""
        self.is_answered = False
        """The direction that has this one as its `opposite` has moved something since the last piece."""
        self.opposite: CopyDirection | None = None
        self.activity = activity
        self.pipe: Pipe | None = None
        self._pool = pool
        self._full_reads = 0
        self._small_splices = 0
        self.pace = pace
        self._spliceable = all(stream.spliceable for stream in streams)

    def joins(self, stream: ByteStream) -> None:
        """Note that this stream is at one end from now on. Not to be called during a move."""
        if not stream.spliceable:
            self._spliceable = False
            self.release()

    async def read(self, source: ByteStream, limit: int = PIPE_BYTES) -> tuple[int, bytes]:
        """Read what is available, up to `limit` bytes, into the pipe if there is one.

        Returns:
            the number of bytes, 0 at the end of the stream, and the bytes themselves unless they are in the pipe.

        Raises as `ByteStream.recv`.
        """
        if self.pipe is not None:
            return await fill(source, self.pipe, limit), b""
        data = await source.recv(min(DEFAULT_READ_BYTES, limit))
        return len(data), data

    def passed(self, size: int, tail: bytes = b"") -> None:
        """Count bytes that came from `read` and have been written. `tail`: the last of them, if they were copied."""
        if self.pipe is None:
            self.copied(size, tail)
        else:
            self.spliced(size)

    def copied(self, size: int, tail: bytes = b"") -> None:
        """Count bytes that were copied; take a pipe after enough full reads in a row."""
        self._count(size, tail)
        if size < DEFAULT_READ_BYTES or not self._spliceable:
            self._full_reads = 0
            return
        self._full_reads += 1
        if self._full_reads >= BULK_READS:
            self.pipe = self._pool.take()
            self._full_reads = 0 if self.pipe is None else BULK_READS
            self._small_splices = 0

    def spliced(self, size: int) -> None:
        """Count bytes that went through the pipe; give it back after enough small pieces in a row."""
        self._count(size)
        self._small_splices = self._small_splices + 1 if size < DEFAULT_READ_BYTES else 0
        if self._small_splices >= SMALL_SPLICES:
            self.release()

    def _count(self, size: int, tail: bytes = b"") -> None:
        self.moved += size
        self.last_size, self.tail = size, tail
        self.is_answered = False
        if self.opposite is not None:
            self.opposite.is_answered = True
        self.activity.touch()
        if self.first_at is None:
            self.first_at = time.monotonic()

    def release(self) -> None:
        """Give the pipe back."""
        if self.pipe is not None:
            self._pool.give_back(self.pipe)
            self.pipe = None
            self._full_reads = 0


class Lost(Exception):
    """A stream was reset or timed out.

    `writing`: a write of `size` bytes found it, so bytes that it sent before may still wait to be read.
    """

    def __init__(self, stream: ByteStream, *, writing: bool, size: int = 0) -> None:
        super().__init__(f"{stream!r} lost while {'writing' if writing else 'reading'}")
        self.stream = stream
        self.writing = writing
        self.size = size


async def fill(source: ByteStream, pipe: Pipe, limit: int = PIPE_BYTES) -> int:
    """Splice up to `limit` available bytes from `source` into the empty pipe, and wait for the first; return 0 at the end."""
    if source.holds_unread:
        data = source.take_unread()
        size = os.write(pipe.writer, data[:limit])
        source.unread(data[size:])
        pipe.held += size
        return size
    if source.quantum.used_up:
        await source.take_turn()
    while True:
        try:
            size = os.splice(source.fd, pipe.writer, limit, flags=_FLAGS)
        except BlockingIOError:
            await source.readable()
        else:
            source.quantum.spend(size)
            pipe.held += size
            return size


async def drain(pipe: Pipe, sink: ByteStream) -> None:
    """Splice everything in the pipe into `sink`."""
    while pipe.held:
        try:
            pipe.held -= os.splice(pipe.reader, sink.fd, pipe.held, flags=_FLAGS)
        except BlockingIOError:
            await sink.writable()


async def pump(source: ByteStream, sink: ByteStream, direction: CopyDirection) -> None:
    """Move everything from `source` to `sink` up to the end of the stream. Passing on the end itself is up to the caller.

    Raises:
        Lost: a side was reset, and which.
    """
    try:
        while True:
            try:
                size, data = await direction.read(source)
            except OSError as error:
                raise Lost(source, writing=False) from error
            if not size:
                return
            try:
                tail = data[-TAIL_BYTES:]
                if direction.pipe is None:
                    await sink.send(data)
                    data = b""  # an idle stream keeps nothing of what it has moved
                else:
                    await drain(direction.pipe, sink)
            except OSError as error:
                raise Lost(sink, writing=True, size=size) from error
            direction.passed(size, tail)
            if direction.pace is not None and (pause_s := direction.pace(size)):
                await asyncio.sleep(pause_s)
    finally:
        direction.release()


def has_left(
    stream: ByteStream, out: CopyDirection, into: CopyDirection | None, farewell: Farewell, *, is_over: bool
) -> bool:
    """Return whether the reset of a stream was its end: it had sent its last piece, or is a client that had received its last one.

    Args:
        stream: it reported the reset to a reader.
        out: the direction from it.
        into: the direction to it, None if what it had received does not matter, because it may have had more to send.
        farewell: recognises a direction's last piece.
        is_over: the end of that direction was passed on to it.
    """
    if farewell(out.tail, out.last_size):
        return True
    if into is None or not (is_over or (farewell(into.tail, into.last_size) and not into.is_answered)):
        return False
    return stream.has_delivered(all_but=MAX_UNREAD)


class End(StrEnum):
    """How two joined streams ended."""

    OK = "ok"
    A_RESET = "a_reset"
    B_RESET = "b_reset"
    A_LOST = "a_lost"
    """Its host no longer answers."""
    B_LOST = "b_lost"
    IDLE_TIMEOUT = "idle_timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The result of `splice`: payload bytes each way, and how the streams ended."""

    a_to_b: int
    b_to_a: int
    end: End


async def splice(a: ByteStream, b: ByteStream, *, idle_timeout_s: float, half_close_timeout_s: float) -> Moved:
    """Join two streams both ways until both directions have ended, and close them.

    A FIN is passed on while the other direction goes on. A reset is passed on as a reset, after the bytes that were sent before it.
    Bytes given back with `unread` go first.

    Args:
        idle_timeout_s: seconds without a byte in either direction.
        half_close_timeout_s: the same, once one direction has ended.
    """
    return await Splice(a, b, idle_timeout_s=idle_timeout_s, half_close_timeout_s=half_close_timeout_s).run()


class Splice:
    """Two streams joined both ways; counts may be read while it runs."""

    def __init__(
        self,
        a: ByteStream,
        b: ByteStream,
        *,
        idle_timeout_s: float,
        half_close_timeout_s: float,
        pool: PipePool = POOL,
        farewell: Farewell | None = None,
    ) -> None:
        """Prepare to join two streams.

        Args:
            a: one of them.
            b: the other one.
            idle_timeout_s: seconds without a byte in either direction.
            half_close_timeout_s: the same, once one direction has ended.
            pool: the pool that pipes come from.
            farewell: recognises the last piece of a direction. A reset by the side that has sent or, if it is `a`, received it
                then counts as its end: that is how those leave that close without reading the rest.
        """
        self.a, self.b = a, b
        self._farewell = farewell
        self._ended: set[ByteStream] = set()
        """The sides whose end was passed on."""
        self._activity = IdleTimer(idle_timeout_s, check=self._check)
        self._half_close_timeout_s = half_close_timeout_s
        self.a_to_b = CopyDirection(self._activity, a, b, pool=pool)
        self.b_to_a = CopyDirection(self._activity, a, b, pool=pool)
        if farewell is not None:
            self.a_to_b.opposite = self.b_to_a
        self._lost: ByteStream | None = None
        self._left: ByteStream | None = None
        """It has left by a reset, which is no cut if the other side ends, too."""
        self._is_silent = False

    async def run(self) -> Moved:
        """Move bytes until both directions have ended, and close both streams in any case."""
        end = End.IDLE_TIMEOUT
        try:
            async with self._activity.watched(), asyncio.TaskGroup() as group:
                group.create_task(self._one_way(self.a, self.b, self.a_to_b))
                await self._one_way(self.b, self.a, self.b_to_a)
            if self._lost is None:
                end = End.OK
        except TimeoutError:
            self._lost = self._lost or self._left
        finally:
            if self._lost is not None:
                ends = (End.A_LOST, End.B_LOST) if self._is_silent else (End.A_RESET, End.B_RESET)
                end = ends[self._lost is self.b]
            if end is End.OK:
                self.a.close()
                self.b.close()
            else:
                self.a.reset()
                self.b.reset()
        return Moved(a_to_b=self.a_to_b.moved, b_to_a=self.b_to_a.moved, end=end)

    def _check(self) -> None:
        """Cut what joins a host that no longer answers."""
        for stream in (self.a, self.b):
            if self._lost is None and stream.lost_peer():
                self._lost, self._is_silent = stream, True
                self.a.reset()  # wakes every task that waits on one of them
                self.b.reset()

    async def _one_way(self, source: ByteStream, sink: ByteStream, direction: CopyDirection) -> None:
        try:
            await pump(source, sink, direction)
        except Lost as lost:
            into, out = (self.b_to_a, self.a_to_b) if lost.stream is self.a else (self.a_to_b, self.b_to_a)
            if not await self._has_left(lost, into, out):
                self._lost = self._lost or lost.stream
                if lost.writing:
                    # What the lost side sent before is still in flight through the other direction, unless that stalls.
                    self._activity.shorten(LIMIT_STALLED_S)
                    return
            else:
                self._left = lost.stream
        if self._lost is None:
            self._ended.add(source)
            sink.shutdown_write()
            if self._left is None:
                self._activity.limit(self._half_close_timeout_s)
            else:
                self._activity.shorten(LIMIT_STALLED_S)  # nobody waits for an answer
        else:
            # The end of a lost stream is a cut, even if the kernel reports a clean end once the error was fetched.
            source.reset()
            sink.reset()

    async def _has_left(self, lost: Lost, into: CopyDirection, out: CopyDirection) -> bool:
        """Return whether a reset is how that side has left, without reading what came last."""
        if self._farewell is None or self._lost is not None:
            return False
        stream = lost.stream
        other = self.b if stream is self.a else self.a
        if not lost.writing:
            return has_left(
                stream, out, into if stream is self.a else None, self._farewell, is_over=other in self._ended
            )
        if stream not in self._ended:
            return False
        unread = lost.size
        try:
            while unread <= MAX_UNREAD:
                data = await other.recv(MAX_UNREAD)
                if not data:
                    return True
                unread += len(data)
        except OSError:
            pass
        return False
