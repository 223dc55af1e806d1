"""A token bucket: so many at once, and so many a second on average. No clock of its own."""


class TokenBucket:
    """Holds up to `burst` tokens, full at the start, and gains `rate` a second."""

    __slots__ = ("_at", "_left", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """`now` is seconds of any clock that does not go back; the same one for every call."""
        self.rate = rate
        self.burst = burst
        self._left = burst
        self._at = now

    def take(self, count: int, now: float) -> bool:
        """Take `count` tokens; False, and none taken, where there are not so many."""
        self._left = min(self.burst, self._left + (now - self._at) * self.rate)
        self._at = now
        if self._left < count:
            return False
        self._left -= count
        return True
