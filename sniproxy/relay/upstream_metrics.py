"""Metrics and log lines of a relay's upstreams."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge

from sniproxy.relay.health import Failed
from sniproxy.relay.warm_pool import Fate
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate
from sniproxy.transport.errors import DialError, ResetBeforeReady, WarmLost

log = logging.getLogger(__name__)

RESET = "reset"
WARM_LOST = "warm_lost"
"""Results of attempts that may be repeated with the same candidate."""

_REPEATABLE: dict[type[Exception], str] = {ResetBeforeReady: RESET, WarmLost: WARM_LOST}


class UpstreamMetrics:
    """Attempts by transport and result, and warm connections by their fate."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._dials = Counter(
            "crossnet_relay_dials",
            "Attempts to open a stream, by route and result.",
            ["route", "result"],
            registry=registry,
        )
        self._attempts: dict[tuple[str, str], Counter] = {}
        fates = Counter(
            "crossnet_relay_warm_streams",
            "Warm connections, by what became of them.",
            ["fate"],
            registry=registry,
        )
        self._fates = {fate: fates.labels(fate.value) for fate in Fate}

    def watch(self, *, ready: Callable[[], float], left_out: Callable[[], float]) -> None:
        """Create the gauges, which call these functions."""
        gauge = Gauge(
            "crossnet_relay_warm_streams_ready", "Warm connections that wait for a stream now.", registry=self._registry
        )
        gauge.set_function(ready)
        gauge = Gauge(
            "crossnet_relay_ways_left_out",
            "Allocations and gateways that are left out now because they failed too often.",
            registry=self._registry,
        )
        gauge.set_function(left_out)

    def know(self, transports: Iterable[str]) -> None:
        """Create the samples for all results of these transports, so that they exist from the start."""
        results = (*(reason.value for reason in Reason), RESET, WARM_LOST)
        for name in transports:
            self._attempts |= {(name, result): self._dials.labels(name, result) for result in results}

    @contextmanager
    def attempt(self, transport: str) -> Iterator[None]:
        """Count an attempt by how the block ends. An attempt that is cancelled is not counted."""
        try:
            yield
        except (ResetBeforeReady, WarmLost, DialError) as error:
            result = error.reason.value if isinstance(error, DialError) else _REPEATABLE[type(error)]
            self._attempts[transport, result].inc()
            raise
        self._attempts[transport, Reason.OK.value].inc()

    def fate(self, fate: Fate) -> None:
        """Count the fate of a warm connection."""
        self._fates[fate].inc()

    def log_failed(self, candidate: Candidate, failure: DialError, failed: Failed) -> None:
        """Log that a way failed: for the first failure in a row, and each time it is left out because of failures."""
        if failed.failures == 1 or failed.seconds:
            event: dict[str, object] = {"way": str(candidate), "network": candidate.network}
            event |= {"reason": failure.reason.value, "detail": failure.detail}
            event |= {"failures": failed.failures, "left_out_s": failed.seconds}
            log.warning("way_failed", extra={"event": event})
