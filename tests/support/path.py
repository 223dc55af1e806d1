"""A whole path in one process: client → relay → TURN server → gateway → service, every connection a real one.

    async with a_path("coturn") as path:
        client = await path.dial("p8443-127-0-0-1.b.svc.mesh.internal")

The TURN server is coturn or the embedded one. Without a TURN server, the gateway listens ("direct"), or the transport in memory
is used ("memory", without sockets). The test provides the services.
"""

import asyncio
import logging
import pathlib
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

import trustme
from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from discovery.model.mesh import AllocationSpec, GatewaySpec, Kind, NetworkSpec, RelaySpec, TurnSpec
from discovery.model.spec import FRAMED
from sniproxy.engine import Listener, SocketStream, connect
from sniproxy.relay.relay import Relay, RelayConfig
from sniproxy.tunnel import heartbeat
from sniproxy.tunnel.epoch import proto_of
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.preamble import UNDERSCORES, SigningKey
from tests.support import memory_transport
from tests.support.coturn import Coturn
from tests.support.fixed_discovery import FixedDiscovery, record
from tests.support.hellos import client_hello
from turnreg.client.allocation import Allocation, Credentials, Timing
from turnreg.gateway.gateway import Gateway, GatewayConfig
from turnreg.registrar.allocation_factory import TlsDial
from turnreg.registrar.registrar import accepted
from turnreg.server.config import TurnServerConfig
from turnreg.server.server import TurnServer

DOMAIN = "svc.mesh.internal"
LOOPBACK = TargetList.parse(["127.0.0.0/8"])
ALLOCATION = "gw-1-a-turn-1"


