"""Which stream to end when all are taken and none has a limit for silence: the longest idle one of whoever holds most.

A holder is a client at a relay and a network at a gateway. Nobody loses a stream to somebody who already holds more, so a holder
that opens more and more of them only takes its own. Each call costs the same however many streams there are. Sans-IO.
"""

import heapq
import itertools
from collections.abc import Hashable, Iterator
from typing import Final, Generic, Protocol, TypeVar

MIN_IDLE_S: Final = 60.0
"""A stream that has been silent for less is in use: requests are answered, and most applications ping, within a minute."""

COLLECTED_AN_OPEN: Final = 2
"""Streams that are looked at whenever one is opened, so that the first search among many does not have to look at all of them."""

_COMPACT_ABOVE: Final = 64


class Stream(Protocol):
    """An open stream."""

    @property
    def last_moved(self) -> float:
        """When it last moved a byte."""


StreamT = TypeVar("StreamT", bound=Stream)
HolderT = TypeVar("HolderT", bound=Hashable)


class _Queue(Generic[StreamT]):
    """Streams in the order in which they had last moved when they were added. One that is removed stays in the heap for a while."""

    __slots__ = ("_added", "_heap", "_number")

    def __init__(self) -> None:
        self._added: dict[StreamT, float] = {}
        self._heap: list[tuple[float, int, StreamT]] = []
        self._number = itertools.count()

    def __len__(self) -> int:
        return len(self._added)

    def __contains__(self, stream: object) -> bool:
        return stream in self._added

    def add(self, stream: StreamT) -> None:
        self._added[stream] = last = stream.last_moved
        heapq.heappush(self._heap, (last, next(self._number), stream))

    def remove(self, stream: StreamT) -> None:
        del self._added[stream]
        if len(self._heap) > 2 * len(self._added) + _COMPACT_ABOVE:
            self._heap = [entry for entry in self._heap if self._is_in(entry)]
            heapq.heapify(self._heap)

    def first(self) -> tuple[StreamT, float] | None:
        """Return the first stream, and when it had last moved when it was added."""
        while self._heap and not self._is_in(self._heap[0]):
            heapq.heappop(self._heap)
        return (self._heap[0][2], self._heap[0][0]) if self._heap else None

    def _is_in(self, entry: tuple[float, int, StreamT]) -> bool:
        return self._added.get(entry[2]) == entry[0]


class IdleStreams(Generic[HolderT, StreamT]):
    """The open streams by holder. All times are of one clock, that of `Stream.last_moved`."""

    def __init__(self, min_idle_s: float = MIN_IDLE_S) -> None:
        """Begin with no streams. `min_idle_s`: how long a stream must have been silent to be found."""
        self._min_idle_s = min_idle_s
        self._held: dict[HolderT, int] = {}
        self._open: dict[StreamT, HolderT] = {}
        # A stream is in one of two places, by when it had last moved when it came there. That is corrected when it comes to the
        # front: here while it is or may be in use, and once it has been silent for long enough among its holder's idle ones.
        self._in_use: _Queue[StreamT] = _Queue()
        self._idle: dict[HolderT, _Queue[StreamT]] = {}
        self._by_count: dict[int, dict[HolderT, None]] = {}
        """Holders of idle streams by the number of all their streams. There are few different numbers: 181 for 16,384 streams."""

    def held(self, holder: HolderT) -> int:
        """Return how many streams a holder has, in any state."""
        return self._held.get(holder, 0)

    def enter(self, holder: HolderT) -> None:
        """Count a stream of this holder, which may not be open yet."""
        self._count(holder, 1)

    def leave(self, holder: HolderT) -> None:
        """Note the end of a stream that was counted."""
        self._count(holder, -1)

    def open(self, stream: StreamT, holder: HolderT) -> None:
        """Note that a stream is open, so it may be found from now on."""
        self._open[stream] = holder
        self._in_use.add(stream)
        self._collect(stream.last_moved, most=COLLECTED_AN_OPEN)

    def close(self, stream: StreamT) -> None:
        """Forget a stream; does nothing if it is not open."""
        holder = self._open.pop(stream, None)
        if holder is None:
            return
        if stream in self._in_use:
            self._in_use.remove(stream)
        else:
            self._wake(stream, holder)

    def find(self, holder: HolderT, now: float) -> StreamT | None:
        """Return the stream to end so that a new one of this holder, which has been counted, gets its place; None: there is none.

        It is the longest idle one of the holder that has most streams among those that have idle ones. If several have as many,
        `holder` comes first, and then about the one that has been idle longest.
        """
        self._collect(now)
        own = self.held(holder)
        while self._by_count:
            most = max(self._by_count)
            if most > own or (most == own and holder not in self._idle):
                loser = next(iter(self._by_count[most]))
            elif holder in self._idle:
                loser = holder
            else:
                return None
            first = self._idle[loser].first()
            assert first is not None, "a queue of idle streams is dropped once it is empty"
            stream, last = first
            if stream.last_moved == last:
                return stream
            self._wake(stream, loser)
            self._in_use.add(stream)
            self._collect(now)
        return None

    def __iter__(self) -> Iterator[StreamT]:
        return iter(self._open)

    def _collect(self, now: float, most: int | None = None) -> None:
        """Move the streams that have been silent for long enough, or `most` of them, to the idle ones of their holders."""
        before = now - self._min_idle_s
        for _ in itertools.repeat(None) if most is None else itertools.repeat(None, most):
            first = self._in_use.first()
            if first is None or first[1] > before:
                return
            stream, last = first
            self._in_use.remove(stream)
            if stream.last_moved != last:
                self._in_use.add(stream)
                continue
            holder = self._open[stream]
            if holder not in self._idle:
                self._idle[holder] = _Queue()
                self._by_count.setdefault(self.held(holder), {})[holder] = None
            self._idle[holder].add(stream)

    def _wake(self, stream: StreamT, holder: HolderT) -> None:
        """Remove a stream from the idle ones."""
        idle = self._idle[holder]
        idle.remove(stream)
        if not idle:
            del self._idle[holder]
            self._unlist(holder)

    def _count(self, holder: HolderT, change: int) -> None:
        is_listed = holder in self._idle
        if is_listed:
            self._unlist(holder)
        held = self.held(holder) + change
        if held:
            self._held[holder] = held
        else:
            del self._held[holder]
        if is_listed:
            self._by_count.setdefault(held, {})[holder] = None

    def _unlist(self, holder: HolderT) -> None:
        count = self.held(holder)
        holders = self._by_count[count]
        del holders[holder]
        if not holders:
            del self._by_count[count]
