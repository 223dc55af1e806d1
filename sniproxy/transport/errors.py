"""The errors of reaching a candidate, and what they allow: another attempt, another candidate, or neither."""

from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate


class Unroutable(Exception):
    """There is no candidate for a name. `reason` is for metrics and the alert, `detail` for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class DialError(Exception):
    """A stream could not be opened. `final`: the same bytes must not be sent to another candidate."""

    def __init__(self, reason: Reason, detail: str, *, final: bool = False, answered: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.final = final
        self.answered = answered
        """Whether this is a gateway's answer, so that the way to it works."""
        self.attempts = 0
        """The number of attempts in total, including repeated ones with the same candidate."""
        self.said = ""
        """The detail of the gateway's refusal, if it refused."""


class StaleEpoch(DialError):
    """Another epoch was signed than the gateway's, which is now known. Nothing was delivered, so it can be signed again."""


class ResetBeforeReady(Exception):
    """The connection was cut before the gateway's READY."""


class WarmLost(Exception):
    """A warm connection is dead. Only a ClientHello was sent on it, so the stream may use another connection.

    `silent`: the gateway did not answer in time; otherwise the connection was cut.
    """

    def __init__(self, candidate: Candidate, *, silent: bool) -> None:
        how = "did not answer" if silent else "was cut"
        super().__init__(f"{candidate}: the warm connection {how}")
        self.silent = silent
