"""A gateway of network b on loopback, and relays of network a as tests want them.

async with a_gateway() as running:
    service = await running.service()                                   which network b's records know
    visit = await running.visit(preamble(service.target, HELLO), HELLO)      connect, preamble, ClientHello
    assert await visit.answer() == Ready()
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from discovery.model.mesh import AnyRecord, Kind, ServiceSpec
from sniproxy.endpoints.dialer import ConnectFirst, EndpointDialer
from sniproxy.engine import ByteStream, Listener, SocketStream, connect
from sniproxy.engine.staggered_connect import connect_first
from sniproxy.transport.base import Accepted
from sniproxy.transport.turn import TURN
from sniproxy.tunnel.bridge import DEFAULT_TIMING, BridgeTiming
from sniproxy.tunnel.capsules import CapsuleType, header
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Message, Opened, Ready, Refused, Waiting
from sniproxy.tunnel.preamble import Preamble, SigningKey, sign
from sniproxy.tunnel.state import Side
from tests.support.fixed_discovery import FixedDiscovery, record
from tests.support.path import LogLines
from tests.support.preambles import KEY
from tests.support.streams import pair
from turnreg.gateway.config import GatewayConfig
from turnreg.gateway.gateway import Gateway

LOOPBACK = TargetList.parse(["127.0.0.0/8"])
ALLOCATION = "gw-1-a-turn-1"


def data(payload: bytes, *, final: bool = False) -> bytes:
    """One DATA or FINAL_DATA capsule."""
    return header(CapsuleType.FINAL_DATA if final else CapsuleType.DATA, len(payload)) + payload


class StreamLines(LogLines):
    """The log lines of streams, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._arrived = asyncio.Event()

    def emit(self, line: logging.LogRecord) -> None:
        super().emit(line)
        self._arrived.set()

    async def reach(self, count: int) -> None:
        """Wait until there are so many."""
        while len(self.events) < count:
            self._arrived.clear()
            await self._arrived.wait()


@dataclass
class Visit:
    """A relay's connection to the gateway."""

    connection: CapsuleConnection
    is_ready: bool = False
    """The gateway has said READY."""
    waiting_s: int | None = None
    """How long waking the service may take, as the gateway said."""

    @property
    def stream(self) -> ByteStream:
        return self.connection.stream

    async def answer(self) -> Message:
        """Wait for the next message of the gateway, other than WAITING."""
        async with asyncio.timeout(10):
            while True:
                message = await self.connection.next_message()
                self.is_ready = self.is_ready or message == Ready()
                if not isinstance(message, Waiting):
                    return message
                self.waiting_s = message.seconds

    async def held(self) -> None:
        """Wait until the gateway says that it wakes the service."""
        assert await self.answer() == Ready()
        async with asyncio.timeout(10):
            message = await self.connection.next_message()
        assert isinstance(message, Waiting), message
        self.waiting_s = message.seconds

    async def refused(self, *, after_ready: bool = False) -> Refused:
        """Wait for the refusal and disconnect, as a relay does."""
        if after_ready and not self.is_ready:
            assert await self.answer() == Ready()
        answer = await self.answer()
        assert isinstance(answer, Refused), answer
        self.stream.close()
        return answer

    async def opened(self) -> None:
        """Wait until the stream is opened."""
        if not self.is_ready:
            assert await self.answer() == Ready()
        assert isinstance(await self.answer(), Opened)


@dataclass
class Service:
    """A service on loopback that echoes and records its connections."""

    endpoint: str
    target: str
    """What a preamble asks for."""
    streams: list[SocketStream] = field(default_factory=list)
    got: list[bytearray] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    """How streams ended, in the order of their ends: "fin" or "reset"."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def echo(self, stream: SocketStream) -> None:
        """Serve one stream."""
        self.streams.append(stream)
        self.got.append(got := bytearray())
        self._changed.set()
        try:
            while piece := await stream.recv():
                got += piece
                self._changed.set()
                await stream.send(piece)
            stream.shutdown_write()
            self.ends.append("fin")
        except OSError:
            self.ends.append("reset")
        self._changed.set()

    async def reach(self, condition: Callable[["Service"], object]) -> None:
        """Wait until something is true of the streams that came."""
        async with asyncio.timeout(20):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def received(self, size: int) -> bytes:
        """Wait until the first stream has brought so many bytes, and give all that it has."""
        await self.reach(lambda service: service.got and len(service.got[0]) >= size)
        return bytes(self.got[0])


@dataclass
class Running:
    """A running gateway, with its log lines and metrics."""

    gateway: Gateway
    discovery: FixedDiscovery
    log: StreamLines
    registry: CollectorRegistry
    _task: asyncio.Task[None]
    _group: asyncio.TaskGroup
    _closing: AsyncExitStack

    async def service(self, name: str = "orders.shop.example", *, known: bool = True) -> Service:
        """Run a service that gives back what it gets; `known`: discovery has its record."""
        listener = await Listener.open("127.0.0.1", 0)
        made = Service(f"127.0.0.1:{listener.address[1]}", f"{name}:8443")
        if known:
            spec = ServiceSpec(name=name, ports={"8443": [made.endpoint]})
            self.discovery.put(record(Kind.SERVICE, self.gateway.config.network, name, spec))

        task = self._group.create_task(listener.serve(made.echo))
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
        await visit.stream.send(first, *map(data, payload))
        visit.connection.sent = len(first)
        return visit

    async def bound(self) -> Visit:
        """Connect as if through a TURN server."""
        near, far = await pair()
        self.gateway.take(
            Accepted(stream=far, traits=TURN, addressee=ALLOCATION, came_by={"via": "a", "turn": "turn-1"})
        )
        return Visit(CapsuleConnection(near, Side.RELAY))

    async def ended(self, count: int = 1) -> list[dict[str, object]]:
        """Wait until so many streams have ended, and give their log lines."""
        async with asyncio.timeout(20):
            await self.log.reach(count)
        return self.log.events

    async def stopped(self) -> None:
        """Wait until a gateway that was closed has ended."""
        async with asyncio.timeout(20):
            await asyncio.wait({self._task})


@asynccontextmanager
async def a_gateway(
    *records: AnyRecord,
    keys: tuple[SigningKey, ...] = (KEY,),
    dial: ConnectFirst = connect_first,
    timing: BridgeTiming = DEFAULT_TIMING,
    **config: object,
) -> AsyncIterator[Running]:
    """Run a gateway that delivers to loopback, connecting by `dial`; `config` are fields of GatewayConfig."""
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
        endpoints=EndpointDialer("gateway", registry, connect=dial),
        timing=timing,
    )
    await gateway.open()
    logger, lines = logging.getLogger("crossnet.gateway"), StreamLines()
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(gateway.run())
            await asyncio.sleep(0)  # what comes by an allocation is taken once it runs
            closing = AsyncExitStack()
            try:
                yield Running(gateway, discovery, lines, registry, task, group, closing)
            finally:
                await closing.aclose()
                task.cancel()
    finally:
        logger.removeHandler(lines)
