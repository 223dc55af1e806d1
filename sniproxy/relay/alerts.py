"""Sends refused clients their TLS alert, and makes sure that it arrives."""

from typing import Final

from sniproxy.engine import ByteStream
from sniproxy.formats.tls_alert import AlertDescription, alert_record
from sniproxy.streams.end_reason import Reason

MAX_LINGERING = 1024
"""Refused clients that are read from at once, so that they get their alert. In a flood of more, the others may not get theirs."""

ALERTS: Final = {
    Reason.DENIED: AlertDescription.ACCESS_DENIED,
    Reason.NO_SNI: AlertDescription.UNRECOGNIZED_NAME,
    Reason.BAD_NAME: AlertDescription.UNRECOGNIZED_NAME,
    Reason.UNKNOWN_NETWORK: AlertDescription.UNRECOGNIZED_NAME,
    Reason.UNKNOWN_NAME: AlertDescription.UNRECOGNIZED_NAME,
    Reason.AMBIGUOUS_NAME: AlertDescription.UNRECOGNIZED_NAME,
    Reason.AMBIGUOUS_PORT: AlertDescription.UNRECOGNIZED_NAME,
    Reason.PROBE: AlertDescription.UNRECOGNIZED_NAME,
    Reason.BAD_HELLO: AlertDescription.DECODE_ERROR,
}
"""The alert for a client that speaks TLS. For all other reasons it is internal_error."""

SILENT: Final = frozenset({Reason.NOT_TLS, Reason.HELLO_TIMEOUT})
"""Reasons without an alert: no ClientHello was read, so the client may not speak TLS."""


class Alerts:
    """Refuses clients. At most `max_lingering` are read from at once, so that they get their alert."""

    def __init__(self, max_lingering: int = MAX_LINGERING) -> None:
        self._max_lingering = max_lingering
        self.lingering = 0
        """Clients that are read from now."""

    async def send(self, client: ByteStream, reason: Reason) -> None:
        """Send the alert for this reason, if there is one, and read from the client until it has got it."""
        if reason in SILENT:
            return
        try:
            await client.send(alert_record(ALERTS.get(reason, AlertDescription.INTERNAL_ERROR)))
        except OSError:
            return  # the client is gone
        if self.lingering < self._max_lingering:
            self.lingering += 1
            try:
                await client.drain_and_close()
            finally:
                self.lingering -= 1
