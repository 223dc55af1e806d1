"""When a registration makes, publishes, replaces and ends allocations: one table of transitions. Sans-IO.

`RegistrationState.step` gets what is wanted and the time, and returns what to do, in order. Three kinds of allocation are held: the
current one, which the record names; the coming one, which is being made to replace it; and retired ones, which stay until their
streams have ended.

    WAITING ──begin──▶ ACQUIRING ──ready──▶ READY ──change, outdated──────▶ REPLACING ──ready──▶ READY
       ▲                   │ failed, stale    │ lost                            │ failed, stale ──▶ READY
       └───────────────────┴──────────────────┘                                 │ lost ──▶ ACQUIRING

If a retired allocation is what is wanted again, it becomes the current one in any of these states. If nothing is wanted, the states
are LINGERING (the server's record is gone, perhaps by mistake), DRAINING (streams may end) and OVER.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:  # for annotations only: these modules import asyncio
    from turnreg.client.control_connection import TurnError
    from turnreg.registrar.allocation_factory import Server, Wanted
    from turnreg.registrar.config import RegistrarConfig

STEADY_S = 10.0
"""An allocation that is lost sooner counts as another failure in a row: a server may accept and drop us again and again."""

MAX_RETIRED = 8
"""Most retired allocations. Beyond that, the oldest of those with the fewest streams is closed: at least that many replacements
have happened by then, which takes hours with credentials of one hour."""

RETIRED_POLL_S = 1.0
"""Period of checking whether a retired allocation still has streams: there is no event for their end."""


class Held(Protocol):
    """An allocation, as far as this module uses it."""

    server: "Server"
    error: "TurnError | None"
    over: bool
    outdated: bool
    renew_at: float | None
    steady_from: float
    retired_at: float

    @property
    def ready(self) -> bool:
        """Whether peers can connect to it."""
        ...

    @property
    def streams(self) -> int:
        """Number of open streams."""
        ...

    def is_for(self, wanted: "Wanted") -> bool:
        """Tell whether it was made for this server, these credentials and this authority."""
        ...


H = TypeVar("H", bound=Held)


class State(StrEnum):
    """State of a registration."""

    WAITING = "waiting"
    """No allocation; waiting for the next attempt."""
    ACQUIRING = "acquiring"
    READY = "ready"
    REPLACING = "replacing"
    """There is an allocation, and another one is being made."""
    LINGERING = "lingering"
    """The TURN server's record is gone. Allocations stay for a while: the cause may be discovery, not the server."""
    DRAINING = "draining"
    """Nothing is wanted. Allocations stay until their streams have ended."""
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Begin:
    """Start to make an allocation for this, and set `RegistrationState.coming` to it."""

    wanted: "Wanted"


@dataclass(frozen=True, slots=True)
class Publish(Generic[H]):
    """Publish this allocation in the record."""

    held: H


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Withdraw the record, if it is published."""


@dataclass(frozen=True, slots=True)
class Renew(Generic[H]):
    """Give this allocation new credentials, then call `RegistrationState.renewed`."""

    held: H


@dataclass(frozen=True, slots=True)
class Close(Generic[H]):
    """Delete this allocation. It is no longer held."""

    held: H


@dataclass(frozen=True, slots=True)
class Acquired(Generic[H]):
    """This allocation has become the current one."""

    held: H


@dataclass(frozen=True, slots=True)
class Answered(Generic[H]):
    """A TURN server has answered this allocation, even if only with an error."""

    held: H


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt failed or an allocation was lost; the next try is in `retry_s`."""

    error: "TurnError"
    event: str
    retry_s: float


Action: TypeAlias = Begin | Publish[H] | Withdraw | Renew[H] | Close[H] | Acquired[H] | Answered[H] | Failed


