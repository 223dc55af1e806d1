"""How many data connections to open at once: as many as are bound quickly. Sans-IO.

Where time goes into round trips, many at once cost nothing; where it goes into a busy processor, ours or the server's, those that
are begun together also end together, the first as late as the last. A relay waits 3 s for a stream to be bound, so on a
machine that needs longer than that for all of a crowd, none would be in time. (Measured: 200 streams over TLS to coturn with an
eighth of a processor took 3 to 8 s; with 128 at once all were in time or nearly none was.)
"""

from typing import Final

INITIAL_CONCURRENCY: Final = 32
MIN_CONCURRENCY: Final = 8

SLACK_S: Final = 0.25
"""What a bind may take longer than twice the quickest: a lost segment that is sent again, the crowd's first moment."""


BASELINE_DRIFT: Final = 1.01
"""By how much the quickest grows with each slow one: a path that has become longer is learnt within some hundred binds."""


class BindConcurrency:
    """Grows by one with each bind that was quick, shrinks by a tenth with each that was slow."""

    __slots__ = ("_most", "_quickest_s", "_size")

    def __init__(self, most: int) -> None:
        """Begin without experience; `most` is never passed."""
        self._most = most
        self._size = float(min(INITIAL_CONCURRENCY, most))
        self._quickest_s = float("inf")

    @property
    def size(self) -> int:
        """How many may be under way."""
        return int(self._size)

    def took(self, seconds: float) -> None:
        """Learn how long one took, from the first packet to the last."""
        self._quickest_s = min(self._quickest_s, seconds)
        if seconds <= 2 * self._quickest_s + SLACK_S:
            self._size = min(self._most, self._size + 1)
        else:
            self._quickest_s *= BASELINE_DRIFT
            self._size = max(min(MIN_CONCURRENCY, self._most), self._size * 0.9)
