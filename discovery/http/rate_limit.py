"""Rate limits by client: one token bucket for each. Sans-IO: the caller passes the time."""

from collections.abc import Hashable

from discovery.pacing.token_bucket import TokenBucket

MAX_BUCKETS = 10_000
"""Clients that are remembered at once. Full buckets are dropped first."""


class RateLimit:
    """Allows each client `burst` requests at once, and `per_s` a second in the long run."""

    def __init__(self, per_s: float, burst: int) -> None:
        """Buckets start full. A rate of 0 means no limit."""
        self.per_s = per_s
        self.burst = burst
        self._buckets: dict[Hashable, TokenBucket] = {}

    def wait_s(self, who: Hashable, now: float) -> float:
        """Take a token and return 0. If there is none, return the seconds until there is one."""
        if not self.per_s:
            return 0.0
        bucket = self._buckets.get(who)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                self._forget(now)
            bucket = self._buckets[who] = TokenBucket(self.per_s, self.burst, now)
        return 0.0 if bucket.take(1, now) else bucket.wait_s(1, now)

    def _forget(self, now: float) -> None:
        full = [who for who, bucket in self._buckets.items() if bucket.left(now) >= self.burst]
        for who in full or list(self._buckets)[: MAX_BUCKETS // 10]:
            del self._buckets[who]