class LogLines(logging.Handler):
    """The events that a logger wrote, as dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, object]] = []
        self._changed = asyncio.Event()

    def emit(self, line: logging.LogRecord) -> None:
        event = getattr(line, "event", None)
        if event is not None:
            self.events.append(event)
            self._changed.set()

    async def wait_for(self, count: int, limit_s: float = 20) -> list[dict[str, object]]:
        """Wait until `count` events are logged, and return all. AssertionError if they do not come in time."""
        try:
            async with asyncio.timeout(limit_s):
                while len(self.events) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not within {limit_s:g} s: {count} log events; logged: {self.events}") from None
        return self.events


@dataclass
class Path:
    """The running parts, and the logs of relay and gateway."""

    relay: Relay
    gateway: Gateway
    discovery: FixedDiscovery
    turn: "Coturn | TurnServer | None"
    allocation: Allocation | None
    relay_log: LogLines
    gateway_log: LogLines
    _group: asyncio.TaskGroup
    _closing: AsyncExitStack
    hello_of: dict[str, bytes] = field(default_factory=dict)

    async def serve(self, handle: Callable[[SocketStream], Awaitable[None]]) -> int:
        """Run a service on loopback in network b. Returns its port."""
        listener = await Listener.open("127.0.0.1", 0)
        task = self._group.create_task(listener.serve(handle))
        self._closing.callback(task.cancel)
        return listener.address[1]

    async def connect(self) -> SocketStream:
        """Connect to the relay as a client does."""
        return await connect(*self.relay.addresses[0], timeout_s=10)

    async def dial(self, name: str, *, hello: bytes | None = None, behind: bytes = b"") -> SocketStream:
        """Connect and send a ClientHello for `name`, with `behind` in the same write."""
        client = await self.connect()
        await client.send((hello or client_hello(name)) + behind)
        return client

    async def ended(
        self, count: int = 1, limit_s: float = 20
    ) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        """Wait until relay and gateway have logged the end of `count` streams. Returns both lists of log events."""
        return await self.relay_log.wait_for(count, limit_s), await self.gateway_log.wait_for(count, limit_s)


def name_of(port: int, address: str = "127.0.0.1") -> str:
    """The compact name of an address in network b."""
    return f"p{port}-{address.replace('.', '-')}.b.{DOMAIN}"


def service_hello(name: str) -> bytes:
    """Return the ClientHello that the service reads first."""
    return client_hello(name)


def proto(gateway: Gateway) -> list[str]:
    """Return the `proto` entry for records of this gateway."""
    return [FRAMED, proto_of(gateway.epoch), heartbeat.PROTO, UNDERSCORES]


@asynccontextmanager
async def a_path(
    turn: str, *, bind_delay_s: float = 0.0, coturn_options: tuple[str, ...] = (), timing: Timing | None = None
) -> AsyncIterator[Path]:
    """Run the parts of networks a and b on loopback.

    Args:
        turn: "coturn", "embedded", "direct" or "memory".
        bind_delay_s: delay before the gateway binds an announced peer, as if it were far away.
    """
    key = SigningKey(id="ab-1", secret=secrets.token_bytes(32), from_network="a", to_network="b")
    discovery = FixedDiscovery(
        record(Kind.NETWORK, "a", "a", NetworkSpec()),
        record(Kind.NETWORK, "b", "b", NetworkSpec()),
        record(Kind.RELAY, "a", "relay-1", RelaySpec(addresses=["127.0.0.1"], ports=[443])),
    )
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        registry = CollectorRegistry()
        direct = LOOPBACK
        if turn == "memory":
            stack.enter_context(memory_transport.registered())
            direct = TargetList.parse(["127.255.0.0/16"])
        relay = Relay(
            RelayConfig(id="relay-1", network="a", domain=DOMAIN, listen=(("127.0.0.1", 0),), direct=direct),
            discovery,
            SigningKeys({key.id: key}),
            registry=registry,
        )
        await relay.open()
        gateway = Gateway(
            GatewayConfig(
                id="gw-1",
                network="b",
                domain=DOMAIN,
                allow=LOOPBACK,
                listen=(("127.0.0.1", 0),) if turn == "direct" else (),
            ),
            discovery,
            {key.id: key},
            registry=registry,
        )
        await gateway.open()
        tasks = [group.create_task(relay.run()), group.create_task(gateway.run())]
        closing = AsyncExitStack()
        path = Path(relay, gateway, discovery, None, None, LogLines(), LogLines(), group, closing)
        for role, lines in (("relay", path.relay_log), ("gateway", path.gateway_log)):
            logger = logging.getLogger(f"crossnet.{role}")
            logger.setLevel(logging.INFO)
            logger.addHandler(lines)
            stack.callback(logger.removeHandler, lines)
        if turn == "direct":
            address, port = gateway.addresses[0]
            discovery.put(
                record(Kind.GATEWAY, "b", "gw-1", GatewaySpec(address=f"{address}:{port}", proto=proto(gateway)))
            )
        elif turn == "memory":
            acceptor = memory_transport.MemoryAcceptor("gw-1")
            stack.callback(acceptor.close)
            tasks.append(group.create_task(acceptor.run(gateway.take)))
            address, port = acceptor.address
            discovery.put(
                record(Kind.GATEWAY, "b", "gw-1", GatewaySpec(address=f"{address}:{port}", proto=proto(gateway)))
            )
        else:
            tasks += await _join_turn(path, turn, group, stack, bind_delay_s, coturn_options, timing)
        try:
            yield path
        finally:
            await closing.aclose()
            for task in tasks:
                task.cancel()


async def _join_turn(
    path: Path,
    kind: str,
    group: asyncio.TaskGroup,
    stack: AsyncExitStack,
    bind_delay_s: float,
    coturn_options: tuple[str, ...],
    timing: Timing | None,
) -> list[asyncio.Task[None]]:
    tasks = []
    kind, _, tls = kind.partition("-")
    client_context, pem = (
        ssl.create_default_context(),
        pathlib.Path(stack.enter_context(TemporaryDirectory())) / "turn.pem",
    )
    if tls:
        authority = trustme.CA()
        authority.configure_trust(client_context)
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
    if kind == "coturn":
        server = Coturn(user="gw", password="p", extra=coturn_options, certificate=pem if tls else None)
        await asyncio.to_thread(server.start)
        stack.callback(server.close)
        path.turn = server
        address, port, (low, high) = server.address, server.port, server.relay_range
    else:
        low, high = 20_000 + secrets.randbelow(90) * 100, 31_000
        config = TurnServerConfig(
            listen=() if tls else (("127.0.0.1", 0),),
            listen_tls=(("127.0.0.1", 0),) if tls else (),
            tls_cert=pem if tls else None,
            tls_key=pem if tls else None,
            relay_addresses=("127.0.0.1",),
            realm="lab",
            port_min=low,
            port_max=high,
            users={"gw": "p"},
            allowed_peers=LOOPBACK,
        )
        path.turn = embedded = await TurnServer.open(config)
        tasks.append(group.create_task(embedded.run()))
        address, port = (embedded.tls_addresses if tls else embedded.addresses)[0]

    dial = TlsDial(client_context, address) if tls else connect

    async def late(address: str, port: int, *, timeout_s: float) -> SocketStream:
        if path.allocation is not None and path.allocation.relayed is not None:
            await asyncio.sleep(bind_delay_s)
        return await dial(address, port, timeout_s=timeout_s)

    path.allocation = Allocation(
        address=address,
        port=port,
        credentials=Credentials(username="gw", password="p"),
        on_stream=lambda bound: path.gateway.take(accepted(bound)),
        via="a",
        turn="turn-1",
        record=ALLOCATION,
        peers=frozenset({"127.0.0.1"}),
        dial=late,
        timing=timing,
    )
    ready = asyncio.Event()
    tasks.append(group.create_task(path.allocation.run(ready.set)))
    async with asyncio.timeout(15):
        await ready.wait()
    assert path.allocation.relayed is not None
    path.discovery.put(
        record(
            Kind.TURN,
            "a",
            "turn-1",
            TurnSpec(
                url=f"turn:{address}:{port}?transport=tcp", relay_addresses=["127.0.0.1"], port_min=low, port_max=high
            ),
        ),
        record(
            Kind.ALLOCATION,
            "b",
            ALLOCATION,
            AllocationSpec(
                via="a",
                turn="turn-1",
                port=path.allocation.relayed[1],
                gateway="gw-1",
                proto=proto(path.gateway),
            ),
        ),
    )
    return tasks
