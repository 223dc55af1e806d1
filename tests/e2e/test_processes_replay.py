"""A stream captured for one gateway process is refused by the next one, after restarts, crashes and upgrades.

The gateway is a real process that relays reach directly, with a static mesh file, which has no epoch. The relays are in this
process and have clocks of their own.
"""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sniproxy.engine import Listener, SocketStream, connect
from sniproxy.formats.client_hello import HelloReader
from sniproxy.relay.upstreams import Upstreams
from sniproxy.transport.base import Candidate
from sniproxy.transport.direct import DIRECT
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.messages import Opened, Refused
from sniproxy.tunnel.preamble import SigningKey
from sniproxy.tunnel.relay_handshake import GatewayConnector, StreamRequest
from sniproxy.tunnel.state import Side
from tests.support.hellos import client_hello
from tests.support.running import Running
from tests.support.stream_requests import upstreams
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

GATEWAY = """
network: b
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 10s
handover: over.sock
keys: {{ab-1: {{file: ab.key, from: a, to: b}}}}
gateway: {{id: gw-1, listen: "127.0.0.1:{port}", allow: ["127.0.0.1/32"]}}
"""

SKEWS = [-50_000, 0, 50_000]


@dataclass
class Site:
    """A gateway process, a service behind it, and operations of relays."""

    folder: Path
    key: SigningKey
    port: int
    service: Listener
    group: asyncio.TaskGroup
    hellos: list[bytes] = field(default_factory=list)
    """The first bytes of each stream at the service."""
    processes: list[Running] = field(default_factory=list)

    def start(self) -> Running:
        process = Running(self.folder, GATEWAY.format(port=self.port), name=f"gateway-{len(self.processes)}")
        self.processes.append(process)
        return process

    @property
    def way(self) -> Candidate:
        return self.reached_at(self.port)

    def reached_at(self, port: int) -> Candidate:
        target = f"127.0.0.1:{self.service.address[1]}"
        return Candidate(traits=DIRECT, network="b", target=target, address="127.0.0.1", port=port, addressee="gw-1")

    def relay(self, skew_ms: int = 0) -> Upstreams:
        """Return a relay of network a with a clock skew."""
        return upstreams(
            GatewayConnector("a", SigningKeys({"ab-1": self.key}), now_ms=lambda: time.time_ns() // 1_000_000 + skew_ms)
        )

    def call(self) -> StreamRequest:
        data = client_hello(f"p{self.service.address[1]}-127-0-0-1.b.svc.mesh.internal")
        hello = HelloReader().feed(data)
        assert hello is not None
        return StreamRequest(
            stream=os.urandom(16), client=("10.0.0.1", 1), local=("10.0.0.2", 2), hello=hello, data=data
        )

    async def stream(self, relay: Upstreams, port: int | None = None) -> int:
        """Open a stream, check that the service has it, and end it. Returns the number of attempts."""
        connected = await relay.connect(self.call(), [self.reached_at(port or self.port)])
        assert connected.connection is not None
        while not await connected.connection.read():
            pass
        connected.stream.close()
        return connected.attempts

    async def captured(self, relay: Upstreams) -> bytes:
        """Open a stream through a tap. Returns the bytes that the relay sent on the successful connection."""
        kept: list[bytearray] = []

        async def between(stream: SocketStream) -> None:
            seen = bytearray()
            kept.append(seen)
            onward = await connect("127.0.0.1", self.port, timeout_s=10)
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(stream, onward, seen))
                group.create_task(_copy(onward, stream, bytearray()))

        tap = await Listener.open("127.0.0.1", 0)
        task = self.group.create_task(tap.serve(between))
        await self.stream(relay, tap.address[1])
        tap.close()
        task.cancel()
        return bytes(kept[-1])

    async def replay(self, data: bytes) -> str:
        """Send captured bytes to the current process. Returns the reason of REFUSED, or "opened"."""
        stream = await connect("127.0.0.1", self.port, timeout_s=10)
        try:
            await stream.send(data)
            connection = CapsuleConnection(stream, Side.RELAY)
            async with asyncio.timeout(10):
                while True:
                    message = await connection.next_message()
                    if isinstance(message, Refused):
                        return message.reason
                    if isinstance(message, Opened):
                        return "opened"
        finally:
            stream.close()


