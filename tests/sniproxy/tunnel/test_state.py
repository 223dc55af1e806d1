"""The order of capsules: every allowed one, every wrong one, and both sides always agree."""

import itertools
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.tunnel import state
from sniproxy.tunnel.capsules import CapsuleError, CapsuleType
from sniproxy.tunnel.state import ERRORS, TRANSITIONS, Side, StreamState
from tests.sniproxy.tunnel.state_diagram import diagram

T = CapsuleType
R, G = Side.RELAY, Side.GATEWAY
Step = tuple[Side, CapsuleType]

OPENING: list[Step] = [(R, T.DATA), (G, T.READY), (G, T.OPENED)]
WHOLE: list[Step] = [
    *OPENING,
    (R, T.DATA),
    (G, T.DATA),
    (G, T.RECEIVED),
    (R, T.FINAL_DATA),
    (G, T.FINISHED),
    (G, T.FINAL_DATA),
    (R, T.FINISHED),
    (R, T.DONE),
]


def other(side: Side) -> Side:
    return G if side is R else R


class Pair:
    """Both sides' state of one stream."""

    def __init__(self) -> None:
        self.ends = {R: StreamState(R), G: StreamState(G)}

    def say(self, side: Side, kind: CapsuleType) -> None:
        """One side sends a capsule, the other receives it; CapsuleError if it is not allowed."""
        self.ends[other(side)].received(kind)
        self.ends[side].sent(kind)

    def say_all(self, steps: list[Step]) -> None:
        for side, kind in steps:
            self.say(side, kind)


def test_a_whole_stream() -> None:
    pair = Pair()
    pair.say_all(WHOLE[:-1])
    assert pair.ends[R].complete
    assert pair.ends[G].complete
    assert not pair.ends[G].done
    pair.say(*WHOLE[-1])
    assert pair.ends[G].done


@pytest.mark.parametrize(
    "order",
    [
        [(G, T.FINAL_DATA), (R, T.FINISHED), (R, T.FINAL_DATA), (G, T.FINISHED)],
        [(R, T.FINAL_DATA), (G, T.FINAL_DATA), (R, T.FINISHED), (G, T.FINISHED)],
        [(G, T.FINAL_DATA), (R, T.FINAL_DATA), (G, T.FINISHED), (R, T.FINISHED)],
        [(G, T.FINAL_DATA), (R, T.DATA), (R, T.FINISHED), (R, T.FINAL_DATA), (G, T.FINISHED)],
    ],
)
def test_directions_end_in_any_order(order: list[Step]) -> None:
    pair = Pair()
    pair.say_all([*OPENING, *order, (R, T.DONE)])
    assert all(ends.complete and ends.done for ends in pair.ends.values())


def test_a_refusal_ends_it() -> None:
    for before in ([], [(G, T.READY)], [(R, T.DATA), (G, T.READY)]):
        pair = Pair()
        pair.say_all([*before, (G, T.REFUSED)])
        for step in [(R, T.DATA), (G, T.DATA), (G, T.READY), (G, T.OPENED), (G, T.REFUSED), (R, T.DONE)]:
            with pytest.raises(CapsuleError, match="after REFUSED"):
                pair.say(*step)


def test_a_second_connection_takes_over_the_upload() -> None:
    pair = Pair()
    pair.say_all([*OPENING, (R, T.CONTINUED)])
    with pytest.raises(CapsuleError, match="after CONTINUED"):
        pair.say(R, T.DATA)
    with pytest.raises(CapsuleError, match="after CONTINUED"):
        pair.say(R, T.FINAL_DATA)
    with pytest.raises(CapsuleError, match="after CONTINUED"):
        pair.say(G, T.FINISHED)
    for ends in pair.ends.values():
        ends.end_elsewhere()
    pair.say_all([(G, T.FINISHED), (G, T.FINAL_DATA), (R, T.FINISHED), (R, T.DONE)])


FINAL_UP, FINAL_DOWN = (R, T.FINAL_DATA), (G, T.FINAL_DATA)

