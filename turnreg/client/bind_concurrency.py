"""How many data connections to open at once: as many as are bound quickly. Sans-IO.

If the time is spent on round trips, opening many at once costs nothing. If it is spent on a busy processor, ours or the server's,
binds that start together also finish together, the first as late as the last. A relay waits 3 s for a stream to be bound, so if a
machine takes longer than that for a whole burst, none of them is in time. (Measured: 200 streams over TLS to coturn with an eighth
of a processor took 3 to 8 s; with 128 at once either all were in time or almost none.)
"""

from typing import Final

INITIAL_CONCURRENCY: Final = 32
MIN_CONCURRENCY: Final = 8

SLACK_S: Final = 0.25
"""A quick bind may take this much longer than twice the quickest one: for a retransmitted segment, or the start of a burst."""

BASELINE_DRIFT: Final = 1.01
"""Factor by which the quickest time grows with each slow bind, so that a longer path is accepted within some hundred binds."""


class BindConcurrency:
    """A limit that grows by one with each quick bind and shrinks by a tenth with each slow one."""

    __slots__ = ("_most", "_quickest_s", "_size")

    def __init__(self, most: int) -> None:
        """Start with no measurements. The limit never exceeds `most`."""
        self._most = most
        self._size = float(min(INITIAL_CONCURRENCY, most))
        self._quickest_s = float("inf")

    @property
    def size(self) -> int:
        """How many binds may be in progress."""
        return int(self._size)

    def took(self, seconds: float) -> None:
        """Record how long one bind took, from the first packet to the last."""
        self._quickest_s = min(self._quickest_s, seconds)
        if seconds <= 2 * self._quickest_s + SLACK_S:
            self._size = min(self._most, self._size + 1)
        else:
            self._quickest_s *= BASELINE_DRIFT
            self._size = max(min(MIN_CONCURRENCY, self._most), self._size * 0.9)
