"""Exponential backoff: the pause doubles with each failure in a row, up to a limit."""

import random
from dataclasses import dataclass

_MOST_DOUBLINGS = 32


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses from `first_s` to `longest_s` seconds.

    Each pause is randomly shortened by up to this fraction (`jitter`), so that clients that failed together do not retry
    together. With 1.0 it can be anything up to the bound ("full jitter").
    """

    first_s: float
    longest_s: float
    jitter: float = 0.5

    def bound_s(self, failures: int) -> float:
        """Return the longest possible pause after this many failures in a row; the first failure counts as 1."""
        return min(self.first_s * 2.0 ** min(max(failures, 1) - 1, _MOST_DOUBLINGS), self.longest_s)

    def pause_s(self, failures: int) -> float:
        """Return a random pause after this many failures in a row."""
        bound_s = self.bound_s(failures)
        return random.uniform(bound_s * (1 - self.jitter), bound_s)
