"""Limits of what one upstream is asked with."""

from dataclasses import dataclass

from discovery.pacing.backoff import Backoff
from dnsgw.upstream.connections import CONNECTION_LIMITS, ConnectionLimits
from dnsgw.upstream.stream_client import STREAM_TIMING, StreamTiming


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamLimits:
    """Limits of the sockets to one upstream, and how long it is deferred after failures."""

    pool: int = 64
    """UDP sockets, opened on first use; at most 256, since one random byte chooses among them."""

    max_uses: int = 32
    """Questions per socket, and so per port."""

    max_age_s: float = 10.0
    """Age at which a UDP socket is replaced."""

    max_retired: int = 256
    """Replaced sockets that still wait for answers; when there are so many, no more are replaced."""

    retired_s: float = 2.0
    """How long a replaced socket waits for answers: longer than any exchange."""

    down: Backoff = Backoff(1.0, 30.0)
    """How long an upstream that did not answer comes last."""

    stream: StreamTiming = STREAM_TIMING
    """Timeouts of its connections."""

    connections: ConnectionLimits = CONNECTION_LIMITS
    """Limits of its connections, if it does not take all questions on one of them."""


UPSTREAM_LIMITS = UpstreamLimits()
