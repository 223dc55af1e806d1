"""How reaching a candidate fails, and what that allows: another attempt, another candidate, or neither."""

from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate


class Unroutable(Exception):
    """A name that no candidate serves. `reason` is for metrics and the alert, `detail` a sentence for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class DialError(Exception):
    """No candidate took the stream. `final`: another one must not be asked with the same bytes."""

    def __init__(self, reason: Reason, detail: str, *, final: bool = False, answered: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.final = final
        self.answered = answered
        """Whether a gateway said so itself: the way to it works."""
        self.attempts = 0
        """How many times candidates were asked in all, the same one again included."""
        self.said = ""
        """What the gateway said itself, if it did."""


class StaleEpoch(DialError):
    """The gateway's process has another epoch than was signed; the right one is known now. Nothing was delivered: sign anew."""


class ResetBeforeReady(Exception):
    """The connection was cut before the gateway said READY."""


class WarmLost(Exception):
    """A connection that was kept ready is dead. Nothing but a ClientHello was sent, and the stream may go by another one.

    `silent`: it said nothing for as long as a gateway has; else it was cut.
    """

    def __init__(self, candidate: Candidate, *, silent: bool) -> None:
        how = "did not answer" if silent else "was cut"
        super().__init__(f"{candidate}: the connection that was kept ready {how}")
        self.silent = silent
