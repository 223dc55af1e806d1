"""The registrar: an allocation on every TURN server of every other network that we have credentials for.

It watches discovery: a TURN server's record begins a registration, its end ends it; the addresses of that network's
relays, and nobody else's, are what may connect. Each registration lives, fails and comes back by itself.
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
"""Beyond what an allocation may take to be given back."""


MAX_TURN_SERVERS = 64
"""Of one network that we register on; its records could name thousands."""

_Key = tuple[str, str, int]
"""Network, TURN server, and which of our allocations there."""


class _Metrics:
    def __init__(self, registry: CollectorRegistry, count: Callable[[], int], refused: Callable[[], int]) -> None:
        allocations = Gauge("crossnet_registrar_allocations", "Allocations held now", registry=registry)
        allocations.set_function(count)
        Gauge(
            "crossnet_registrar_refused_addresses",
            "Registrations that there are not, since a record leads where this gateway does not go.",
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
    """Say how a peer that was bound has come in."""
    came_by = {"via": bound.via, "turn": bound.turn}
    return Accepted(stream=bound.wire, traits=TURN, addressee=bound.allocation, came_by=came_by)


class Registrar:
    """Keep us registered. `run()` it until it is cancelled or, better, `close()` has been called."""

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
        """Hold what discovery says should be held, and hand over the streams that come by it.

        Cancelling drops it all without asking the servers' leave.
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
        """Withdraw all records for good. Allocations stay, so that streams can end and late ones get an answer."""
        self._draining = True
        for registration in self._registrations.values():
            registration.drain()

    def hand_over(self) -> None:
        """Leave all records to a successor, who has written the same ones by now. Else as `drain`."""
        self._draining = True
        for registration in self._registrations.values():
            registration.hand_over()

    async def close(self) -> None:
        """Withdraw all records, then give all allocations back, which ends their streams. Bounded in time."""
        self.drain()
        self._closing.set()
        if self._group is None:
            return
        try:
            async with asyncio.timeout(self._config.timing.close_s + CLOSE_MARGIN_S):
                await self._closed.wait()
        except TimeoutError:
            log.warning("allocations_not_given_back", extra={"event": {"detail": "not all of them, in time"}})

    @property
    def settled(self) -> bool:
        """It runs, and every registration has published an allocation, or has failed to get one."""
        registrations = self._registrations.values()
        return self._group is not None and all(one.published or one.failing for one in registrations)

    @property
    def config(self) -> RegistrarConfig:
        """What it goes by."""
        return self._config

    def reconfigure(self, config: RegistrarConfig) -> None:
        """Go by this from now on; network, gateway and weight are those that it was made with.

        Where credentials or an authority differ, another allocation is made first and then published in place of the one before,
        which goes on until its streams have ended. Those of a network that is left out go on likewise.
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
        """Addresses and ports of the TURN servers that we are registered on, or about to be."""
        return frozenset[tuple[str, int]]().union(*(one.servers for one in self._registrations.values()))

    def status(self) -> list[dict[str, Any]]:
        """Say how each registration is, for people and the admin page; no secrets."""
        lines = [self._registrations[key].status() for key in sorted(self._registrations)]
        without = sorted(self._config.turn.keys() - {line["via"] for line in lines})
        mesh = self._discovery.mesh
        return lines + [
            # Standby: nobody there asks for us, or other gateways of ours hold what is needed.
            {
                "via": via,
                "turn": None,
                "state": "standby" if mesh.turns(via) and via != self._config.network else "no_turn_record",
            }
            for via in without
        ]

    def _apply(self, mesh: Mesh) -> None:
        """Bring registrations in line with the mesh."""
        if self._group is None or self._draining:
            return
        seen = set()
        holders = self._holders(mesh)
        self._tell_of_crowds(mesh)
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

    def _tell_of_crowds(self, mesh: Mesh) -> None:
        """Say once of a network that it has more TURN servers than we register on."""
        crowded = frozenset(via for via in self._config.turn if len(mesh.turns(via)) > MAX_TURN_SERVERS)
        for via in sorted(crowded - self._crowded):
            event = {"via": via, "records": len(mesh.turns(via)), "used": MAX_TURN_SERVERS}
            log.warning("too_many_turn_servers", extra={"event": event})
        self._crowded = crowded

    def _is_asked_for(self, mesh: Mesh, via: str) -> bool:
        """Tell whether we register in that network at all."""
        own = self._config.network
        return self._config.register is Register.ALL or any(own in relay.spec.asks for relay in mesh.relays(via))

    def _holders(self, mesh: Mesh) -> dict[tuple[str, str], set[str]]:
        """Say which gateways of our network hold allocations on each TURN server, as far as their records say."""
        holders: dict[tuple[str, str], set[str]] = {}
        for record in mesh.allocations(self._config.network):
            holders.setdefault((record.spec.via, record.spec.turn), set()).add(record.spec.gateway)
        return holders

    def _share(self, gateways: Collection[str], via: str, turn: str) -> int:
        """Say how many allocations on this server are ours to hold, where these gateways of our network hold some.

        Gateways of one network share them without asking each other: the records of those that hold one there say who
        does, and a hash orders them and us, the same order everywhere. So one more gateway takes its share, the others
        see its record and give theirs back; when one goes, its records lapse and the next takes its place.
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
            self._apply(self._discovery.mesh)  # it may have been wanted again while it was being given back


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
