"""A gateway's metrics exist from the start and follow its state."""

from prometheus_client import CollectorRegistry

from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.verify import ReplayCache
from turnreg.gateway.metrics import GatewayMetrics


def test_refused_connections_are_counted_by_reason() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry, warm=(), remembered=ReplayCache())

    def count(reason: Reason) -> float | None:
        return registry.get_sample_value("crossnet_gateway_connections_refused_total", {"reason": reason.value})

    assert {count(reason) for reason in Reason} == {0.0}
    metrics.refused(Reason.FLOOD)
    assert (count(Reason.FLOOD), count(Reason.OK)) == (1.0, 0.0)


def test_warm_connections_are_those_of_now() -> None:
    registry, warm = CollectorRegistry(), ["one"]
    GatewayMetrics(registry, warm=warm, remembered=ReplayCache())
    assert registry.get_sample_value("crossnet_gateway_warm_streams") == 1
    warm.clear()
    assert registry.get_sample_value("crossnet_gateway_warm_streams") == 0
    assert registry.get_sample_value("crossnet_gateway_remembered_preambles", {"of": "all"}) == 0
