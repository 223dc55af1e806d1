"""Which stream is ended for another one: always the longest idle one of whoever holds most, as a plain search finds it."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from sniproxy.streams.idle_streams import IdleStreams

MIN_IDLE_S = 10.0


@dataclass(eq=False)
class Stream:
    """A stream of a test."""

    holder: str
    last_moved: float


def streams(*held: tuple[str, float], min_idle_s: float = MIN_IDLE_S) -> IdleStreams[str, Stream]:
    """Return open streams of these holders, each with when it last moved."""
    made: IdleStreams[str, Stream] = IdleStreams(min_idle_s)
    for holder, last in held:
        made.enter(holder)
        made.open(Stream(holder, last), holder)
    return made


def found(among: IdleStreams[str, Stream], newcomer: str, now: float = 100.0) -> tuple[str, float] | None:
    """Return holder and time of the stream that is found for a new one of `newcomer`."""
    among.enter(newcomer)
    stream = among.find(newcomer, now)
    among.leave(newcomer)
    return None if stream is None else (stream.holder, stream.last_moved)


def test_the_longest_idle_one_of_whoever_holds_most() -> None:
    held = streams(("a", 1.0), ("b", 9.0), ("b", 3.0), ("b", 5.0), ("c", 2.0), ("c", 4.0))
    assert found(held, "d") == ("b", 3.0)
    assert found(held, "a") == ("b", 3.0)


def test_a_stream_in_use_is_never_found() -> None:
    held = streams(("a", 95.0), ("a", 91.0), ("a", 99.0))
    assert found(held, "b") is None
    assert found(held, "b", now=101.0) == ("a", 91.0)


def test_whoever_holds_most_takes_its_own_only() -> None:
    """So no number of new streams takes those of others."""
    held = streams(("a", 50.0), ("a", 60.0), ("a", 70.0), ("b", 1.0), ("b", 2.0))
    assert found(held, "a") == ("a", 50.0)
    assert found(streams(("a", 95.0), ("a", 95.0), ("b", 1.0)), "a") is None, "others hold less, and its own are in use"


def test_if_whoever_holds_most_has_no_idle_stream_the_next_one_loses_one() -> None:
    held = streams(("a", 95.0), ("a", 96.0), ("a", 97.0), ("b", 1.0), ("b", 2.0), ("c", 0.5))
    assert found(held, "d") == ("b", 1.0)


def test_streams_that_are_not_open_yet_count() -> None:
    held = streams(("a", 1.0), ("b", 2.0))
    held.enter("b")
    assert found(held, "c") == ("b", 2.0)


def test_a_stream_that_moves_again_is_not_idle() -> None:
    held = streams(("a", 1.0), ("a", 2.0))
    assert found(held, "b") == ("a", 1.0)
    first, _ = held
    first.last_moved = 99.0
    assert found(held, "b") == ("a", 2.0)
    first.last_moved = 1.5
    assert found(held, "b") == ("a", 2.0), "it is looked at when it would be idle"


def test_what_has_ended_is_not_remembered() -> None:
    held: IdleStreams[str, Stream] = IdleStreams(MIN_IDLE_S)
    for number in range(10_000):
        stream = Stream("a", float(number))
        held.enter("a")
        held.open(stream, "a")
        held.close(stream)
        held.close(stream)
        held.leave("a")
    assert len(held._in_use._heap) < 200
    assert not held._held
    assert found(held, "a", now=1e9) is None


class Model(RuleBasedStateMachine):
    """Any order of events against a search through all streams."""

    opened = Bundle("opened")

    @initialize()
    def begin(self) -> None:
        self.streams: IdleStreams[str, Stream] = IdleStreams(MIN_IDLE_S)
        self.open_ones: list[Stream] = []
        self.held: dict[str, int] = {}
        self.now = 0.0

    @rule(seconds=st.floats(0.1, 15.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=opened, holder=st.sampled_from("abcd"))
    def open(self, holder: str) -> Stream:
        stream = Stream(holder, self.now)
        self.streams.enter(holder)
        self.held[holder] = self.held.get(holder, 0) + 1
        self.streams.open(stream, holder)
        self.open_ones.append(stream)
        return stream

    @rule(stream=opened)
    def move(self, stream: Stream) -> None:
        stream.last_moved = self.now

    @rule(stream=consumes(opened))
    def close(self, stream: Stream) -> None:
        self.streams.close(stream)
        self.streams.leave(stream.holder)
        self.held[stream.holder] -= 1
        self.open_ones.remove(stream)

    @rule(newcomer=st.sampled_from("abcde"))
    def find(self, newcomer: str) -> None:
        self.streams.enter(newcomer)
        self.held[newcomer] = self.held.get(newcomer, 0) + 1
        got = self.streams.find(newcomer, self.now)
        idle = [stream for stream in self.open_ones if stream.last_moved <= self.now - MIN_IDLE_S]
        most = max((self.held[stream.holder] for stream in idle), default=0)
        own = [stream for stream in idle if stream.holder == newcomer]
        if most < self.held[newcomer] or (most == self.held[newcomer] and own):
            good = own
        else:
            good = [stream for stream in idle if self.held[stream.holder] == most]
        if not good:
            assert got is None
        else:
            assert got in good
            assert got.last_moved == min(stream.last_moved for stream in good if stream.holder == got.holder)
        self.streams.leave(newcomer)
        self.held[newcomer] -= 1

    @invariant()
    def counts_agree(self) -> None:
        for holder in "abcde":
            assert self.streams.held(holder) == self.held.get(holder, 0)
        assert set(self.streams) == set(self.open_ones)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 80)), min_size=1, max_size=60))
def test_making_room_again_and_again_evens_out(held: list[tuple[str, float]]) -> None:
    """A newcomer that opens stream after stream gets no more than those that it takes from are left with."""
    among = streams(*held)
    got = 0
    while True:
        among.enter("new")
        stream = among.find("new", 100.0)
        if stream is None:
            break
        among.close(stream)
        among.leave(stream.holder)
        got += 1
        assert got <= len(held)
    assert got <= 1 + max(among.held(holder) for holder, _ in held)
