"""Pauses between attempts that fail: twice as long with each failure in a row, up to a longest one."""

import random
from dataclasses import dataclass

_MOST_DOUBLINGS = 32


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses from `first_s` to `longest_s` seconds.

    A drawn pause is shortened by up to `jitter` of itself, so that those who failed together do not come back together. With 1.0
    it may be any up to the bound ("full jitter").
    """

    first_s: float
    longest_s: float
    jitter: float = 0.5

    def bound_s(self, failures: int) -> float:
        """Return the longest pause after so many failures in a row, the first one included."""
        return min(self.first_s * 2.0 ** min(max(failures, 1) - 1, _MOST_DOUBLINGS), self.longest_s)

    def pause_s(self, failures: int) -> float:
        """Draw a pause after so many failures in a row."""
        bound_s = self.bound_s(failures)
        return random.uniform(bound_s * (1 - self.jitter), bound_s)
