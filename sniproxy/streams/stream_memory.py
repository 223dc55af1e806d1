"""Metrics of the kernel memory that this process's streams hold."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from sniproxy.engine.copy import RUNNING


class StreamMemoryMetrics(Collector):
    """What the sockets and pipes of all streams hold now. Streams that have moved less than 64 KiB are not counted."""

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics."""
        held = Counter({"receive": 0, "pipe": 0, "send": 0})
        largest, fast = 0, 0
        directions = tuple(RUNNING)
        for direction in directions:
            parts = direction.held()
            held.update(parts)
            largest = max(largest, sum(parts.values()))
            fast += direction.is_fast
        memory = GaugeMetricFamily(
            "crossnet_stream_memory_bytes",
            "Kernel memory of streams now: receive queues, pipes, send queues.",
            labels=["in"],
        )
        for part, size in held.items():
            memory.add_metric([part], size)
        yield memory
        yield GaugeMetricFamily(
            "crossnet_stream_memory_largest_bytes", "The same of the direction that holds most.", value=largest
        )
        pace = GaugeMetricFamily(
            "crossnet_stream_directions",
            "Directions of streams now, by how much the kernel may hold: `buffer` (slow), or more (fast).",
            labels=["pace"],
        )
        pace.add_metric(["slow"], len(directions) - fast)
        pace.add_metric(["fast"], fast)
        yield pace
