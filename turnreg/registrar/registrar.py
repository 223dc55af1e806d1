"""The registrar: keeps allocations on every TURN server of every other network that we have credentials for.

It follows discovery: a registration exists as long as the TURN server's record. Only the addresses of that network's relays may
connect to its allocations. Registrations are independent of each other; each retries after failures by itself.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Collection
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.client.contract import Discovery
from discovery.model.mesh import Kind, Mesh, Record, TurnSpec
from sniproxy.engine.host_addresses import is_own_address
from sniproxy.transport.base import Accepted, OnStream
from sniproxy.transport.turn import TURN
from turnreg.client.allocation import BindResult, Bound, Credentials, TurnReason
from turnreg.registrar.allocation_factory import LookUp, Server, look_up
from turnreg.registrar.allocation_lifecycle import Renewal
from turnreg.registrar.allocation_record import record_id
from turnreg.registrar.config import Issued, Register, RegistrarConfig, RestSecret, Retry, TurnCredentials
from turnreg.registrar.destinations import Destinations
from turnreg.registrar.registration import Registration
from turnreg.stun.message import FAMILY_IPV4, FAMILY_IPV6

__all__ = [
    "Credentials",
    "Issued",
    "Register",
    "Registrar",
    "RegistrarConfig",
    "RestSecret",
    "Retry",
    "TurnCredentials",
    "record_id",
]

log = logging.getLogger(__name__)

CLOSE_MARGIN_S = 1.0
"""Added to the timeout for deleting an allocation."""

MAX_TURN_SERVERS = 64
"""TURN servers of one network that we register on; it could publish thousands of records."""

_Key = tuple[str, str, int]
"""Network, TURN server, and number of our allocation there."""


class _Metrics:
    def __init__(self, registry: CollectorRegistry, count: Callable[[], int], refused: Callable[[], int]) -> None:
        allocations = Gauge("crossnet_registrar_allocations", "Allocations held now", registry=registry)
        allocations.set_function(count)
        Gauge(
            "crossnet_registrar_refused_addresses",
            "Registrations that fail because this gateway refuses the address in the TURN server's record.",
            registry=registry,
        ).set_function(refused)
        registrations = Counter(
            "crossnet_registrar_registrations",
            "Registrations that succeeded (ok), failed or were lost, by reason",
            ["reason"],
            registry=registry,
        )
        renewals = Counter(
            "crossnet_registrar_renewals", "Renewals of credentials, by result", ["result"], registry=registry
        )
        binds = Counter("crossnet_registrar_binds", "Peers announced, by result", ["result"], registry=registry)
        self.registrations = {reason: registrations.labels(reason) for reason in ("ok", *map(str, TurnReason))}
        self.renewals = {result: renewals.labels(str(result)) for result in Renewal}
        self.binds = {result: binds.labels(str(result)) for result in BindResult}


def accepted(bound: Bound) -> Accepted:
    """Return a bound peer as the connection that a gateway takes."""
    came_by = {"via": bound.via, "turn": bound.turn}
    return Accepted(stream=bound.stream, traits=TURN, addressee=bound.allocation, came_by=came_by)


class Registrar:
    """Keeps one gateway registered. `run()` returns after `close()`, and can be cancelled."""

    _on_stream: OnStream

    def __init__(
        self,
        config: RegistrarConfig,
        discovery: Discovery,
        registry: CollectorRegistry,
        *,
        look_up: LookUp = look_up,
    ) -> None:
        """Make a registrar that `run` starts. `look_up` resolves the names of TURN servers."""
        self._config, self._discovery, self._look_up = config, discovery, look_up
        self._registrations: dict[_Key, Registration] = {}
        self._metrics = _Metrics(
            registry,
            lambda: sum(r.ready for r in self._registrations.values()),
            lambda: sum(r.refused for r in self._registrations.values()),
        )
        self._destinations = Destinations(config.network, is_own=is_own_address)
        self._destinations.reconfigure(config.allow, config.guard, free_tries=config.replicas)
        self._crowded: frozenset[str] = frozenset()
        self._group: asyncio.TaskGroup | None = None
        self._draining = False
        self._closing = asyncio.Event()
        self._closed = asyncio.Event()

    async def run(self, on_stream: OnStream) -> None:
        """Keep the registrations that follow from discovery, and call `on_stream` for each stream that arrives.

        Cancelling drops all allocations without deleting them on the servers.
        """
        self._on_stream = on_stream
        unsubscribe = self._discovery.subscribe(self._apply)
        try:
            async with asyncio.TaskGroup() as self._group:
                self._apply(self._discovery.mesh)
                await self._closing.wait()
                for registration in self._registrations.values():
                    registration.end()
        finally:
            unsubscribe()
            self._group = None
            self._closed.set()

    def drain(self) -> None:
        """Withdraw all records for good. Allocations stay, so that open streams can end and late ones get an answer."""
        self._draining = True
        for registration in self._registrations.values():
            registration.drain()

    def hand_over(self) -> None:
        """Leave all records to a successor, which has already written the same ones. Otherwise as `drain`."""
        self._draining = True
        for registration in self._registrations.values():
            registration.hand_over()

    async def close(self) -> None:
        """Withdraw all records, then delete all allocations, which ends their streams. Takes a bounded time."""
        self.drain()
        self._closing.set()
        if self._group is None:
            return
        try:
            async with asyncio.timeout(self._config.timing.close_s + CLOSE_MARGIN_S):
                await self._closed.wait()
        except TimeoutError:
            log.warning(
                "allocations_not_given_back", extra={"event": {"detail": "some allocations were not deleted in time"}}
            )

    @property
    def settled(self) -> bool:
        """Whether it runs, and every registration has published an allocation or failed at least once."""
        registrations = self._registrations.values()
        return self._group is not None and all(one.published or one.failing for one in registrations)

    @property
    def config(self) -> RegistrarConfig:
        """The current settings."""
        return self._config

    def reconfigure(self, config: RegistrarConfig) -> None:
        """Use these settings from now on. Network, gateway and weight cannot change.

        If credentials or an authority have changed, a new allocation is made and then published in place of the old one, which
        stays until its streams have ended. Allocations of a network that is no longer configured stay likewise.
        """
        if config == self._config:
            return
        self._config = config
        self._destinations.reconfigure(config.allow, config.guard, free_tries=config.replicas)
        for registration in self._registrations.values():
            registration.reconfigure(config)
        self._apply(self._discovery.mesh)

    @property
    def servers(self) -> frozenset[tuple[str, int]]:
        """Addresses and ports of the TURN servers that we are registered on or registering with."""
        return frozenset[tuple[str, int]]().union(*(one.servers for one in self._registrations.values()))

    def status(self) -> list[dict[str, Any]]:
        """Describe each registration, for people and the admin page. Contains no secrets."""
        lines = [self._registrations[key].status() for key in sorted(self._registrations)]
        without = sorted(self._config.turn.keys() - {line["via"] for line in lines})
        mesh = self._discovery.mesh
        return lines + [
            # Standby: no relay there asks for us, or other gateways of ours hold the allocations.
            {
                "via": via,
                "turn": None,
                "state": "standby" if mesh.turns(via) and via != self._config.network else "no_turn_record",
            }
            for via in without
        ]

    def _apply(self, mesh: Mesh) -> None:
        """Update the registrations to the mesh."""
        if self._group is None or self._draining:
            return
        seen = set()
        holders = self._holders(mesh)
        self._log_excess_servers(mesh)
        for via, credentials in self._config.turn.items():
            if via == self._config.network:
                continue
            asked = self._is_asked_for(mesh, via)
            for record in mesh.turns(via)[:MAX_TURN_SERVERS]:
                gateways = holders.get((via, record.id), ())
                for replica in range(self._share(gateways, via, record.id) if asked else 0):
                    key = (via, record.id, replica)
                    seen.add(key)
                    new = key not in self._registrations
                    registration = self._registrations[key] if not new else self._registration(key)
                    registration.want(_server(record), credentials, _sources(mesh, via, record.id))
                    if new:
                        self._group.create_task(self._keep(key, registration))
        for key, registration in self._registrations.items():
            if key in seen:
                continue
            if mesh.record(Kind.TURN, *key[:2]) is not None:
                registration.release()
            else:
                registration.want(None, None, _sources(mesh, *key[:2]))

    def _log_excess_servers(self, mesh: Mesh) -> None:
        """Log once for each network that it has more TURN servers than we register on."""
        crowded = frozenset(via for via in self._config.turn if len(mesh.turns(via)) > MAX_TURN_SERVERS)
        for via in sorted(crowded - self._crowded):
            event = {"via": via, "records": len(mesh.turns(via)), "used": MAX_TURN_SERVERS}
            log.warning("too_many_turn_servers", extra={"event": event})
        self._crowded = crowded

    def _is_asked_for(self, mesh: Mesh, via: str) -> bool:
        """Tell whether we register with that network at all."""
        own = self._config.network
        return self._config.register is Register.ALL or any(own in relay.spec.asks for relay in mesh.relays(via))

    def _holders(self, mesh: Mesh) -> dict[tuple[str, str], set[str]]:
        """Return the gateways of our network that hold allocations on each TURN server, according to their records."""
        holders: dict[tuple[str, str], set[str]] = {}
        for record in mesh.allocations(self._config.network):
            holders.setdefault((record.spec.via, record.spec.turn), set()).add(record.spec.gateway)
        return holders

    def _share(self, gateways: Collection[str], via: str, turn: str) -> int:
        """Return how many allocations this gateway should hold on a server where these gateways of our network hold some.

        Gateways of one network share them without a coordinator. Records say which gateways hold allocations there, and a hash
        ranks those gateways and us, in the same order everywhere. A new gateway takes its share, and the others see its record and
        give theirs up. When a gateway is gone, its records expire and the next in rank takes its place.
        """
        ours = self._config.gateway
        ranked = sorted({*gateways, ours}, key=lambda gateway: _rank(gateway, via, turn))
        return sum(ranked[replica % len(ranked)] == ours for replica in range(self._config.replicas))

    def _registration(self, key: _Key) -> Registration:
        registration = self._registrations[key] = Registration(
            self._config,
            self._discovery,
            *key,
            destinations=self._destinations,
            on_stream=lambda bound: self._on_stream(accepted(bound)),
            on_bind=lambda result: self._metrics.binds[result].inc(),
            on_outcome=lambda reason: self._metrics.registrations[reason].inc(),
            on_renewal=lambda result: self._metrics.renewals[result].inc(),
            look_up=self._look_up,
        )
        return registration

    async def _keep(self, key: _Key, registration: Registration) -> None:
        try:
            await registration.run()
        finally:
            del self._registrations[key]
        if not self._draining:
            self._apply(self._discovery.mesh)  # it may have been wanted again while it was ending


def _rank(gateway: str, via: str, turn: str) -> bytes:
    return hashlib.sha256(f"{gateway}\0{via}\0{turn}".encode()).digest()


def _server(record: Record[TurnSpec]) -> Server:
    spec = record.spec
    only_ipv6 = bool(spec.relay_addresses) and all(":" in address for address in spec.relay_addresses)
    family = FAMILY_IPV6 if only_ipv6 else FAMILY_IPV4
    return Server(url=spec.url, family=family, port_min=spec.port_min, port_max=spec.port_max)


def _sources(mesh: Mesh, via: str, turn: str) -> frozenset[str]:
    """Return the addresses that this TURN server sees its network's relays come from."""
    return frozenset(address for relay in mesh.relays(via) for address in relay.spec.sources.get(turn, ()))
