"""The decisions of a registration, without a server, a socket or a clock."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.pacing.backoff import Backoff
from turnreg.client.control_connection import Credentials, TurnError, TurnReason
from turnreg.registrar.allocation_factory import Server, Wanted
from turnreg.registrar.config import RegistrarConfig, Retry
from turnreg.registrar.registration_state import (
    MAX_RETIRED,
    RETIRED_POLL_S,
    STEADY_S,
    Acquired,
    Answered,
    Begin,
    Close,
    Failed,
    Publish,
    RegistrationState,
    Renew,
    State,
    Withdraw,
)

SERVER = Server(url="turn:192.0.2.1", family=1, port_min=1024, port_max=65535)
MOVED = Server(url="turn:192.0.2.2", family=1, port_min=1024, port_max=65535)
LOGIN = Credentials(username="u", password="p")
OTHER = Credentials(username="v", password="q")
WANTED: Wanted = (SERVER, LOGIN, None)
CHANGED: Wanted = (SERVER, OTHER, None)

PAUSE_S = 4.0
_EXACT = Backoff(PAUSE_S, PAUSE_S, jitter=0.0)
CONFIG = RegistrarConfig(
    network="b",
    gateway="gw-1",
    turn={"a": LOGIN},
    overlap_s=10.0,
    linger_s=60.0,
    retry=Retry(unreachable=_EXACT, refused=_EXACT),
)


@dataclass(eq=False)
class Fake:
    """An allocation whose state the test sets."""

    wanted: Wanted = WANTED
    ready: bool = False
    over: bool = False
    outdated: bool = False
    streams: int = 0
    error: TurnError | None = None
    renew_at: float | None = None
    steady_from: float = 0.0
    retired_at: float = 0.0

    @property
    def server(self) -> Server:
        return self.wanted[0]

    @server.setter
    def server(self, _: Server) -> None:
        raise AttributeError

    def is_for(self, wanted: Wanted) -> bool:
        return self.wanted == wanted

    def end(self, reason: TurnReason | None = None, code: int | None = None) -> None:
        self.over, self.ready = True, False
        self.error = None if reason is None else TurnError(reason, "as told", code=code)


@dataclass
class Played:
    """A registration whose actions are carried out by the test."""

    config: RegistrarConfig = CONFIG
    now: float = 1000.0
    wanted: Wanted | None = WANTED
    keeps: bool = True
    published: Fake | None = None
    last: list[Any] = field(default_factory=list)
    made: list[Fake] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state: RegistrationState[Fake] = RegistrationState(self.config, may_keep=lambda _: self.keeps)

    def step(self, after_s: float = 0.0) -> list[str]:
        """Take a step, carry out its actions, and return their names."""
        self.now += after_s
        self.last = self.state.step(self.wanted, self.now)
        for action in self.last:
            match action:
                case Begin(wanted=wanted):
                    self.state.coming = Fake(wanted)
                    self.made.append(self.state.coming)
                case Publish(held=held):
                    self.published = held
                case Withdraw():
                    self.published = None
                case Close(held=held):
                    held.end()
        return [type(action).__name__ for action in self.last]

    def due_s(self) -> float | None:
        due = self.state.due(self.now, published=self.published is not None)
        return None if due is None else due - self.now

    def ready(self, *, renew_at: float | None = None) -> Fake:
        """Step until there is a published current allocation."""
        assert self.step() == ["Begin"]
        coming = self.coming
        coming.ready, coming.steady_from, coming.renew_at = True, self.now, renew_at
        assert self.step() == ["Acquired", "Publish"]
        assert (self.state.state, self.published) == (State.READY, coming)
        return coming

    @property
    def coming(self) -> Fake:
        assert self.state.coming is not None
        return self.state.coming


def test_the_way_to_an_allocation() -> None:
    played = Played()
    assert played.step() == ["Begin"]
    assert played.state.state is State.ACQUIRING
    assert played.due_s() is None  # it will tell
    assert played.step() == []
    played.coming.ready = True
    assert played.step() == ["Acquired", "Publish"]
    assert played.due_s() is None


def test_a_failed_attempt_is_tried_again_after_a_pause() -> None:
    played = Played()
    played.step()
    played.coming.end(TurnReason.TIMEOUT)
    assert played.step() == ["Failed"]
    assert played.last == [Failed(played.last[0].error, "registration_failed", PAUSE_S)]
    assert (played.state.state, played.state.failures) == (State.WAITING, 1)
    assert played.due_s() == PAUSE_S
    assert played.step(PAUSE_S / 2) == []
    assert played.step(PAUSE_S / 2) == ["Begin"]


def test_a_server_that_refuses_has_answered() -> None:
    played = Played()
    played.step()
    coming = played.coming
    coming.end(TurnReason.QUOTA, code=486)
    assert played.step() == ["Answered", "Failed"]
    assert played.last[0] == Answered(coming)


@pytest.mark.parametrize(("lived_s", "failures"), [(STEADY_S - 1, 4), (STEADY_S, 1)])
def test_a_loss_counts_as_a_repeated_failure_only_if_it_came_early(lived_s: float, failures: int) -> None:
    played = Played()
    current = played.ready()
    played.state.failures = 3
    current.end(TurnReason.CONNECTION_LOST)
    assert played.step(lived_s) == ["Withdraw", "Answered", "Failed"]
    assert played.last[2].event == "allocation_lost"
    assert played.state.failures == failures
    assert played.published is None


def test_new_credentials_make_a_new_allocation_first() -> None:
    played = Played()
    old = played.ready()
    played.wanted = CHANGED
    assert played.step() == ["Publish", "Begin"]
    assert (played.state.state, played.published) == (State.REPLACING, old)
    played.coming.ready = True
    assert played.step() == ["Acquired", "Publish"]
    new = played.state.current
    assert new is not None
    assert played.last[0] == Acquired(new)
    assert played.published is new
    assert played.state.retired == [old]


def test_a_coming_allocation_for_outdated_wishes_is_closed() -> None:
    played = Played()
    played.step()
    stale = played.coming
    played.wanted = CHANGED
    assert played.step() == ["Close", "Begin"]
    assert stale.over
    assert played.coming.wanted == CHANGED


def test_the_old_port_is_withdrawn_when_the_record_names_another_server() -> None:
    played = Played()
    played.ready()
    played.wanted = (MOVED, LOGIN, None)
    assert played.step() == ["Withdraw", "Begin"]


@pytest.mark.parametrize("on_its_way", [False, True])
def test_a_change_that_is_undone_takes_the_retired_one_back(on_its_way: bool) -> None:
    played = Played()
    old = played.ready()
    old.streams = 1
    played.wanted = CHANGED
    played.step()
    played.coming.ready = True
    played.step()
    new = played.state.current
    assert new is not None
    if on_its_way:
        new.outdated = True
        played.step()
        assert played.state.state is State.REPLACING
    attempt = played.state.coming
    played.wanted = WANTED
    if attempt is not None:
        attempt.wanted = WANTED  # not stale: it is for what is wanted, and yet too late
    assert played.step() == (["Close", "Publish"] if on_its_way else ["Publish"])
    assert (played.state.state, played.published) == (State.READY, old)
    assert played.state.retired == [new]


@pytest.mark.parametrize("spoilt", ["outdated", "over", "refused"])
def test_an_unusable_retired_allocation_is_not_taken_back(spoilt: str) -> None:
    played = Played()
    old = played.ready()
    old.streams = 1
    played.wanted = CHANGED
    played.step()
    played.coming.ready = True
    played.step()
    old.outdated = spoilt == "outdated"
    if spoilt == "over":
        old.end()
    played.keeps = spoilt != "refused"
    played.wanted = WANTED
    assert played.step() == ["Publish", "Begin"]


def test_credentials_are_renewed_in_time_and_one_at_a_time() -> None:
    played = Played()
    current = played.ready(renew_at=1100.0)
    assert played.due_s() == 100.0
    assert played.step(99.0) == ["Publish"]
    assert played.step(1.0) == ["Publish", "Renew"]
    assert played.last[1] == Renew(current)
    assert played.due_s() is None
    assert played.step(50.0) == ["Publish"]
    played.state.renewed()
    current.renew_at = 2000.0
    assert played.due_s() == 850.0


def test_a_renewal_that_failed_waits_for_the_next_try() -> None:
    played = Played()
    played.ready(renew_at=1001.0)
    assert played.step(1.0) == ["Publish", "Renew"]
    played.state.failed(TurnError(TurnReason.TIMEOUT, ""), played.now, event="renewal_failed")
    played.state.renewed()
    assert played.step() == []
    assert played.due_s() == PAUSE_S
    assert played.step(PAUSE_S) == ["Publish", "Renew"]


def test_one_that_cannot_have_other_credentials_is_replaced() -> None:
    played = Played()
    played.ready().outdated = True
    assert played.step() == ["Publish", "Begin"]
    assert played.state.state is State.REPLACING


def test_a_retired_one_goes_when_relays_have_heard_and_its_streams_have_ended() -> None:
    played = Played()
    old = played.ready()
    old.streams = 1
    played.wanted = CHANGED
    played.step()
    played.coming.ready = True
    played.step()
    assert played.due_s() == CONFIG.overlap_s
    assert played.step(CONFIG.overlap_s) == ["Publish"]
    assert played.due_s() == RETIRED_POLL_S
    old.streams = 0
    assert played.step(RETIRED_POLL_S) == ["Close", "Publish"]
    assert played.state.retired == []


def test_of_too_many_retired_ones_the_one_with_the_fewest_streams_goes() -> None:
    played = Played()
    played.ready()
    olds = []
    for number in range(MAX_RETIRED + 1):
        assert played.state.current is not None
        played.state.current.streams = 2 + abs(number - 3)
        olds.append(played.state.current)
        played.wanted = (SERVER, Credentials(username=str(number), password="p"), None)
        played.step()
        played.coming.ready = True
        names = played.step()
    assert names == ["Close", "Acquired", "Publish"]
    assert olds[3].over
    assert len(played.state.retired) == MAX_RETIRED


def test_an_allocation_outlives_its_servers_record_for_a_while() -> None:
    played = Played()
    current = played.ready()
    played.wanted = None
    assert played.step() == ["Withdraw"]
    assert (played.state.state, played.due_s()) == (State.LINGERING, CONFIG.linger_s)
    played.wanted = WANTED
    assert played.step(CONFIG.linger_s / 2) == ["Publish"]
    played.wanted = None
    assert played.step() == ["Withdraw"]
    assert played.due_s() == CONFIG.linger_s  # from now
    played.step(CONFIG.linger_s)
    assert played.state.state is State.OVER
    assert played.state.held == [current]  # to be closed


def test_after_others_took_over_the_allocation_ends_with_its_streams() -> None:
    played = Played()
    current = played.ready()
    current.streams = 1
    played.wanted, played.state.released = None, True
    assert played.step() == ["Withdraw"]
    assert (played.state.state, played.state.retired) == (State.DRAINING, [current])
    assert played.step(CONFIG.overlap_s) == ["Withdraw"]
    current.streams = 0
    assert played.step() == ["Close", "Withdraw"]
    assert played.state.state is State.OVER


def test_lingering_is_reset_when_the_record_returns() -> None:
    played = Played()
    played.ready().streams = 1
    played.wanted = None
    played.step()
    played.state.released = True
    played.step(CONFIG.linger_s - 1)
    played.step(CONFIG.overlap_s)
    assert played.due_s() == RETIRED_POLL_S


def test_draining_keeps_allocations_until_the_end() -> None:
    played = Played()
    current = played.ready()
    played.state.draining = True
    assert played.step() == ["Withdraw"]
    assert (played.state.state, played.due_s()) == (State.DRAINING, None)
    assert played.state.held == [current]
    played.state.ended = True
    played.step()
    assert played.state.state is State.OVER


def test_draining_closes_the_coming_allocation() -> None:
    played = Played()
    played.step()
    coming = played.coming
    played.state.draining = True
    assert played.step() == ["Withdraw", "Close"]
    assert coming.over
    assert played.state.state is State.OVER


def test_one_on_a_server_that_is_forbidden_now_is_retired_at_once() -> None:
    played = Played()
    current = played.ready()
    assert played.state.expel(played.now) == [Withdraw()]
    assert played.state.retired == [current]
    played.keeps = False
    assert played.step() == ["Begin"]


EVENTS = ("ready", "lost", "refused", "outdated", "streams", "no streams", "want", "want other", "want none", "release")


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 7), st.floats(0, 100)), max_size=40))
def test_no_allocation_is_ever_leaked(events: list[tuple[str, int, float]]) -> None:
    """Every allocation is held or has ended, the record names the current one or nothing, and the end is reached."""
    played = Played()
    wishes: dict[str, Wanted | None] = {"want": WANTED, "want other": CHANGED, "want none": None, "release": None}
    for event, which, after_s in events:
        held = played.state.held
        one = held[which % len(held)] if held else Fake()
        match event:
            case "ready":
                one.ready = not one.over
            case "lost" | "refused":
                one.end(TurnReason.CONNECTION_LOST if event == "lost" else TurnReason.QUOTA)
            case "outdated":
                one.outdated = True
            case "streams" | "no streams":
                one.streams = int(event == "streams")
            case _:
                played.wanted, played.state.released = wishes[event], event == "release"
        played.step(after_s)
        assert all(made.over or made in played.state.held for made in played.made)
        assert not any(one.over for one in played.state.held)
        assert played.published in (None, played.state.current)
        if played.state.state is State.OVER:
            return
    played.state.draining = played.state.ended = True
    played.step()
    assert played.state.state is State.OVER
    assert played.published is None
