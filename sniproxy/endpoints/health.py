"""Which endpoints answer, as far as this process has seen: in which order a stream tries those of its service.

An endpoint that fails is left out for a while that doubles with each failure in a row, and is tried last in the meantime, never
not at all: where all fail the error may be ours. When the while is over, one stream tries it; the others go on without it until
that one has found out. Behind the endpoint whose turn it is come those that have answered before, so that a stream that meets a
dead one waits once (`sniproxy.engine.staggered_connect`), not once for each dead one.

Sans-IO: time comes in.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from discovery.pacing.backoff import Backoff

Endpoint: TypeAlias = tuple[str, int]
"""An IP literal and a port."""

EJECTION: Final = Backoff(2.0, 60.0)
"""How long an endpoint is left out: from a restart's length to what discovery needs at most to drop a lost host."""

TRIAL_S: Final = 1.0
"""How long others leave an endpoint to the stream that tries whether it is back: several times what a connect takes."""

CHECKS_MISSED: Final = 3
"""How many intervals a failed check counts for, should no further check come."""

MAX_TRACKED: Final = 16_384
"""Endpoints that are remembered; those used longest ago are forgotten first. Some 300 bytes each."""


@dataclass(slots=True)
class _State:
    failures: int = 0
    """In a row."""
    out_until: float = 0.0
    on_trial: bool = False
    failed_check: bool = False
    """The last check failed: a stream that connects says nothing against it, for the check may ask for more."""
    answered: bool = False
    """The last time it was asked."""
    why: str = ""
    """It failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """An endpoint that failed and is left out now."""

    failures: int
    """In a row."""
    seconds: float


class EndpointHealth:
    """What one process knows of the endpoints that it dials."""

    def __init__(
        self, clock: Callable[[], float], *, ejection: Backoff = EJECTION, max_tracked: int = MAX_TRACKED
    ) -> None:
        """Start with every endpoint counted as healthy.

        Args:
            clock: gives seconds that never go back.
        """
        self._clock = clock
        self._ejection = ejection
        self._max_tracked = max_tracked
        self._states: OrderedDict[Endpoint, _State] = OrderedDict()
        self._turns: OrderedDict[str, int] = OrderedDict()
        self._failing = 0

    def order(self, service: str, endpoints: Sequence[Endpoint]) -> Iterator[Endpoint]:
        """Yield a service's endpoints in the order in which a stream tries them; each of the healthy ones is first in turn.

        What comes behind the first is worked out only for streams that need it.
        """
        healthy = endpoints
        if self._failing:
            now = self._clock()
            healthy = [endpoint for endpoint in endpoints if not self._is_out(endpoint, now)]
        if healthy:
            turn = self._next_turn(service, len(healthy))
            first = healthy[turn]
            state = self._states.get(first)
            if state is not None and state.failures:
                state.on_trial, state.out_until = True, self._clock() + TRIAL_S
            yield first
            yield from sorted((*healthy[turn + 1 :], *healthy[:turn]), key=lambda other: not self._has_answered(other))
        if len(healthy) < len(endpoints):
            out = set(endpoints).difference(healthy)
            yield from sorted(out, key=self._out_until)

    def _next_turn(self, service: str, count: int) -> int:
        turn = self._turns.pop(service, -1) + 1
        self._turns[service] = turn
        if len(self._turns) > self._max_tracked:
            self._turns.popitem(last=False)
        return turn % count

    def _is_out(self, endpoint: Endpoint, now: float) -> bool:
        return now < self._out_until(endpoint)

    def _out_until(self, endpoint: Endpoint) -> float:
        state = self._states.get(endpoint)
        return 0.0 if state is None else state.out_until

    def _has_answered(self, endpoint: Endpoint) -> bool:
        state = self._states.get(endpoint)
        return state is not None and state.answered and not state.failures

    def succeeded(self, endpoint: Endpoint, *, by_check: bool = False) -> bool:
        """Note that an endpoint answered; True if it had been left out."""
        state = self._know(endpoint)
        if state.failed_check and not by_check and self._clock() < state.out_until:
            return False
        state.failed_check = False
        was_out = state.failures > 0
        self._failing -= was_out
        state.failures, state.out_until, state.on_trial, state.answered, state.why = 0, 0.0, False, True, ""
        return was_out

    def failed(self, endpoint: Endpoint, why: str, *, next_check_s: float | None = None) -> LeftOut | None:
        """Note that an endpoint did not answer; None if it was left out already.

        Args:
            next_check_s: it was a check that found it, and there will be another one after so long.
        """
        now = self._clock()
        state = self._know(endpoint)
        if now < state.out_until and not state.on_trial and next_check_s is None:
            return None  # a stream that had begun before, or that had no other endpoint
        was_out = state.failures > 0 and now < state.out_until and not state.on_trial
        self._failing += not state.failures
        state.failures += 1
        seconds = self._ejection.bound_s(state.failures)
        if next_check_s is not None:
            state.failed_check = True
            seconds = max(seconds, CHECKS_MISSED * next_check_s)
        state.out_until, state.on_trial, state.answered, state.why = now + seconds, False, False, why
        return None if was_out else LeftOut(failures=state.failures, seconds=seconds)

    def is_doubtful(self, endpoint: Endpoint) -> bool:
        """Return whether an endpoint failed the last time."""
        state = self._states.get(endpoint)
        return state is not None and state.failures > 0

    @property
    def left_out(self) -> int:
        """How many endpoints are left out now."""
        now = self._clock()
        return sum(state.failures > 0 and now < state.out_until for state in self._states.values())

    def status(self, limit: int) -> Iterable[dict[str, Any]]:
        """Describe up to `limit` endpoints that have failed, those that failed most often first."""
        now = self._clock()
        failing = ((endpoint, state) for endpoint, state in self._states.items() if state.failures)
        for (address, port), state in itertools.islice(sorted(failing, key=lambda item: -item[1].failures), limit):
            yield {
                "endpoint": f"[{address}]:{port}" if ":" in address else f"{address}:{port}",
                "failures": state.failures,
                "left_out_s": max(0.0, round(state.out_until - now, 1)),
                "why": state.why,
            }

    def _know(self, endpoint: Endpoint) -> _State:
        state = self._states.get(endpoint)
        if state is None:
            state = self._states[endpoint] = _State()
            if len(self._states) > self._max_tracked:
                _, forgotten = self._states.popitem(last=False)
                self._failing -= forgotten.failures > 0
        else:
            self._states.move_to_end(endpoint)
        return state
