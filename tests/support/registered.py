"""A running registrar with a discovery that the test controls.

async with registrar(turn(server), relay({"turn-1": ["127.0.0.1"]})) as ours:
    spec = await ours.publishes(ID)
    bound, writer = await ours.stream(spec.port)
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from discovery.client.contract import DiscoveryError, IssuedCredentials
from discovery.model.addresses import TargetList
from discovery.model.mesh import AllocationSpec, AnyRecord, Kind, Mesh, Record, RelaySpec, Spec, TurnSpec
from discovery.pacing.backoff import Backoff
from sniproxy.transport.base import Accepted
from tests.support.turn_servers import LOGIN, RunningServer
from tests.support.waiting import eventually
from turnreg.client.allocation import Timing
from turnreg.registrar import registrar as registrar_module
from turnreg.registrar.allocation_factory import LookUp, look_up
from turnreg.registrar.registrar import Registrar, RegistrarConfig, Retry, TurnCredentials
from turnreg.stun.auth import rest_credentials

QUICK = Retry(unreachable=Backoff(0.05, 0.2, jitter=1.0), refused=Backoff(0.05, 0.2, jitter=1.0))
ID = "gw-1.a.turn-1"


class HandDiscovery:
    """A discovery whose mesh the test sets and whose published records it reads."""

    synced = True

    def __init__(self, *records: AnyRecord) -> None:
        self.mesh = Mesh.of(records)
        self.published: dict[str, AllocationSpec] = {}
        self.issued: list[IssuedCredentials] = []
        self.writes = self.withdrawn = 0
        self._secret: tuple[str, int] | None = None
        self.broken = False
        self._callbacks: list[Callable[[Mesh], None]] = []

    def set(self, *records: AnyRecord) -> None:
        self.mesh = Mesh.of(records)
        for callback in self._callbacks:
            callback(self.mesh)

    def subscribe(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def publish(
        self,
        kind: Kind,
        id: str,  # noqa: A002
        spec: Spec,
        *,
        network: str | None = None,
        leased: bool = True,
        if_absent: bool = False,
    ) -> None:
        assert not if_absent
        assert kind is Kind.ALLOCATION
        assert isinstance(spec, AllocationSpec)
        assert network is None
        assert leased
        if self.broken:
            raise RuntimeError("broken")
        self.published[id] = spec
        self.writes += 1

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        assert kind is Kind.ALLOCATION
        del self.published[id]
        self.withdrawn += 1

    async def settled(self, timeout_s: float) -> bool:
        return True

    async def run(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def issue(self, secret: str, ttl_s: int) -> None:
        """Issue credentials from now on, as the discovery server does."""
        self._secret = secret, ttl_s

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        assert network == "a"
        if self._secret is not None:
            secret, ttl_s = self._secret
            username, password = rest_credentials(secret, "b", time.time() + ttl_s)
            return IssuedCredentials(username=username, password=password, ttl_s=ttl_s, urls=())
        if not self.issued:
            raise DiscoveryError("unavailable", "no server answers")
        return self.issued[0]


def turn(server: RunningServer, id: str = "turn-1", network: str = "a", url: str | None = None) -> AnyRecord:  # noqa: A002
    spec = TurnSpec(
        url=url or f"turn:{server.address}:{server.port}?transport=tcp",
        relay_addresses=[server.address],
        port_min=1024,
        port_max=65535,
    )
    return Record(kind=Kind.TURN, network=network, id=id, revision=1, spec=spec)


def relay(
    sources: dict[str, list[str]],
    id: str = "relay-1",  # noqa: A002
    network: str = "a",
    asks: list[str] | None = None,
) -> AnyRecord:
    spec = RelaySpec(addresses=["10.0.0.9"], ports=[443], sources=sources, asks=asks or [])
    return Record(kind=Kind.RELAY, network=network, id=id, revision=1, spec=spec)


def allocation(gateway: str) -> AnyRecord:
    """Make the record that another gateway of our network publishes."""
    spec = AllocationSpec(via="a", turn="turn-1", port=50_000, gateway=gateway)
    return Record(kind=Kind.ALLOCATION, network="b", id=f"{gateway}.a.turn-1", revision=1, spec=spec)


def rank(gateway: str) -> bytes:
    return registrar_module._rank(gateway, "a", "turn-1")


@dataclass
class Registered:
    """A running registrar, and the streams it has delivered."""

    registrar: Registrar
    discovery: HandDiscovery
    metrics: CollectorRegistry
    streams: asyncio.Queue[Accepted] = field(default_factory=asyncio.Queue)

    async def publishes(self, *ids: str) -> AllocationSpec:
        """Wait until exactly these records are published; return the first."""
        await eventually(lambda: self.discovery.published.keys() == set(ids))
        return self.discovery.published[ids[0]]

    def reconfigure(self, **changes: Any) -> None:
        """Change the configuration of the registrar."""
        self.registrar.reconfigure(dataclasses.replace(self.registrar.config, **changes))

    def retired(self) -> list[Any]:
        return [one for held in self.registrar._registrations.values() for one in held.allocations.retired]

    def of(self, via: str = "a") -> dict[str, Any]:
        return next(line for line in self.registrar.status() if line["via"] == via)

    def count(self, name: str, **labels: str) -> float:
        value = self.metrics.get_sample_value(f"crossnet_registrar_{name}", labels)
        assert value is not None, "every label is there from the start"
        return value

    async def counts(self, name: str, **labels: str) -> None:
        """Wait until a counter is above zero."""
        await eventually(lambda: self.count(name, **labels) > 0)

    async def stream(self, port: int, source: str = "127.0.0.1") -> tuple[Accepted, asyncio.StreamWriter]:
        _, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        async with asyncio.timeout(10):
            return await self.streams.get(), writer


@asynccontextmanager
async def registrar(
    *records: AnyRecord,
    turn: dict[str, TurnCredentials] | None = None,
    allowed: tuple[str, ...] = ("127.0.0.0/8",),
    linger_s: float = 0.0,
    timing: Timing | None = None,
    gateway: str = "gw-1",
    overlap_s: float = 0.0,
    look_up: LookUp = look_up,
    **options: Any,
) -> AsyncIterator[Registered]:
    """Run a registrar of network b while the block runs, then close it."""
    config = RegistrarConfig(
        network="b",
        gateway=gateway,
        turn={"a": LOGIN} if turn is None else turn,
        allow=dict.fromkeys(turn or {"a"}, TargetList.parse(allowed)) if allowed else {},
        linger_s=linger_s,
        overlap_s=overlap_s,
        retry=QUICK,
        timing=timing or Timing(),
        **{"replicas": 1} | options,
    )
    discovery = HandDiscovery(*records)
    metrics = CollectorRegistry()
    streams: asyncio.Queue[Accepted] = asyncio.Queue()
    ours = Registrar(config, discovery, metrics, look_up=look_up)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(ours.run(streams.put_nowait))
        try:
            yield Registered(ours, discovery, metrics, streams)
        finally:
            await ours.close()
            assert discovery.published == {}
            async with asyncio.timeout(5):
                await asyncio.wait({running})
    while not streams.empty():
        streams.get_nowait().stream.close()
