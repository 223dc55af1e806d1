"""Which of a registration's failures are worth a line in the log. `now` is monotonic seconds."""

import math

from turnreg.client.control_connection import TurnError, TurnReason

LOG_AGAIN_S = 60.0
"""The same failure over and over is logged that often, with the number of those that were not."""


class FailureLog:
    """Admits every new kind of failure at once, and the same one again after a minute."""

    def __init__(self) -> None:
        self.last: TurnError | None = None
        self.suppressed = 0
        """Failures since the last one that was logged."""
        self._logged_at = -LOG_AGAIN_S

    def admits(self, error: TurnError, now: float) -> bool:
        """Tell whether to log this failure. If so, call `logged` when that is done."""
        last, self.last = self.last, error
        if last is not None and last.reason is error.reason:
            # A refused address is our own decision, which stands until something changes: it is logged once.
            once = error.reason is TurnReason.REFUSED_ADDRESS and last.detail == error.detail
            if now - self._logged_at < (math.inf if once else LOG_AGAIN_S):
                self.suppressed += 1
                return False
        return True

    def logged(self, now: float) -> None:
        """Count from here on."""
        self._logged_at, self.suppressed = now, 0

    def succeeded(self) -> None:
        """Let the next failure be logged even if it is the same as the last."""
        self._logged_at = -LOG_AGAIN_S
