"""Which way comes first: health, kind, zone, load and weight, in this order."""

import random
from collections import Counter
from contextlib import ExitStack

import pytest

from sniproxy.relay.health import FAILURES, FIRST_EJECTION_S, MAX_EJECTION_S, MAX_TRACKED, Failed, UpstreamHealth
from sniproxy.transport.base import Candidate, Traits
from sniproxy.transport.direct import DIRECT
from sniproxy.transport.turn import TURN


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def way(name: str, *, traits: Traits = TURN, weight: int = 1, near: bool = False) -> Candidate:
    return Candidate(
        traits=traits,
        network="b",
        target="10.1.0.5:8443",
        address="10.0.0.7",
        port=50000,
        addressee=name,
        weight=weight,
        near=near,
    )


def a_balance(clock: Clock | None = None, **options: int) -> UpstreamHealth:
    return UpstreamHealth(clock or Clock(), rng=random.Random(1), **options)  # type: ignore[arg-type]


def firsts(balance: UpstreamHealth, ways: list[Candidate], times: int = 2000) -> Counter[str]:
    return Counter(balance.order(ways)[0].addressee for _ in range(times))


def eject(balance: UpstreamHealth, bad: Candidate) -> None:
    for _ in range(FAILURES):
        balance.failed(bad)


def test_all_ways_are_there_and_each_comes_first_sometimes() -> None:
    ways = [way(name) for name in "abcd"]
    found = a_balance().order(ways)
    assert sorted(found, key=str) == ways
    counts = firsts(a_balance(), ways)
    assert all(400 < counts[name] < 600 for name in "abcd")


def test_direct_ways_come_before_turn_servers_and_near_ones_before_far_ones() -> None:
    ways = [
        way("far"),
        way("near", near=True),
        way("direct", traits=DIRECT),
        way("direct-near", traits=DIRECT, near=True),
    ]
    assert [found.addressee for found in a_balance().order(ways)] == ["direct-near", "direct", "near", "far"]


def test_of_two_the_less_busy_one() -> None:
    balance, busy, idle = a_balance(), way("busy"), way("idle")
    with balance.carrying(busy):
        assert firsts(balance, [busy, idle]) == {"idle": 2000}
    assert len(firsts(balance, [busy, idle])) == 2


def test_of_two_that_are_equally_busy_the_one_that_is_ready() -> None:
    ready, cold = way("ready"), way("cold")
    balance = UpstreamHealth(Clock(), is_ready=lambda found: found is ready)
    assert firsts(balance, [ready, cold]) == {"ready": 2000}
    with balance.carrying(ready):
        assert firsts(balance, [ready, cold]) == {"cold": 2000}


def test_the_busiest_of_many_never_comes_first() -> None:
    ways = [way(name) for name in "abcd"]
    balance = a_balance()
    with ExitStack() as streams:
        for count, each in enumerate(ways):
            for _ in range(count):
                streams.enter_context(balance.carrying(each))
        counts = firsts(balance, ways)
    assert counts["a"] > counts["b"] > counts["c"] > counts["d"] == 0


def test_streams_are_spread_by_weight() -> None:
    heavy, light = way("heavy", weight=3), way("light")
    balance = a_balance()
    carried: Counter[str] = Counter()
    with ExitStack() as streams:
        for _ in range(400):
            first = balance.order([heavy, light])[0]
            carried[first.addressee] += 1
            streams.enter_context(balance.carrying(first))
    assert carried["heavy"] == pytest.approx(300, abs=5)


def test_one_that_keeps_failing_comes_last_for_a_growing_while() -> None:
    clock = Clock()
    balance, bad, good = a_balance(clock), way("bad", traits=DIRECT), way("good")
    for count in range(1, FAILURES):
        assert balance.failed(bad) == Failed(failures=count, seconds=0)
    assert balance.order([bad, good])[0] is bad
    seconds = FIRST_EJECTION_S
    while True:
        ejected = balance.failed(bad)
        assert ejected is not None
        assert ejected.seconds == seconds
        assert balance.left_out == 1
        assert balance.order([bad, good]) == [good, bad], "last, but there"
        assert balance.failed(bad) is None, "it is left out already"
        clock.now += seconds
        assert balance.order([bad, good])[0] is bad
        if seconds == MAX_EJECTION_S:
            break
        seconds = min(2 * seconds, MAX_EJECTION_S)


def test_one_success_makes_up_for_all_failures() -> None:
    balance, bad = a_balance(), way("bad")
    eject(balance, bad)
    balance.succeeded(bad)
    assert balance.left_out == 0
    assert balance.failed(bad) == Failed(failures=1, seconds=0)


def test_where_all_fail_all_are_tried() -> None:
    balance, ways = a_balance(), [way("a"), way("b")]
    for each in ways:
        eject(balance, each)
    assert len(firsts(balance, ways)) == 2


def test_a_recreated_allocation_is_a_new_way() -> None:
    balance, lost = a_balance(), way("gw-1")
    eject(balance, lost)
    again = Candidate(traits=TURN, network="b", target="", address="10.0.0.7", port=50001, addressee="gw-1")
    assert balance.order([lost, again])[0] is again


def test_what_is_remembered_is_bounded() -> None:
    known = a_balance(max_tracked=10)
    busy = way("busy")
    with known.carrying(busy):
        for number in range(100):
            known.failed(way(f"w{number}"))
        assert len(known._ways) <= 10
        assert firsts(known, [busy, way("idle")]) == {"idle": 2000}, "one in use is not forgotten"
    assert MAX_TRACKED > 1000
