"""Metrics in Prometheus' format."""

from prometheus_client import CollectorRegistry, generate_latest

from dnsgw.metrics import DnsMetrics, Outcome, UpstreamOutcome


def test_every_label_is_there_from_the_start() -> None:
    registry = CollectorRegistry()
    metrics = DnsMetrics()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    for outcome in Outcome:
        assert f'crossnet_dns_queries_total{{outcome="{outcome}"}} 0.0' in text
    for result in UpstreamOutcome:
        assert f'crossnet_dns_upstream_attempts_total{{outcome="{result}"}} 0.0' in text
    metrics.queries[Outcome.ANSWERED] += 3
    metrics.coalesced = 2
    metrics.in_flight = lambda: 5
    metrics.tcp_connections = lambda: 7
    text = generate_latest(registry).decode()
    assert 'crossnet_dns_queries_total{outcome="answered"} 3.0' in text
    assert "crossnet_dns_coalesced_total 2.0" in text
    assert "crossnet_dns_in_flight 5.0" in text
    assert "crossnet_dns_tcp_connections 7.0" in text
