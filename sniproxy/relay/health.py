"""Chooses among several ways to a network: healthy ones first, then near ones, then the less busy of two.

The allocations and gateways of a network are interchangeable, so a relay distributes its streams over them by what it observes
itself. Of two random ones it takes the one with fewer of its own streams, relative to the weight ("the power of two choices",
Mitzenmacher 2001: nearly as even as comparing all, without all relays choosing the same one). A way that keeps failing is left out
for a growing time. Meanwhile it is tried last, but still tried: if all ways fail, the cause may be on our side.

Sans-IO: the clock is passed in.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from discovery.pacing.backoff import Backoff
from sniproxy.transport.base import Candidate, CandidateKey

FAILURES: Final = 3
"""Failures in a row before a way is left out. A lost packet or a restart causes one or two."""
FIRST_EJECTION_S: Final = 5.0
MAX_EJECTION_S: Final = 300.0
"""The first time is doubled with each further failure, up to this. By then discovery has long removed what is really gone."""
_EJECTION: Final = Backoff(FIRST_EJECTION_S, MAX_EJECTION_S)
MAX_TRACKED: Final = 4096
"""Ways that are remembered, not counting those in use. The least recently used are forgotten first."""


@dataclass(slots=True)
class _Way:
    streams: int = 0
    failures: int = 0
    """In a row."""
    out_until: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The consequence of a failure."""

    failures: int
    """Failures in a row."""
    seconds: float
    """How long the way is left out. 0: it is not."""


class UpstreamHealth:
    """What one relay knows about its ways to other networks."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        is_ready: Callable[[Candidate], bool] = lambda _way: False,
        rng: random.Random | None = None,
        max_tracked: int = MAX_TRACKED,
    ) -> None:
        """Start with every way counted as healthy.

        Args:
            clock: returns seconds that never go back.
            is_ready: whether there is a warm connection, which decides between two ways that are equally busy.
            rng: for the random choices.
            max_tracked: ways to remember, not counting those in use.
        """
        self._clock = clock
        self._is_ready = is_ready
        self._random = rng or random.Random()
        self._max_tracked = max_tracked
        self._ways: OrderedDict[CandidateKey, _Way] = OrderedDict()

    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Sort the ways to one network into the order in which a stream tries them.

        Ways that are left out come last. The others are sorted by the rank of their transport, and near ones come before far ones.
        """
        if len(candidates) < 2:
            return list(candidates)
        now = self._clock()
        # A greater weight makes an early place more likely: weighted random sampling (Efraimidis and Spirakis 2006).
        drawn = sorted(candidates, key=lambda way: self._random.expovariate(way.weight))
        classes = {way: (self._out(way, now), way.traits.rank, not way.near) for way in drawn}
        drawn.sort(key=classes.__getitem__)
        if classes[drawn[0]] == classes[drawn[1]] and self._busy(drawn[1]) < self._busy(drawn[0]):
            drawn[:2] = drawn[1], drawn[0]
        return drawn

    @contextmanager
    def carrying(self, way: Candidate) -> Iterator[None]:
        """Count a stream on this way while the block runs."""
        known = self._know(way)
        known.streams += 1
        try:
            yield
        finally:
            known.streams -= 1

    def succeeded(self, way: Candidate) -> None:
        """Note that a gateway answered on this way."""
        known = self._ways.get(way.key)
        if known is not None:
            known.failures, known.out_until = 0, 0.0

    def failed(self, way: Candidate) -> Failed | None:
        """Note that no gateway answered on this way. Returns None if the way is already left out."""
        now = self._clock()
        known = self._know(way)
        if now < known.out_until:
            return None  # from a stream that began earlier, or that had no other way
        known.failures += 1
        if known.failures < FAILURES:
            return Failed(failures=known.failures, seconds=0)
        seconds = _EJECTION.bound_s(known.failures - FAILURES + 1)
        known.out_until = now + seconds
        return Failed(failures=known.failures, seconds=seconds)

    @property
    def left_out(self) -> int:
        """How many ways are left out now."""
        now = self._clock()
        return sum(now < way.out_until for way in self._ways.values())

    def _out(self, way: Candidate, now: float) -> bool:
        known = self._ways.get(way.key)
        return known is not None and now < known.out_until

    def _busy(self, way: Candidate) -> tuple[float, bool]:
        known = self._ways.get(way.key)
        return 0.0 if known is None else known.streams / way.weight, not self._is_ready(way)

    def _know(self, way: Candidate) -> _Way:
        key = way.key
        known = self._ways.setdefault(key, _Way())
        self._ways.move_to_end(key)
        if len(self._ways) > self._max_tracked:
            idle = next((key for key, way in self._ways.items() if not way.streams and way is not known), None)
            if idle is not None:
                del self._ways[idle]
        return known