async def _copy(source: SocketStream, sink: SocketStream, keep: bytearray) -> None:
    try:
        while data := await source.recv():
            keep += data
            await sink.send(data)
    except OSError:
        pass
    finally:
        sink.reset()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with a_site(tmp_path) as site:
        yield site


@asynccontextmanager
async def a_site(folder: Path) -> AsyncIterator[Site]:
    secret = secrets.token_bytes(32)
    (folder / "ab.key").touch(0o600)
    (folder / "ab.key").write_text(secret.hex())
    (folder / "mesh.yaml").write_text("networks: [{id: a}, {id: b}]")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    service = await Listener.open("127.0.0.1", 0)
    key = SigningKey(id="ab-1", secret=secret, from_network="a", to_network="b")
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        site = Site(folder, key, port, service, group)

        async def serve(stream: SocketStream) -> None:
            try:
                hello = await stream.recv()
                site.hellos.append(hello)
                await stream.send(hello)
                while await stream.recv():
                    pass
            except OSError:
                pass
            finally:
                stream.close()

        serving = group.create_task(service.serve(serve))
        stack.callback(lambda: [process.kill() for process in site.processes])  # type: ignore[func-returns-value]
        try:
            yield site
        finally:
            serving.cancel()


@pytest.mark.parametrize("skew_ms", SKEWS)
@pytest.mark.parametrize("how", ["restart", "crash"])
async def test_a_captured_stream_is_refused_by_the_next_process(site: Site, how: str, skew_ms: int) -> None:
    first = site.start()
    first.started()
    relay = site.relay(skew_ms)
    capture = await site.captured(relay)
    assert await site.replay(capture) == "replay", "its own process has seen it before"
    if how == "restart":
        await asyncio.to_thread(first.end)
    else:
        first.kill()
    second = site.start()
    second.started()
    served = len(site.hellos)
    assert await site.replay(capture) == "stale_epoch"
    assert len(site.hellos) == served, "nothing of it was delivered"
    # The relay knows the first process's epoch, and learns the second's from the refusal.
    assert await site.stream(relay) == 2
    assert await site.stream(relay) == 1
    assert await site.stream(site.relay(skew_ms)) == 2, "a relay without any epoch learns it, too"


@pytest.mark.parametrize("skew_ms", [-70_000, 70_000])
async def test_a_clock_skew_that_is_too_large_is_reported_with_its_size(site: Site, skew_ms: int) -> None:
    site.start().started()
    with pytest.raises(Exception, match=r"clock_skew: .*the relay in 'a' is (69|70)\.\d s (ahead of|behind)"):
        await site.stream(site.relay(skew_ms))


async def test_an_upgrade_accepts_no_replay_and_loses_no_stream(site: Site) -> None:
    first = site.start()
    first.started()
    relays = [site.relay(skew_ms) for skew_ms in SKEWS]
    captures = [await site.captured(relay) for relay in relays]
    over = asyncio.Event()
    answers: set[str] = set()
    streams = 0

    async def honest(number: int) -> None:
        nonlocal streams
        while not over.is_set():
            await site.stream(relays[number])
            streams += 1

    async def replaying() -> None:
        while not over.is_set():
            for capture in captures:
                answers.add(await site.replay(capture))

    async with asyncio.TaskGroup() as group:
        for number in range(len(relays)):
            group.create_task(honest(number))
        group.create_task(replaying())
        await eventually(lambda: streams >= 20 and answers, what="streams before the upgrade")
        second = site.start()
        await asyncio.to_thread(second.started)
        await asyncio.to_thread(first.wait_for, "handed_over")
        before = streams
        await eventually(lambda: streams >= before + 20, what="streams after the upgrade")
        over.set()
    assert answers == {"replay", "stale_epoch"}
    assert first.process.wait(20) == 0
    assert len(site.hellos) == streams + len(captures), "each stream was delivered once"
