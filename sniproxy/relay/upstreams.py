"""A relay's ways to services: dials them, learns which work, keeps warm those that are used, and says so in log and metrics."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.model.mesh import Mesh
from sniproxy.relay.failover import RESET, WARM_LOST, Connected, Dialer
from sniproxy.relay.health import UpstreamHealth
from sniproxy.relay.warm_pool import Fate, WarmPool
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate, RouteKind
from sniproxy.transport.errors import DialError
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.relay_handshake import GatewayConnector, StreamRequest

log = logging.getLogger(__name__)

_BUSY = frozenset({Reason.OVERLOADED, Reason.DRAINING})
"""A gateway that says so has to do without new streams for a while."""

_DISTRUSTED = frozenset({Reason.NO_KEY, Reason.BAD_SIGNATURE, Reason.CLOCK_SKEW, Reason.REPLAY, Reason.STALE_EPOCH})
"""A gateway that answers so takes no stream of ours: another one, with the right keys or clock, may."""


class Upstreams:
    """The ways of one relay. `reconfigure` comes first; `run` keeps streams warm until `close`."""

    _opener: GatewayConnector
    _dialer: Dialer

    def __init__(self, registry: CollectorRegistry) -> None:
        dials = Counter(
            "crossnet_relay_dials",
            "Attempts to open a stream, by route and result.",
            ["route", "result"],
            registry=registry,
        )
        results = (*(reason.value for reason in Reason), RESET, WARM_LOST)
        self._dials = {(kind, result): dials.labels(kind.value, result) for kind in RouteKind for result in results}
        fates = Counter(
            "crossnet_relay_warm_streams",
            "Connections kept ready, by what became of them.",
            ["fate"],
            registry=registry,
        )
        self._fates = {fate: fates.labels(fate.value) for fate in Fate}
        self.pool = WarmPool(self._warm_up, size=0, count=lambda fate: self._fates[fate].inc())
        ready = Gauge("crossnet_relay_warm_streams_ready", "Connections kept ready now.", registry=registry)
        ready.set_function(lambda: self.pool.ready)
        self._balance = UpstreamHealth(time.monotonic, is_ready=self.pool.has)
        left_out = Gauge(
            "crossnet_relay_ways_left_out", "Allocations and gateways that failed too often of late.", registry=registry
        )
        left_out.set_function(lambda: self._balance.left_out)

    def reconfigure(self, opener: GatewayConnector, *, pool: int) -> None:
        """Open streams by this from now on, and keep so many ready for each allocation in use."""
        self._opener = opener
        self.pool.resize(pool)
        self._dialer = Dialer(
            opener,
            warm=self.pool.take,
            distrust=self.pool.distrust,
            count=lambda kind, result: self._dials[kind, result].inc(),
            settled=self._settled,
        )

    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Put the ways to one network into the order in which a stream tries them."""
        return self._balance.order(candidates)

    async def open(self, call: StreamRequest, candidates: list[Candidate]) -> Connected:
        """Reach a service by one of these. Raises DialError."""
        return await self._dialer.open(call, candidates)

    async def second(self, call: StreamRequest, candidate: Candidate, attempts: Iterator[int]) -> CapsuleConnection:
        """Open a stream's second connection, for its upload. Raises ConnectionError."""
        return await self._dialer.second(call, candidate, attempts)

    def carrying(self, candidate: Candidate) -> AbstractContextManager[None]:
        """Count a stream on this way while the block runs."""
        return self._balance.carrying(candidate)

    def follow(self, mesh: Mesh) -> None:
        """Let go what was kept ready where that is no way any more."""
        self.pool.follow(mesh)

    async def run(self) -> None:
        """Keep streams warm, until `close`."""
        await self.pool.run()

    def close(self) -> None:
        """Let go all that is kept ready."""
        self.pool.close()

    async def _warm_up(self, way: Candidate) -> CapsuleConnection:
        try:
            framed = await self._opener.warm_up(way)
        except DialError as error:
            self._failed(way, error)
            raise
        self._balance.succeeded(way)
        return framed

    def _settled(self, way: Candidate, failure: DialError | None) -> None:
        """Take in whether a way led to a service; one that often does not is left out for a while."""
        if failure is None:
            self._balance.succeeded(way)
            if way.kind is RouteKind.TURN:
                self.pool.used(way)
        elif failure.answered and failure.reason not in _BUSY | _DISTRUSTED:
            self._balance.succeeded(way)
        else:
            self._failed(way, failure)

    def _failed(self, way: Candidate, failure: DialError) -> None:
        failed = self._balance.failed(way)
        if failed is not None and (failed.failures == 1 or failed.seconds):
            event: dict[str, object] = {"way": str(way), "network": way.network, "reason": failure.reason.value}
            event |= {"detail": failure.detail, "failures": failed.failures, "left_out_s": failed.seconds}
            log.warning("way_failed", extra={"event": event})
