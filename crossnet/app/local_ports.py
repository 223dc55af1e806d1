"""Metrics of the local ports that this host has for connections of ours."""

from collections.abc import Callable, Iterator
from contextlib import suppress

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sniproxy.engine.local_ports import local_ports, shortages, time_wait


class LocalPortsMetrics(Collector):
    """`crossnet_local_ports`, `crossnet_time_wait`, `crossnet_local_ports_exhausted_total`."""

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics. What the kernel does not tell is left out."""
        gauges: list[tuple[str, str, Callable[[], int]]] = [
            (
                "crossnet_local_ports",
                "Local ports of this host: the most connections that it can make to one address and port.",
                local_ports,
            ),
            (
                "crossnet_time_wait",
                "TCP connections of this host in TIME_WAIT. Those that it made keep a local port.",
                time_wait,
            ),
        ]
        for name, words, ask in gauges:
            with suppress(OSError, ValueError):
                yield GaugeMetricFamily(name, words, value=ask())
        yield CounterMetricFamily(
            "crossnet_local_ports_exhausted",
            "Connections that were not made because no local port was free.",
            value=shortages.count,
        )
