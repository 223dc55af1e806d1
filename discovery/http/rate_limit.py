"""How much one network may ask of a server: buckets that fill by the second. Sans-IO: time comes in as an argument."""

from collections.abc import Hashable
from dataclasses import dataclass

MAX_BUCKETS = 10_000  # of networks that tokens name; full ones are forgotten first


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float


class RateLimit:
    """At most `burst` at once, and `per_s` a second in the long run, for each of whoever asks."""

    def __init__(self, per_s: float, burst: int) -> None:
        """Begin with full buckets. A rate of 0 is no limit."""
        self.per_s = per_s
        self.burst = burst
        self._buckets: dict[Hashable, _Bucket] = {}

    def wait_s(self, who: Hashable, now: float) -> float:
        """Take one; gives 0, or after how many seconds there is one to be had."""
        if not self.per_s:
            return 0.0
        bucket = self._buckets.get(who)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                self._forget(now)
            bucket = self._buckets[who] = _Bucket(float(self.burst), now)
        bucket.level = min(float(self.burst), bucket.level + max(0.0, now - bucket.at) * self.per_s)
        bucket.at = now
        if bucket.level < 1:
            return (1 - bucket.level) / self.per_s
        bucket.level -= 1
        return 0.0

    def _forget(self, now: float) -> None:
        full = [
            who for who, bucket in self._buckets.items() if bucket.level + (now - bucket.at) * self.per_s >= self.burst
        ]
        for who in full or list(self._buckets)[: MAX_BUCKETS // 10]:
            del self._buckets[who]
