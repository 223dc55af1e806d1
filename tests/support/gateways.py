"""A gateway of network b on loopback, and relays of network a as tests want them.

async with a_gateway() as running:
    service = await running.service()                                   which network b's records know
    visit = await running.visit(preamble(service.target, HELLO), HELLO)      connect, preamble, ClientHello
    assert await visit.answer() == Ready()
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from discovery.model.mesh import AnyRecord, Kind, ServiceSpec
from sniproxy.engine import ByteStream, Listener, SocketStream, connect
from sniproxy.transport.base import Accepted
from sniproxy.transport.turn import TURN
from sniproxy.tunnel.capsules import CapsuleType, header
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Message, Opened, Ready, Refused, Waiting
from sniproxy.tunnel.preamble import Preamble, SigningKey, sign
from sniproxy.tunnel.state import Side
from tests.support.fixed_discovery import FixedDiscovery, record
from tests.support.path import LogLines
from tests.support.preambles import KEY
from tests.support.streams import pair
from turnreg.gateway.gateway import Gateway, GatewayConfig

LOOPBACK = TargetList.parse(["127.0.0.0/8"])
ALLOCATION = "gw-1-a-turn-1"


def data(payload: bytes, *, final: bool = False) -> bytes:
    """One DATA or FINAL_DATA capsule."""
    return header(CapsuleType.FINAL_DATA if final else CapsuleType.DATA, len(payload)) + payload


@dataclass
class Visit:
    """A relay's connection to the gateway."""

    framed: CapsuleConnection
    waiting_s: int | None = None
    """How long the gateway said that it may take to wake the service."""

    @property
    def wire(self) -> ByteStream:
        return self.framed.stream

    async def answer(self) -> Message:
        """Wait for what the gateway says next."""
        async with asyncio.timeout(10):
            while True:
                message = await self.framed.next_message()
                if not isinstance(message, Waiting):
                    return message
                self.waiting_s = message.seconds

    async def refused(self, *, after_ready: bool = False) -> Refused:
        """Wait for the refusal and go, as a relay does."""
        answer = await self.answer()
        if after_ready:
            assert answer == Ready()
            answer = await self.answer()
        assert isinstance(answer, Refused), answer
        self.wire.close()
        return answer

    async def opened(self) -> None:
        """See that the stream is opened."""
        assert await self.answer() == Ready()
        assert isinstance(await self.answer(), Opened)


@dataclass
class Service:
    """A service on loopback that echoes; it counts who came."""

    endpoint: str
    target: str
    """What a preamble asks for."""
    wires: list[SocketStream] = field(default_factory=list)
    got: list[bytearray] = field(default_factory=list)


@dataclass
class Running:
    """A gateway that runs, and what it says."""

    gateway: Gateway
    discovery: FixedDiscovery
    log: LogLines
    registry: CollectorRegistry
    _group: asyncio.TaskGroup
    _closing: AsyncExitStack

    async def service(self, name: str = "orders.shop.example", *, known: bool = True) -> Service:
        """Run a service that gives back what it gets; `known`: discovery has its record."""
        listener = await Listener.open("127.0.0.1", 0)
        made = Service(f"127.0.0.1:{listener.address[1]}", f"{name}:8443")
        if known:
            spec = ServiceSpec(name=name, ports={"8443": [made.endpoint]})
            self.discovery.put(record(Kind.SERVICE, self.gateway.config.network, name, spec))

        async def echo(wire: SocketStream) -> None:
            made.wires.append(wire)
            made.got.append(got := bytearray())
            while piece := await wire.recv():
                got += piece
                await wire.send(piece)
            wire.shutdown_write()

        task = self._group.create_task(listener.serve(echo))
        self._closing.callback(listener.close)
        self._closing.callback(task.cancel)
        return made

    async def connect(self) -> Visit:
        """Connect to the gateway's own listener."""
        return Visit(CapsuleConnection(await connect(*self.gateway.addresses[0], timeout_s=10), Side.RELAY))

    async def visit(
        self, preamble: Preamble | bytes, *payload: bytes, key: SigningKey = KEY, behind_turn: bool = False
    ) -> Visit:
        """Connect and send a preamble, signed or as it is, and each payload in a DATA capsule."""
        visit = await (self.bound() if behind_turn else self.connect())
        first = preamble if isinstance(preamble, bytes) else sign(preamble, key.secret)
        await visit.wire.send(first, *map(data, payload))
        visit.framed.sent = len(first)
        return visit

    async def bound(self) -> Visit:
        """Come by an allocation, as if a TURN server had been between."""
        near, far = await pair()
        self.gateway.take(
            Accepted(stream=far, traits=TURN, addressee=ALLOCATION, came_by={"via": "a", "turn": "turn-1"})
        )
        return Visit(CapsuleConnection(near, Side.RELAY))

    async def ended(self, count: int = 1) -> list[dict[str, object]]:
        """Wait until so many streams have ended, and give their log lines."""
        async with asyncio.timeout(20):
            while len(self.log.events) < count:
                await asyncio.sleep(0.002)
        return self.log.events


@asynccontextmanager
async def a_gateway(
    *records: AnyRecord, keys: tuple[SigningKey, ...] = (KEY,), **config: object
) -> AsyncIterator[Running]:
    """Run a gateway that delivers to loopback; `config` are fields of GatewayConfig."""
    fields = {
        "id": "gw-1",
        "network": "b",
        "domain": "svc.mesh.internal",
        "allow": LOOPBACK,
        "listen": (("127.0.0.1", 0),),
    } | config
    discovery, registry = FixedDiscovery(*records), CollectorRegistry()
    gateway = Gateway(
        GatewayConfig(**fields),  # type: ignore[arg-type]
        discovery,
        {key.id: key for key in keys},
        registry=registry,
    )
    await gateway.open()
    logger, lines = logging.getLogger("crossnet.gateway"), LogLines()
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(gateway.run())
            await asyncio.sleep(0)  # what comes by an allocation is taken once it runs
            closing = AsyncExitStack()
            try:
                yield Running(gateway, discovery, lines, registry, group, closing)
            finally:
                await closing.aclose()
                task.cancel()
    finally:
        logger.removeHandler(lines)