WRONG = [
    ("READY twice", [(G, T.READY)], (G, T.READY)),
    ("OPENED before READY", [], (G, T.OPENED)),
    ("OPENED twice", OPENING, (G, T.OPENED)),
    ("REFUSED after OPENED", OPENING, (G, T.REFUSED)),
    ("an answer before OPENED", [(G, T.READY)], (G, T.DATA)),
    ("an end before OPENED", [(G, T.READY)], FINAL_DOWN),
    ("DATA after the end, up", [*OPENING, FINAL_UP], (R, T.DATA)),
    ("DATA after the end, down", [*OPENING, FINAL_DOWN], (G, T.DATA)),
    ("two ends, up", [*OPENING, FINAL_UP], FINAL_UP),
    ("two ends, down", [*OPENING, FINAL_DOWN], FINAL_DOWN),
    ("FINISHED without an end, up", OPENING, (R, T.FINISHED)),
    ("FINISHED without an end, down", OPENING, (G, T.FINISHED)),
    ("FINISHED of the own end", [*OPENING, FINAL_UP], (R, T.FINISHED)),
    ("FINISHED twice", [*OPENING, FINAL_UP, (G, T.FINISHED)], (G, T.FINISHED)),
    ("DONE at the start", [], (R, T.DONE)),
    ("DONE with one half", [*OPENING, FINAL_UP, (G, T.FINISHED)], (R, T.DONE)),
    ("DONE by the gateway", WHOLE[:-1], (G, T.DONE)),
    ("CONTINUED before OPENED", [(R, T.DATA), (G, T.READY)], (R, T.CONTINUED)),
    ("CONTINUED twice", [*OPENING, (R, T.CONTINUED)], (R, T.CONTINUED)),
    ("CONTINUED after the end", [*OPENING, FINAL_UP], (R, T.CONTINUED)),
    ("CONTINUED by the gateway", OPENING, (G, T.CONTINUED)),
    ("RECEIVED before OPENED", [(G, T.READY)], (G, T.RECEIVED)),
    ("RECEIVED by the relay", OPENING, (R, T.RECEIVED)),
    ("READY by the relay", [], (R, T.READY)),
    ("OPENED by the relay", [(G, T.READY)], (R, T.OPENED)),
    ("REFUSED by the relay", [], (R, T.REFUSED)),
    *[
        (f"{kind.name} on a client's stream", OPENING, (side, kind))
        for kind in (T.PING, T.PONG, T.OPEN)
        for side in Side
    ],
]


