"""The metrics of kernel memory, of a stream whose reader does not read."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from sniproxy.engine import Splice
from sniproxy.streams.stream_memory import StreamMemoryMetrics
from tests.support.streams import pair
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

MEMORY = "crossnet_stream_memory_bytes"


async def test_what_streams_hold_is_counted() -> None:
    registry = CollectorRegistry()
    registry.register(StreamMemoryMetrics())

    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(name, labels) or 0.0

    assert value(MEMORY, **{"in": "receive"}) == 0
    left, a = await pair()
    right, b = await pair()
    async with asyncio.TaskGroup() as group:
        group.create_task(Splice(a, b, idle_timeout_s=60, half_close_timeout_s=20).run())
        pouring = group.create_task(left.send(bytes(1 << 25)))
        await eventually(lambda: value(MEMORY, **{"in": "receive"}) and value(MEMORY, **{"in": "send"}))
        assert value("crossnet_stream_directions", pace="slow") == 1
        assert value("crossnet_stream_directions", pace="fast") == 0
        assert value("crossnet_stream_memory_largest_bytes") > 0
        pouring.cancel()
        left.reset()
        right.reset()
    assert value("crossnet_stream_directions", pace="slow") == 0
    assert value("crossnet_stream_memory_largest_bytes") == 0
