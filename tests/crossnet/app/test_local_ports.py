"""The metrics of local ports."""

from prometheus_client import CollectorRegistry

from crossnet.app.local_ports import LocalPortsMetrics
from sniproxy.engine import local_ports


def test_the_limit_and_what_is_used_of_it() -> None:
    registry = CollectorRegistry()
    registry.register(LocalPortsMetrics())
    assert registry.get_sample_value("crossnet_local_ports") == local_ports.local_ports()
    assert registry.get_sample_value("crossnet_time_wait") is not None
    assert registry.get_sample_value("crossnet_local_ports_exhausted_total") == local_ports.shortages.count
