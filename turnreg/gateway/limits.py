"""Bounds and pauses of a gateway that no operator sets."""

from dataclasses import dataclass

from discovery.pacing.backoff import Backoff
from sniproxy.streams.idle_streams import MIN_IDLE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """Bounds of one gateway. The defaults are for production; tests lower them."""

    max_unproven: int = 1024
    """Connections whose preamble is not complete. A relay's preamble is there within a round trip, a stranger's may never come.
    Beyond this number the oldest such connection is closed, so that strangers keep no relay out."""
    max_lingering: int = 1024
    """Refused connections that are still read until REFUSED has arrived. In a larger flood REFUSED may be lost."""
    max_warm: int = 4096
    """Connections kept ready for all relays together: the most that eight relays keep."""
    warm_silence_s: float = 60.0
    """Silence after which a warm connection is closed. A relay sends a PING every 25 s, so two of them are missing by then."""
    min_idle_s: float = MIN_IDLE_S
    """How long a stream must have been silent to be ended for another one, where silence has no limit."""
    max_triggers: int = 32
    """Activation triggers that run at once. Requests for all services of a network must not start a thousand processes; the other
    triggers wait."""
    trigger_backoff: Backoff = Backoff(1.0, 60.0)
    """Pause between failed triggers of one service."""
