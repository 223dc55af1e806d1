"""Keeps what the kernel holds of one direction of a stream within its share: receive queue and send queue."""

from typing import Final

from sniproxy.engine.buffer_share import STALL_S, BufferShare
from sniproxy.engine.byte_stream import ByteStream
from sniproxy.engine.socket_memory import OVERHEAD, largest_receive

NEED_WINDOW_S: Final = 0.02
"""What a path needs is measured over its round trip, or over this if that is shorter: a burst that was queued tells nothing."""

NEED_PART: Final = 4
"""A path needs a larger receive queue if a quarter of the limit is in flight: two round trips before it limits a new stream."""

FAST_BUFFERS: Final = 16
"""The receive queue of a fast stream may hold so many times `buffer`, and more if its path needs it. Its send queue may hold what
the kernel likes (net.ipv4.tcp_wmem: 4 MiB). Measured: with half of this, a gigabyte takes 1.2 times the CPU time."""

MAX_LARGE_BUFFERS: Final = 256
"""All directions that are or were fast may hold so many times `buffer` together. Above this, no other one becomes fast: clients
that read fast and then stop cannot fill the kernel's memory."""

LARGE: Final[set["DirectionMemory"]] = set()
"""Directions that are fast, and those that were and still hold more than their share."""


def large_bytes() -> int:
    """Return what the directions in LARGE hold."""
    return sum(sum(direction.held()) for direction in LARGE)


class DirectionMemory:
    """What the kernel may hold between the source and the sink of one direction."""

    __slots__ = ("_buffer_bytes", "_flight_at", "_flight_moved", "_is_far", "_policy", "_source", "sink")

    def __init__(self, source: ByteStream, sink: ByteStream, buffer_bytes: int) -> None:
        self._source, self.sink = source, sink
        self._buffer_bytes = buffer_bytes
        self._policy: BufferShare | None = None
        self._flight_at, self._flight_moved = 0.0, 0
        self._is_far = False  # the path from the source needs more than the limit

    def joins(self, source: ByteStream | None, sink: ByteStream | None) -> None:
        """Note that a stream takes the place of one end."""
        self._source = source or self._source
        self.sink = sink or self.sink
        self._is_far = False
        if self._policy is not None:
            self._limit()

    def begin(self, moved: int, now: float) -> None:
        """Limit a direction that has moved enough for it to be worth it."""
        self._policy = BufferShare(self._buffer_bytes, moved, now)
        self._flight_at, self._flight_moved = now, moved
        self._limit()

    @property
    def is_begun(self) -> bool:
        """Whether the direction has moved enough to be limited."""
        return self._policy is not None

    @property
    def share(self) -> int | None:
        """The present share in bytes; None: what a fast stream gets."""
        return None if self._policy is None else self._policy.share

    def adapt(self, moved: int, now: float) -> bool:
        """Adapt the limits to what was moved, and return whether the reader has stalled.

        Args:
            moved: bytes moved so far.
            now: on the loop's clock.
        """
        policy = self._policy
        if policy is None:
            self.begin(moved, now)
            return False
        full_s = self.sink.take_full_s()
        policy.update(moved, now, full_s, self._may_be_fast)
        self._look_far(moved, now)
        self._limit()
        return full_s >= STALL_S

    def _may_be_fast(self) -> bool:
        return large_bytes() < MAX_LARGE_BUFFERS * self._buffer_bytes

    def _receive_limit(self) -> int:
        share = self.share
        return FAST_BUFFERS * self._buffer_bytes if share is None else OVERHEAD * share

    def _look_far(self, moved: int, now: float) -> None:
        """Find out whether the path from the source needs a larger receive queue."""
        memory, passed_s = self._source.memory, now - self._flight_at
        if memory is None or passed_s < NEED_WINDOW_S:
            return
        rtt_s = memory.min_rtt_s()
        if passed_s >= rtt_s:
            flight = (moved - self._flight_moved) * rtt_s / passed_s
            self._flight_at, self._flight_moved = now, moved
            self._is_far = flight >= self._receive_limit() / NEED_PART

    def _limit(self) -> None:
        share, limit, sink, source = self.share, self._receive_limit(), self.sink.memory, self._source.memory
        if sink is not None:
            sink.limit_unsent(share)
        if source is None:
            return
        if share is None or self._is_far:
            LARGE.add(self)
        elif self in LARGE and sum(self.held()) <= self._buffer_bytes:
            LARGE.discard(self)
        if self._is_far or (share is None and source.receive_limit < limit):
            source.tune_receive()
        elif self._policy is not None and self._policy.is_small:
            # No more than half of what can be set: `tune_receive` has to begin with more.
            source.limit_receive(min(limit, largest_receive() // 2))
        elif not source.limit_receive(limit):
            source.tune_receive()

    def end(self) -> None:
        """Note that the direction has ended."""
        LARGE.discard(self)

    def held(self) -> tuple[int, int]:
        """Return what receive queue and send queue hold now, in bytes."""
        receive, send = self._source.memory, self.sink.memory
        return 0 if receive is None else receive.held()[0], 0 if send is None else send.held()[1]
