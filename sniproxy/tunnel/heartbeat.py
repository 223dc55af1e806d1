"""Heartbeats find a lost host behind a TURN server, which keeps its own end of the connection alive (PROTOCOL.md, section 9).

Each side says HEARTBEAT while its direction is silent, and neither answers it. A side that reads and hears nothing for too long
takes the other one for lost. A side that does not read, because its client or service does not, hears nothing either and must not
judge: its TCP connections tell whether their far ends live (`sniproxy.engine.tcp_liveness`). If both sides pause, nothing tells.

Sans-IO: time and byte counts come in.
"""

from dataclasses import dataclass
from typing import Final

PROTO: Final = "heartbeat/1"
"""In a record's `proto` and in the preamble's FEATURES: understands HEARTBEAT, and sends it if the other side does."""

INTERVAL_S: Final = 10.0
"""Between two heartbeats."""

SILENCE_S: Final = 24.0
"""Two heartbeats that did not come, and 4 s for a busy machine. With the time between two checks it is found within 30 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatTiming:
    """How often to say something, and how long to wait for something, in seconds."""

    interval_s: float = INTERVAL_S
    silence_s: float = SILENCE_S


HEARTBEAT_TIMING: Final = HeartbeatTiming()


class Heartbeats:
    """One side's view of one stream."""

    __slots__ = ("_beat_at", "_heard", "_heard_at", "_said", "_timing")

    def __init__(self, now: float, timing: HeartbeatTiming) -> None:
        self._timing = timing
        self._beat_at = -timing.interval_s + now
        self._said = -1
        self._heard = -1
        self._heard_at = now

    def is_due(self, now: float, sent: int) -> bool:
        """Return whether to say HEARTBEAT now. To be asked every few seconds.

        Args:
            sent: bytes sent so far, heartbeats included.
        """
        was_silent, self._said = sent == self._said, sent
        # A timer fires a moment early or late: the tolerance keeps that from doubling the interval.
        if not was_silent or now < self._beat_at + self._timing.interval_s * 0.95:
            return False
        self._beat_at = now
        self._said = -1  # the heartbeat itself is not silence
        return True

    def is_silent(self, now: float, received: int, *, reads: bool) -> bool:
        """Return whether the other side counts as lost. To be asked every few seconds.

        Args:
            received: bytes received so far.
            reads: whether this side reads what comes.
        """
        if received != self._heard or not reads:
            self._heard, self._heard_at = received, now
        return now >= self._heard_at + self._timing.silence_s
