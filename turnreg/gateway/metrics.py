"""Metrics of a gateway, other than those of its streams."""

from collections.abc import Sized

from prometheus_client import CollectorRegistry, Counter, Gauge

from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.verify import ReplayCache


class GatewayMetrics:
    """Counters and gauges of one gateway; every label exists from the start."""

    def __init__(self, registry: CollectorRegistry, *, warm: Sized, remembered: ReplayCache) -> None:
        """Register the metrics. `warm`: the connections that relays keep ready. `remembered`: the recent preambles."""
        ready = Gauge("crossnet_gateway_warm_streams", "Connections that relays keep ready.", registry=registry)
        ready.set_function(lambda: len(warm))
        self._refused = Counter(
            "crossnet_gateway_connections_refused",
            "Refused connections that are not streams (warm or second connections), by reason.",
            ["reason"],
            registry=registry,
        )
        for reason in Reason:
            self._refused.labels(reason.value)
        preambles = Gauge(
            "crossnet_gateway_remembered_preambles",
            "Recent preambles, which are not accepted again.",
            ["of"],
            registry=registry,
        )
        preambles.labels("all").set_function(lambda: len(remembered))
        preambles.labels("largest_network").set_function(remembered.largest)

    def refused(self, reason: Reason) -> None:
        """Count a refused connection that is not a stream."""
        self._refused.labels(reason.value).inc()
