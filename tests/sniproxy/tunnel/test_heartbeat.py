"""When to say HEARTBEAT, and when silence means that the other side is lost."""

import pytest

from sniproxy.tunnel.heartbeat import INTERVAL_S, SILENCE_S, Heartbeats, HeartbeatTiming

CHECK_S = 5.0
TIMING = HeartbeatTiming()


def beats(sent: list[int]) -> list[int]:
    """At which checks a side says HEARTBEAT that has sent so many bytes before each; each heartbeat is 8 bytes."""
    heartbeats = Heartbeats(0.0, TIMING)
    said, extra = [], 0
    for number, count in enumerate(sent, 1):
        if heartbeats.is_due(number * CHECK_S, count + extra):
            said.append(number)
            extra += 8
    return said


def test_a_silent_side_says_one_every_ten_seconds() -> None:
    assert beats([0] * 9) == [2, 4, 6, 8]


def test_a_side_that_sends_says_none() -> None:
    assert beats(list(range(1, 30))) == []


def test_one_comes_within_ten_seconds_after_the_last_byte() -> None:
    assert beats([1, 2, 3, 3, 3, 3, 3]) == [4, 6]


def test_a_timer_that_fires_early_or_late_does_not_double_the_interval() -> None:
    heartbeats = Heartbeats(0.0, TIMING)
    said = [now for now in (5.0, 10.0, 14.99, 19.98, 24.99, 29.97) if heartbeats.is_due(now, 0)]
    assert len(said) == 3


def silent(received: list[int], reads: list[bool] | None = None) -> int | None:
    """At which check a side takes the other one for lost that has received so many bytes before each."""
    heartbeats = Heartbeats(0.0, TIMING)
    for number, count in enumerate(received, 1):
        is_reading = reads is None or reads[number - 1]
        if heartbeats.is_silent(number * CHECK_S, count, reads=is_reading):
            return number
    return None


def test_silence_is_loss_within_thirty_seconds() -> None:
    at = silent([1] * 20)
    assert at is not None
    assert SILENCE_S <= at * CHECK_S <= 30


def test_whoever_says_something_is_there() -> None:
    assert silent(list(range(50))) is None
    assert silent([8 * (number // 2) for number in range(50)]) is None, "a heartbeat every other check"


def test_who_does_not_read_does_not_judge() -> None:
    assert silent([1] * 50, [False] * 50) is None
    at = silent([1] * 50, [False] * 20 + [True] * 30)
    assert at is not None
    assert at > 20 + SILENCE_S / CHECK_S - 1


@pytest.mark.parametrize("missed", [1, 2])
def test_a_heartbeat_or_two_may_be_late(missed: int) -> None:
    assert missed * INTERVAL_S < SILENCE_S
