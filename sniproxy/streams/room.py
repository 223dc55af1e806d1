"""Room for one more stream where all are taken and silence has no limit: an idle stream is ended for it (`idle_streams`)."""

import asyncio
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from sniproxy.streams.idle_streams import MIN_IDLE_S, IdleStreams
from sniproxy.streams.stream_log import StreamLog, StreamRecord

MAX_WAITING: Final = 256
"""Connections beyond the limit of streams that may send a ClientHello, so that no stream is ended for a health check or a scan."""

MAX_WAITING_EACH: Final = 32
"""The same for one holder, so that a silent one keeps no others out."""

HolderT = TypeVar("HolderT", bound=Hashable)


class Room(Generic[HolderT]):
    """The streams of one role by holder: by client at a relay, by network at a gateway."""

    def __init__(self, ledger: StreamLog, *, min_idle_s: float = MIN_IDLE_S) -> None:
        """Prepare for the streams of `ledger`. `min_idle_s`: how long a stream must have been silent to be ended for another."""
        self._ledger = ledger
        self._loop = asyncio.get_running_loop()
        self._streams: IdleStreams[HolderT, StreamRecord] = IdleStreams(min_idle_s)
        self._waiting: Counter[HolderT] = Counter()
        self._ending = 0

    @property
    def taken(self) -> int:
        """How many streams there are, without those that were ended for others and are about to go."""
        return len(self._ledger) - self._ending

    def held(self, holder: HolderT) -> int:
        """Return how many streams a holder has."""
        return self._streams.held(holder)

    def enter(self, holder: HolderT) -> None:
        """Count a stream. Call `leave` at its end."""
        self._streams.enter(holder)

    def leave(self, holder: HolderT) -> None:
        """Note the end of a stream that was counted."""
        self._streams.leave(holder)

    @contextmanager
    def carrying(self, record: StreamRecord, holder: HolderT) -> Iterator[None]:
        """Let the stream be ended for another one while the block runs. Its record has its directions."""
        self._streams.open(record, holder)
        try:
            yield
        finally:
            self._streams.close(record)
            if record.is_evicted:
                self._ending -= 1

    @contextmanager
    def waiting(self, holder: HolderT) -> Iterator[bool]:
        """Let a connection beyond the limit wait for its ClientHello. Yields whether it may: there is a stream to end for it."""
        may = (
            self._waiting.total() < MAX_WAITING
            and self._waiting[holder] < MAX_WAITING_EACH
            and self._streams.find(holder, self._loop.time()) is not None
        )
        self._waiting[holder] += 1
        try:
            yield may
        finally:
            self._waiting[holder] -= 1
            if not self._waiting[holder]:
                del self._waiting[holder]

    def make(self, holder: HolderT) -> bool:
        """End a stream for one of this holder, which was counted. Returns whether there was one to end."""
        found = self._streams.find(holder, self._loop.time())
        if found is None:
            return False
        silent_s = self._loop.time() - found.last_moved
        self._streams.close(found)
        self._ending += 1
        found.evict(f"silent for {silent_s:.0f} s, ended to make room: its client or network holds most streams")
        return True
