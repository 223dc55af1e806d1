"""The token bucket: burst and rate."""

from discovery.pacing.token_bucket import TokenBucket
from sniproxy.tunnel.connection import CONTROL_BURST, CONTROL_PER_S


def test_a_burst_then_the_rate() -> None:
    bucket = TokenBucket(rate=2.0, burst=3, now=100.0)
    assert [bucket.take(1, 100.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(1, 100.4)
    assert bucket.take(1, 100.6)
    assert not bucket.take(1, 100.6)


def test_a_refused_request_takes_no_token() -> None:
    bucket = TokenBucket(rate=1.0, burst=3, now=0.0)
    assert not bucket.take(4, 0.0)
    assert bucket.take(3, 0.0)


def test_it_never_holds_more_than_the_burst() -> None:
    bucket = TokenBucket(rate=1000.0, burst=2, now=0.0)
    assert bucket.take(2, 1000.0)
    assert not bucket.take(1, 1000.0)


def test_a_request_every_25_seconds_never_reaches_the_limit() -> None:
    """The rate limit of capsules without payload: see sniproxy.tunnel.connection."""
    bucket = TokenBucket(CONTROL_PER_S, CONTROL_BURST, 0.0)
    assert all(bucket.take(2, 25.0 * ping) for ping in range(1, 1000))
