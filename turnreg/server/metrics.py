"""Metrics of the embedded TURN server, in a registry that the caller passes."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from sniproxy.engine.copy import Splice
from turnreg.server.allocation import Drop, Refusal


class TurnMetrics:
    """Metrics of one server. Labels are enums, all registered at the start; addresses and users are never labels."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        allocations: Callable[[], int],
        largest_account: Callable[[], int],
        unauthenticated: Callable[[], int],
        unbound: Callable[[], int],
    ) -> None:
        """Register the metrics. The functions return the current values of gauges."""
        self._streams = _Streams()
        Gauge("crossnet_turn_allocations", "Allocations now.", registry=registry).set_function(allocations)
        Gauge(
            "crossnet_turn_largest_account_allocations",
            "Allocations of the account that has the most, each a port.",
            registry=registry,
        ).set_function(largest_account)
        connections = Gauge(
            "crossnet_turn_connections",
            "Connections now: clients without credentials yet, peers that wait for a bind, streams.",
            ["state"],
            registry=registry,
        )
        connections.labels("unauthenticated").set_function(unauthenticated)
        connections.labels("unbound").set_function(unbound)
        connections.labels("bound").set_function(lambda: len(self._streams.running))
        self._opened = Counter(
            "crossnet_turn_allocations_opened", "Allocations opened since the start.", registry=registry
        )
        refusals = Counter(
            "crossnet_turn_refusals", "Requests and connections that were refused.", ["reason"], registry=registry
        )
        self._refusals = {reason: refusals.labels(reason.value) for reason in Refusal}
        drops = Counter(
            "crossnet_turn_datagrams_dropped",
            "Datagrams that were not relayed or answered.",
            ["reason"],
            registry=registry,
        )
        self._drops = {reason: drops.labels(reason.value) for reason in Drop}
        relayed = Counter("crossnet_turn_datagrams", "Datagrams relayed.", ["direction"], registry=registry)
        self._to_client, self._to_peer = relayed.labels("to_client"), relayed.labels("to_peer")
        registry.register(self._streams)

    @property
    def streams(self) -> int:
        """Number of open streams."""
        return len(self._streams.running)

    def dropped(self, reason: Drop) -> None:
        """Count a datagram that was not relayed or answered."""
        self._drops[reason].inc()

    def datagram_to_client(self, size: int) -> None:
        """Count a datagram that was relayed to a client, and its payload bytes."""
        self._to_client.inc()
        self._streams.to_client += size

    def datagram_to_peer(self, size: int) -> None:
        """Count a datagram that was relayed to a peer, and its payload bytes."""
        self._to_peer.inc()
        self._streams.to_peer += size

    def refused(self, reason: Refusal) -> None:
        """Count a refusal."""
        self._refusals[reason].inc()

    def allocated(self) -> None:
        """Count a new allocation."""
        self._opened.inc()

    def stream_began(self, stream: Splice) -> None:
        """Count the bytes of a stream (a is the peer, b the client) from now on, also while it runs."""
        self._streams.running.add(stream)

    def stream_ended(self, stream: Splice) -> None:
        """Add the bytes of a stream that has ended to the totals."""
        self._streams.running.discard(stream)
        self._streams.to_client += stream.a_to_b.moved
        self._streams.to_peer += stream.b_to_a.moved


class _Streams(Collector):
    """Bytes of ended and of running streams, so that a stream that lasts for days is counted before its end."""

    def __init__(self) -> None:
        self.running: set[Splice] = set()
        self.to_client = 0
        self.to_peer = 0

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily("crossnet_turn_bytes", "Payload bytes relayed.", labels=["direction"])
        running = tuple(self.running)
        family.add_metric(["to_client"], self.to_client + sum(stream.a_to_b.moved for stream in running))
        family.add_metric(["to_peer"], self.to_peer + sum(stream.b_to_a.moved for stream in running))
        yield family
