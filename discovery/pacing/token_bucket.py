"""A token bucket: limits a burst and an average rate. Sans-IO: the caller passes the time."""


class TokenBucket:
    """Holds up to `burst` tokens, full at the start, and gains `rate` a second. Both may be changed at any time."""

    __slots__ = ("_at", "_left", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """`now` is in seconds, of any monotonic clock; use the same clock for every call."""
        self.rate = rate
        self.burst = burst
        self._left = burst
        self._at = now

    def left(self, now: float) -> float:
        """Return the number of tokens; negative if tokens are owed."""
        self._left = min(self.burst, self._left + max(0.0, now - self._at) * self.rate)
        self._at = now
        return self._left

    def take(self, count: float, now: float) -> bool:
        """Take `count` tokens. Returns False, and takes none, if there are fewer."""
        if self.left(now) < count:
            return False
        self._left -= count
        return True

    def spend(self, count: float, now: float) -> float:
        """Take `count` tokens, going into debt if necessary. Returns the seconds until the debt is paid."""
        self._left = self.left(now) - count
        return self.wait_s(0, now)

    def wait_s(self, count: float, now: float) -> float:
        """Return the seconds until there are `count` tokens."""
        return max(0.0, count - self.left(now)) / self.rate
