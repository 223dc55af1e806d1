"""Bytes per second of an account, answers per second to strangers."""

import gc

from turnreg.server.pace import ANSWER_BUCKETS, AnswerRate, Pace, Paces
from turnreg.stun.auth import client_key


def test_a_second_at_once_then_what_is_spent_is_waited_for() -> None:
    pace = Pace(1000.0, now=0.0)
    assert pace.spend(1000, 0.0) == 0
    assert pace.spend(500, 0.0) == 0.5
    assert pace.spend(0, 0.5) == 0
    assert pace.spend(2000, 0.5) == 2.0


def test_what_is_not_used_is_kept_for_a_second() -> None:
    pace = Pace(1000.0, now=0.0)
    assert pace.spend(3000, 100.0) == 2.0


def test_datagrams_are_let_through_while_there_is_anything_left() -> None:
    pace = Pace(1000.0, now=0.0)
    assert [pace.admit(600, 0.0) for _ in range(3)] == [True, True, False]
    assert not pace.admit(1, 0.2)
    assert pace.admit(1, 0.3)


def test_an_account_has_one_pace_for_all_its_allocations() -> None:
    paces = Paces(1000.0)
    first = paces.of("u", 0.0)
    assert first is not None
    assert paces.of("u", 1.0) is first
    assert paces.of("v", 0.0) is not first
    del first
    gc.collect()
    assert not paces._paces.get("u")
    assert Paces(None).of("u", 0.0) is None


def test_another_rate_counts_where_a_pace_is_kept() -> None:
    paces = Paces(1000.0)
    pace = paces.of("u", 0.0)
    assert pace is not None
    paces.reconfigure(100.0)
    assert pace.spend(200, 0.0) == 1.0
    assert paces.of("u", 0.0) is pace
    paces.reconfigure(None)
    assert pace.spend(10_000, 0.0) == 0.0
    assert pace.admit(10_000, 0.0)
    assert paces.of("u", 0.0) is None


def test_strangers_are_answered_up_to_a_rate() -> None:
    rate = AnswerRate(b"k" * 32, rate=10.0, burst=3.0)
    assert [rate.allow("192.0.2.1", 0.0, client_key) for _ in range(4)] == [True, True, True, False]
    assert rate.allow("192.0.2.2", 0.0, client_key)
    assert rate.allow("192.0.2.1", 0.1, client_key)
    assert not rate.allow("192.0.2.1", 0.1, client_key)


def test_a_network_of_ipv6_counts_as_one() -> None:
    rate = AnswerRate(b"k" * 32, rate=10.0, burst=1.0)
    assert rate.allow("2001:db8::1", 0.0, client_key)
    assert not rate.allow("2001:db8::2", 0.0, client_key)
    assert rate.allow("2001:db8:0:1::1", 0.0, client_key)


def test_the_memory_for_strangers_is_bounded() -> None:
    rate = AnswerRate(b"k" * 32)
    for number in range(3 * ANSWER_BUCKETS):
        rate.allow(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0, client_key)
    assert len(rate._buckets) <= ANSWER_BUCKETS