@pytest.mark.parametrize(("before", "wrong"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_orders(before: list[Step], wrong: Step) -> None:
    """A wrong capsule from the peer is the peer's error; a wrong one from us is a bug."""
    pair = Pair()
    pair.say_all(before)
    side, kind = wrong
    with pytest.raises(CapsuleError, match=kind.name):
        pair.ends[other(side)].received(kind)
    with pytest.raises(AssertionError, match=f"{side.value} sends {kind.name}"):
        pair.ends[side].sent(kind)


@given(st.lists(st.tuples(st.sampled_from(Side), st.sampled_from(CapsuleType)), max_size=40))
def test_what_one_side_may_say_the_other_takes(steps: list[Step]) -> None:
    """Both sides always agree: what the sender's rules allow is no error at the receiver, and vice versa."""
    pair = Pair()
    for side, kind in steps:
        try:
            pair.ends[side].sent(kind)
        except AssertionError:
            with pytest.raises(CapsuleError):
                pair.ends[other(side)].received(kind)
            return
        pair.ends[other(side)].received(kind)
        assert pair.ends[R].complete == pair.ends[G].complete
        assert pair.ends[R].refused == pair.ends[G].refused


@given(st.sampled_from(Side), st.lists(st.sampled_from(CapsuleType), max_size=40))
def test_no_peer_makes_a_stream_complete_alone(side: Side, kinds: list[CapsuleType]) -> None:
    ends = StreamState(side)
    for kind in kinds:
        try:
            ends.received(kind)
        except CapsuleError:
            break
    assert not ends.complete
    assert not ends.finished_sent
    assert not ends.final_sent


# --- the tables -------------------------------------------------------------------------------------------------------


def test_the_docstring_shows_the_tables() -> None:
    """After a change, run: python -m tests.sniproxy.tunnel.state_diagram."""
    assert textwrap.indent(diagram(), "    ") in (state.__doc__ or "")


def test_every_state_is_there_once_and_has_its_error() -> None:
    states = {after for machine in TRANSITIONS.values() for events in machine.values() for after in events.values()}
    assert states | {state.Opening.GREETED, state.Opening.WARMING, state.Direction.FLOWING} == set(ERRORS)
    for machine in TRANSITIONS.values():
        assert {after for events in machine.values() for after in events.values()} <= set(machine)


def test_every_capsule_has_a_place() -> None:
    said = {kind for machine in TRANSITIONS.values() for events in machine.values() for _, kind in events}
    assert said - set(state.Elsewhere) == set(CapsuleType)


SPEAKERS = {
    T.DATA: {R, G},
    T.FINAL_DATA: {R, G},
    T.FINISHED: {R, G},
    T.HEARTBEAT: {R, G},
    T.READY: {G},
    T.OPENED: {G},
    T.REFUSED: {G},
    T.PONG: {G},
    T.WAITING: {G},
    T.RECEIVED: {G},
    T.PING: {R},
    T.OPEN: {R},
    T.DONE: {R},
    T.CONTINUED: {R},
}
"""Which side may send it at all."""


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("kind", CapsuleType)
def test_which_side_may_send_which_capsule(side: Side, kind: CapsuleType) -> None:
    """The error says that the side never sends this capsule, whatever the state; otherwise it names the state."""
    told = ""
    try:
        StreamState(other(side)).received(kind)
    except CapsuleError as error:
        told = str(error)
    assert ("not said by" in told) is (side not in SPEAKERS[kind])


# Everything that may come next, written out once more: what the tables let pass, and nothing else.
MAY = {
    "greeted": ([], "DATA FINAL_DATA", "READY REFUSED"),
    "ready": (OPENING[:2], "DATA FINAL_DATA", "WAITING OPENED REFUSED"),
    "opened": (OPENING, "DATA FINAL_DATA CONTINUED HEARTBEAT", "DATA FINAL_DATA RECEIVED HEARTBEAT"),
    "upload moved": ([*OPENING, (R, T.CONTINUED)], "HEARTBEAT", "DATA FINAL_DATA RECEIVED HEARTBEAT"),
    "upload ended": ([*OPENING, FINAL_UP], "HEARTBEAT", "DATA FINAL_DATA RECEIVED FINISHED HEARTBEAT"),
    "upload finished": ([*OPENING, FINAL_UP, (G, T.FINISHED)], "HEARTBEAT", "DATA FINAL_DATA RECEIVED HEARTBEAT"),
    "answer ended": ([*OPENING, FINAL_DOWN], "DATA FINAL_DATA CONTINUED FINISHED HEARTBEAT", "RECEIVED HEARTBEAT"),
    "answer finished": (
        [*OPENING, FINAL_DOWN, (R, T.FINISHED)],
        "DATA FINAL_DATA CONTINUED HEARTBEAT",
        "RECEIVED HEARTBEAT",
    ),
    "both ended": ([*OPENING, FINAL_UP, FINAL_DOWN], "FINISHED HEARTBEAT", "FINISHED RECEIVED HEARTBEAT"),
    "complete": (WHOLE[:-1], "DONE HEARTBEAT", "RECEIVED HEARTBEAT"),
    "done": (WHOLE, "DONE HEARTBEAT", "RECEIVED HEARTBEAT"),
    "refused": ([(G, T.REFUSED)], "", ""),
}
MAY_WARM = {
    "warm": ([], "PING OPEN", "REFUSED"),
    "pinged": ([(R, T.PING)], "PING OPEN", "PONG REFUSED"),
    "stream brought": ([(R, T.PING), (R, T.OPEN)], "DATA FINAL_DATA", "PONG WAITING OPENED REFUSED"),
    "late PONG": (
        [(R, T.PING), (R, T.OPEN), (G, T.OPENED)],
        "DATA FINAL_DATA CONTINUED HEARTBEAT",
        "PONG DATA FINAL_DATA RECEIVED HEARTBEAT",
    ),
}


@pytest.mark.parametrize(
    ("is_warm", "before", "relay", "gateway"),
    [(is_warm, *case) for is_warm, cases in ((False, MAY), (True, MAY_WARM)) for case in cases.values()],
    ids=[*MAY, *MAY_WARM],
)
def test_what_may_come_next(is_warm: bool, before: list[Step], relay: str, gateway: str) -> None:
    may = {(side, CapsuleType[name]) for side, names in ((R, relay), (G, gateway)) for name in names.split()}
    accepted = set()
    for step in itertools.product(Side, CapsuleType):
        pair = warm() if is_warm else Pair()
        pair.say_all(before)
        try:
            pair.say(*step)
        except CapsuleError:
            continue
        accepted.add(step)
    assert accepted == may


# --- connections that are kept ready ----------------------------------------------------------------------------------


def warm() -> Pair:
    pair = Pair()
    for ends in pair.ends.values():
        ends.warm = True
    pair.say(G, T.READY)
    return pair


def test_a_stream_on_a_warm_connection() -> None:
    pair = warm()
    pair.say_all([(R, T.PING), (G, T.PONG), (R, T.PING), (R, T.OPEN), (R, T.DATA), (G, T.PONG), (G, T.OPENED)])
    pair.say_all(WHOLE[len(OPENING) :])
    assert pair.ends[G].done


@pytest.mark.parametrize(
    ("said", "step"),
    [
        ([], (R, T.DATA)),
        ([], (R, T.FINAL_DATA)),
        ([], (G, T.OPENED)),
        ([], (G, T.PONG)),
        ([], (G, T.READY)),
        ([(R, T.PING), (G, T.PONG)], (G, T.PONG)),
        ([(R, T.OPEN)], (R, T.OPEN)),
        ([(R, T.OPEN)], (R, T.PING)),
        ([(R, T.OPEN)], (G, T.READY)),
        ([(R, T.OPEN)], (G, T.DATA)),
        ([(G, T.REFUSED)], (R, T.OPEN)),
        ([], (G, T.PING)),
        ([], (G, T.OPEN)),
    ],
)
def test_what_may_not_be_said_on_a_warm_connection(said: list[Step], step: Step) -> None:
    pair = warm()
    pair.say_all(said)
    with pytest.raises(CapsuleError):
        pair.say(*step)


@pytest.mark.parametrize("kind", [T.PING, T.OPEN])
def test_a_stream_that_is_not_warm_has_no_ping_or_open(kind: CapsuleType) -> None:
    pair = Pair()
    pair.say(G, T.READY)
    with pytest.raises(CapsuleError):
        pair.say(R, kind)


def test_a_warm_connection_may_be_refused() -> None:
    pair = warm()
    pair.say(G, T.REFUSED)
    assert pair.ends[R].refused


# --- services that are being woken ------------------------------------------------------------------------------------


def test_a_gateway_may_repeat_waiting() -> None:
    pair = Pair()
    pair.say_all([(R, T.DATA), (G, T.READY), (G, T.WAITING), (G, T.WAITING), (G, T.OPENED)])


@pytest.mark.parametrize(
    ("said", "side"), [([], G), (OPENING, G), ([(G, T.READY), (G, T.REFUSED)], G), ([(G, T.READY)], R)]
)
def test_waiting_is_refused_unless_a_stream_is_being_opened(said: list[Step], side: Side) -> None:
    pair = Pair()
    pair.say_all(said)
    with pytest.raises(CapsuleError):
        pair.say(side, T.WAITING)