class RegistrationState(Generic[H]):
    """The allocations of a registration and the decisions about them. Times are seconds of one monotonic clock."""

    def __init__(self, config: "RegistrarConfig", *, may_keep: Callable[[H], bool]) -> None:
        """Start without an allocation. `may_keep` says whether the address of a retired allocation is still allowed."""
        self.config = config
        self.current: H | None = None
        self.coming: H | None = None
        self.retired: list[H] = []
        self.failures = 0
        """Failures in a row."""
        self.retry_at = 0.0
        self.draining = False
        """Nothing will be wanted any more."""
        self.released = False
        """Other gateways have taken over: the current allocation is retired, not kept in case the server's record returns."""
        self.ended = False
        """Do not wait for streams to end."""
        self._may_keep = may_keep
        self._wanted: Wanted | None = None
        self._renewing = False
        self._gone_at: float | None = None

    @property
    def held(self) -> list[H]:
        """All allocations that are held."""
        return [one for one in (self.current, self.coming, *self.retired) if one is not None]

    @property
    def state(self) -> State:
        """The state after the last step."""
        if self._wanted is not None:
            if self.current is None:
                return State.WAITING if self.coming is None else State.ACQUIRING
            return State.READY if self.coming is None else State.REPLACING
        if self.ended or (self.current is None and not self.retired):
            return State.OVER
        if self.current is None or self.draining or self.released:
            return State.DRAINING
        return State.LINGERING

    def step(self, wanted: "Wanted | None", now: float) -> "list[Action[H]]":
        """Process what has changed, and return what to do, in order."""
        self._wanted = None if self.draining else wanted
        actions = self._reap(now)
        for states, applies, act in _TRANSITIONS:
            if self.state in states and applies(self, now):
                actions += act(self, now)
        if self.state is not State.LINGERING:
            self._gone_at = None
        return actions

    def due(self, now: float, *, published: bool) -> float | None:
        """Return when the next step is due if nothing changes, or None. `published`: the record names the current allocation."""
        dues = []
        state, current = self.state, self.current
        if state is State.WAITING or (state is State.READY and (not published or self._replaces())):
            dues.append(self.retry_at)
        elif state is State.READY and current is not None and current.renew_at is not None and not self._renewing:
            dues.append(max(current.renew_at, self.retry_at))
        if self._gone_at is not None:
            dues.append(self._gone_at + self.config.linger_s)
        overlap_s = self.config.overlap_s
        dues += (max(one.retired_at + overlap_s, now + RETIRED_POLL_S if one.streams else 0.0) for one in self.retired)
        return min(dues, default=None)

    def failed(self, error: "TurnError", now: float, *, steady: bool = False, event: str) -> Failed:
        """Count a failure and set the time of the next attempt. `steady`: the allocation had lasted for at least STEADY_S."""
        self.failures = 1 if steady else self.failures + 1
        retry_s = self.config.retry.pause_s(self.failures, error.reason)
        self.retry_at = now + retry_s
        return Failed(error, event, retry_s)

    def expel(self, now: float) -> "list[Action[H]]":
        """Retire the current allocation and withdraw the record."""
        return [Withdraw(), *self._retire_current(now)]

    def renewed(self) -> None:
        """Record that a `Renew` has finished, successfully or not."""
        self._renewing = False

    def _reap(self, now: float) -> "list[Action[H]]":
        """Drop allocations that have ended, and close retired ones without streams."""
        actions: list[Action[H]] = []
        if (one := self.coming) is not None and one.over:
            self.coming = None
            if one.error is not None:
                if one.error.code is not None:
                    actions.append(Answered(one))
                actions.append(self.failed(one.error, now, event="registration_failed"))
        if (one := self.current) is not None and one.over:
            self.current = None
            actions += [Withdraw(), Answered(one)]
            if one.error is not None:
                steady = now - one.steady_from >= STEADY_S
                actions.append(self.failed(one.error, now, steady=steady, event="allocation_lost"))
        self.retired = [one for one in self.retired if not one.over]
        unused = [one for one in self.retired if now >= one.retired_at + self.config.overlap_s and not one.streams]
        for one in unused:
            self.retired.remove(one)
            actions.append(Close(one))
        return actions

    # Conditions

    def _always(self, _: float) -> bool:
        return True

    def _attempting(self, _: float) -> bool:
        return self.coming is not None

    def _stale(self, _: float) -> bool:
        return self.coming is not None and self._wanted is not None and not self.coming.is_for(self._wanted)

    def _arrived(self, _: float) -> bool:
        return self.coming is not None and self.coming.ready

    def _replaces(self) -> bool:
        """Tell whether a new allocation would replace the current one."""
        if self.current is None or self._wanted is None:
            return True
        return self.current.outdated or not self.current.is_for(self._wanted)

    def _restorable(self, _: float) -> bool:
        return self._replaces() and self._wanted_again() is not None

    def _wanted_again(self) -> H | None:
        wanted = self._wanted
        if wanted is None:
            return None
        fits = (one for one in self.retired if one.ready and not one.outdated and one.is_for(wanted))
        return next((one for one in fits if self._may_keep(one)), None)

    def _server_changed(self, _: float) -> bool:
        return self.current is not None and self._wanted is not None and self.current.server != self._wanted[0]

    def _publishable(self, now: float) -> bool:
        return not self._server_changed(now) and now >= self.retry_at

    def _begins(self, now: float) -> bool:
        return self._replaces() and now >= self.retry_at

    def _renewal_due(self, now: float) -> bool:
        if self.current is None or self.current.renew_at is None or self._renewing or self._replaces():
            return False
        return now >= max(self.current.renew_at, self.retry_at)

    def _given_up(self, _: float) -> bool:
        return self.released and self.current is not None

    # Effects

    def _abandon(self, _: float) -> "list[Action[H]]":
        abandoned, self.coming = self.coming, None
        return [] if abandoned is None else [Close(abandoned)]

    def _promote(self, now: float) -> "list[Action[H]]":
        promoted, self.coming = self.coming, None
        assert promoted is not None
        actions = self._retire_current(now)
        self.current = promoted
        return [*actions, Acquired(promoted)]

    def _restore(self, now: float) -> "list[Action[H]]":
        """Make a retired allocation the current one, so that undoing a change needs no new allocation."""
        restored = self._wanted_again()
        assert restored is not None
        self.retired.remove(restored)
        actions = [*self._retire_current(now), *self._abandon(now)]
        self.current = restored
        return actions

    def _retire_current(self, now: float) -> "list[Action[H]]":
        if self.current is None:
            return []
        self.current.retired_at = now
        self.retired.append(self.current)
        self.current = None
        if len(self.retired) <= MAX_RETIRED:
            return []
        least = min(self.retired[:-1], key=lambda one: one.streams)
        self.retired.remove(least)
        return [Close(least)]

    def _withdraw(self, _: float) -> "list[Action[H]]":
        return [Withdraw()]

    def _publish(self, _: float) -> "list[Action[H]]":
        return [] if self.current is None else [Publish(self.current)]

    def _begin(self, _: float) -> "list[Action[H]]":
        return [] if self._wanted is None else [Begin(self._wanted)]

    def _renew(self, _: float) -> "list[Action[H]]":
        if self.current is None:
            return []
        self._renewing = True
        return [Renew(self.current)]

    def _linger(self, now: float) -> "list[Action[H]]":
        self._gone_at = now if self._gone_at is None else self._gone_at
        self.ended = now >= self._gone_at + self.config.linger_s
        return []


