"""A relay of network a on loopback, with the services and gateways that a test brings.

async with a_relay() as running:
    port = await running.serve(handle)                  a service of network a itself: the local route
    client = await running.dial(name_of(port))
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from discovery.model.mesh import AnyRecord, GatewaySpec, Kind, NetworkSpec
from discovery.model.spec import FRAMED
from sniproxy.endpoints.dialer import ConnectFirst, EndpointDialer
from sniproxy.engine import Listener, SocketStream, connect
from sniproxy.engine.staggered_connect import connect_first
from sniproxy.relay.alerts import MAX_LINGERING
from sniproxy.relay.relay import Relay, RelayConfig
from sniproxy.streams.idle_streams import MIN_IDLE_S
from sniproxy.transport.base import Transport, TransportConfig
from sniproxy.transport.registry import make_transports
from sniproxy.tunnel.keys import SigningKeys
from tests.support.fixed_discovery import FixedDiscovery, record
from tests.support.hellos import client_hello
from tests.support.path import LogLines
from tests.support.scripted_gateways import KEY, KEY_C, ScriptedGateway
from tests.support.waiting import eventually

DOMAIN = "svc.mesh.internal"
LOOPBACK = TargetList.parse(["127.0.0.0/8", "[::1/128]"])
ALERT = {
    name: bytes.fromhex("150303000202") + bytes([code])
    for name, code in {"access_denied": 49, "decode_error": 50, "internal_error": 80, "unrecognized_name": 112}.items()
}
"""The alert records of RFC 8446, section 6, byte for byte."""


def name_of(port: int, network: str = "a", address: str = "127.0.0.1") -> str:
    """Return the compact name of an address."""
    return f"p{port}-{address.replace('.', '-')}.{network}.{DOMAIN}"


class StreamLines(LogLines):
    """The log lines of streams that have ended, and an event for each."""

    def __init__(self) -> None:
        super().__init__()
        self._written = asyncio.Event()

    def emit(self, line: logging.LogRecord) -> None:
        super().emit(line)
        self._written.set()

    async def until(self, holds: Callable[[], bool], limit_s: float = 20) -> None:
        """Wait until a condition holds that only changes when a line is written."""
        async with asyncio.timeout(limit_s):
            while not holds():
                self._written.clear()
                await self._written.wait()


@dataclass
class Running:
    """A running relay, with its log and metrics."""

    relay: Relay
    discovery: FixedDiscovery
    log: StreamLines
    registry: CollectorRegistry
    _group: asyncio.TaskGroup
    _closing: AsyncExitStack

    async def serve(self, handle: Callable[[SocketStream], Awaitable[None]]) -> int:
        """Run a service on loopback; return its port."""
        listener = await Listener.open("127.0.0.1", 0)
        task = self._group.create_task(listener.serve(handle))
        self._closing.callback(listener.close)
        self._closing.callback(task.cancel)
        return listener.address[1]

    def add(
        self,
        gateway: ScriptedGateway,
        *,
        network: str = "b",
        name: str = "gw-1",
        zone: str = "",
        proto: Sequence[str] = (),
    ) -> None:
        """Publish a scripted gateway that is dialled directly. `proto`: what it speaks beside `framed/1`."""
        address, port = gateway.address
        spec = GatewaySpec(address=f"{address}:{port}", zone=zone, proto=[FRAMED, *proto])
        self.discovery.put(record(Kind.GATEWAY, network, name, spec))

    async def connect(self) -> SocketStream:
        """Connect to the relay as a client."""
        return await connect(*self.relay.addresses[0], timeout_s=10)

    async def dial(self, name: str, *, behind: bytes = b"") -> SocketStream:
        """Connect and send a ClientHello for `name`, with `behind` in the same write."""
        client = await self.connect()
        await client.send(client_hello(name) + behind)
        return client

    async def ended(self, count: int = 1) -> list[dict[str, object]]:
        """Wait until so many streams have ended, and return their log lines."""
        await self.log.until(lambda: len(self.log.events) >= count)
        return self.log.events

    async def settled(self, streams: int = 0) -> None:
        """Wait until no more than so many streams are left."""
        await self.log.until(lambda: len(self.relay.ledger) <= streams)

    async def opened(self, count: int = 1, *, state: str = "open") -> None:
        """Wait until so many streams are open, or in another state."""
        await eventually(lambda: sum(row["state"] == state for row in self.relay.ledger.rows()) >= count)

    def sample(self, name: str, **labels: str) -> float:
        """Return the value of a metric."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def counted(self, reason: str) -> float:
        """Return how many streams ended for this reason, according to the metrics."""
        return self.sample("crossnet_relay_streams_total", reason=reason)


@asynccontextmanager
async def a_relay(
    *records: AnyRecord,
    transports: Callable[[TransportConfig], Sequence[Transport]] = make_transports,
    dial: ConnectFirst = connect_first,
    max_lingering: int = MAX_LINGERING,
    min_idle_s: float = MIN_IDLE_S,
    **config: object,
) -> AsyncIterator[Running]:
    """Run a relay that delivers to loopback and dials gateways there; `config` are fields of RelayConfig."""
    fields = {
        "id": "relay-1",
        "network": "a",
        "domain": DOMAIN,
        "listen": (("127.0.0.1", 0),),
        "deliver": LOOPBACK,
        "direct": LOOPBACK,
        "new_streams_per_s": 0,
    } | config
    networks = [record(Kind.NETWORK, name, name, NetworkSpec()) for name in ("a", "b", "c")]
    discovery = FixedDiscovery(*networks, *records)
    registry = CollectorRegistry()
    keys = SigningKeys({key.id: key for key in (KEY, KEY_C)})
    relay = Relay(
        RelayConfig(**fields),  # type: ignore[arg-type]
        discovery,
        keys,
        registry=registry,
        transports=transports,
        endpoints=EndpointDialer("relay", registry, connect=dial),
        max_lingering=max_lingering,
        min_idle_s=min_idle_s,
    )
    await relay.open()
    logger, lines = logging.getLogger("crossnet.relay"), StreamLines()
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(relay.run())
            closing = AsyncExitStack()
            try:
                yield Running(relay, discovery, lines, registry, group, closing)
            finally:
                await closing.aclose()
                task.cancel()
    finally:
        logger.removeHandler(lines)
