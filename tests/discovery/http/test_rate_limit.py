"""Rate limits by client."""

from discovery.http import rate_limit
from discovery.http.rate_limit import MAX_BUCKETS, RateLimit


def test_a_burst_then_the_rate_per_second() -> None:
    limit = RateLimit(2.0, 3)
    assert [limit.wait_s("b", 100) for _ in range(4)] == [0, 0, 0, 0.5]
    assert limit.wait_s("c", 100) == 0
    assert limit.wait_s("b", 100.5) == 0
    assert limit.wait_s("b", 100.5) == 0.5
    assert [limit.wait_s("b", 200) for _ in range(4)] == [0, 0, 0, 0.5]


def test_a_clock_that_goes_back_neither_adds_nor_removes_tokens() -> None:
    limit = RateLimit(1.0, 1)
    assert limit.wait_s("b", 100) == 0
    assert limit.wait_s("b", 50) == 1
    assert limit.wait_s("b", 51) == 0


def test_the_number_of_buckets_is_bounded() -> None:
    limit = RateLimit(1.0, 2)
    for number in range(MAX_BUCKETS + 10):
        limit.wait_s(number, 0)
    assert len(limit._buckets) <= rate_limit.MAX_BUCKETS
    limit.wait_s("last", 1000)
    for number in range(MAX_BUCKETS):
        limit.wait_s(-number, 1000)
    assert len(limit._buckets) <= rate_limit.MAX_BUCKETS


def test_a_rate_of_zero_is_no_limit() -> None:
    limit = RateLimit(0.0, 1)
    assert [limit.wait_s("b", 0.0) for _ in range(3)] == [0.0, 0.0, 0.0]