_WANTED = frozenset({State.WAITING, State.ACQUIRING, State.READY, State.REPLACING})
_ATTEMPTING = frozenset({State.ACQUIRING, State.REPLACING})
_RESTING = frozenset({State.WAITING, State.READY})
_HOLDING = frozenset({State.READY, State.REPLACING})
_UNWANTED = frozenset({State.LINGERING, State.DRAINING, State.OVER})

_Condition: TypeAlias = Callable[[RegistrationState[Any], float], bool]
_Effect: TypeAlias = Callable[[RegistrationState[Any], float], list[Any]]

_TRANSITIONS: tuple[tuple[frozenset[State], _Condition, _Effect], ...] = (
    (_ATTEMPTING, RegistrationState._stale, RegistrationState._abandon),
    (_ATTEMPTING, RegistrationState._arrived, RegistrationState._promote),
    (_WANTED, RegistrationState._restorable, RegistrationState._restore),
    (
        _HOLDING,
        RegistrationState._server_changed,
        RegistrationState._withdraw,
    ),  # relays take the address from its record
    (_HOLDING, RegistrationState._publishable, RegistrationState._publish),
    (_RESTING, RegistrationState._begins, RegistrationState._begin),
    (_RESTING, RegistrationState._renewal_due, RegistrationState._renew),
    (_UNWANTED, RegistrationState._always, RegistrationState._withdraw),
    (_UNWANTED, RegistrationState._attempting, RegistrationState._abandon),
    (frozenset({State.DRAINING}), RegistrationState._given_up, RegistrationState._retire_current),
    (frozenset({State.LINGERING}), RegistrationState._always, RegistrationState._linger),
)
"""States, condition, effect. Each row is tried once per step, in this order, in the state after the rows before it."""
