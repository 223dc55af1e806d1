"""Which failures of a registration are logged. `now` is monotonic seconds."""

import math

from turnreg.client.control_connection import TurnError, TurnReason

LOG_AGAIN_S = 60.0
"""A repeated failure is logged once in this time, with the number of failures that were not logged."""


class FailureLog:
    """Admits a failure with a new reason at once, and one with the same reason again after a minute."""

    def __init__(self) -> None:
        self.last: TurnError | None = None
        self.suppressed = 0
        """Failures since the last one that was logged."""
        self._logged_at = -LOG_AGAIN_S

    def admits(self, error: TurnError, now: float) -> bool:
        """Tell whether to log this failure. If so, log it and then call `logged`."""
        last, self.last = self.last, error
        if last is not None and last.reason is error.reason:
            # A refused address is our own decision and does not change by itself, so it is logged once.
            once = error.reason is TurnReason.REFUSED_ADDRESS and last.detail == error.detail
            if now - self._logged_at < (math.inf if once else LOG_AGAIN_S):
                self.suppressed += 1
                return False
        return True

    def logged(self, now: float) -> None:
        """Restart the interval and the count of suppressed failures."""
        self._logged_at, self.suppressed = now, 0

    def succeeded(self) -> None:
        """Allow the next failure to be logged even if it repeats the last one."""
        self._logged_at = -LOG_AGAIN_S
