"""A scripted gateway: it accepts, reads the first bytes, and then answers, hangs or resets as a test wants.

async with scripted(reset, reset, opens) as gateway:      one script a connection, the last one for all that follow
    ...
    assert [visit.preamble.attempt for visit in gateway.visits] == [1, 2, 3]
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from sniproxy.engine import ByteStream, Listener, SocketStream
from sniproxy.tunnel.capsules import Payload
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.epoch import UNKNOWN_EPOCH
from sniproxy.tunnel.messages import Opened, Ready, Refused
from sniproxy.tunnel.preamble import Preamble, SigningKey, WarmPreamble, parse, read_length
from sniproxy.tunnel.state import Side
from sniproxy.tunnel.verify import PreambleVerifier

KEY = SigningKey(id="ab-1", secret=bytes(range(32)), from_network="a", to_network="b")
KEY_C = SigningKey(id="ac-1", secret=bytes(range(32, 64)), from_network="a", to_network="c")


@dataclass
class Visit:
    """One connection of a relay."""

    connection: CapsuleConnection
    first: bytes
    """What the first read returned: the preamble and what came with it in one segment."""
    began_with: Preamble | WarmPreamble

    @property
    def preamble(self) -> Preamble:
        """The preamble of a stream, which this must be."""
        assert isinstance(self.began_with, Preamble)
        return self.began_with

    @property
    def stream(self) -> ByteStream:
        return self.connection.stream

    async def payload(self, size: int) -> bytes:
        """Read this much payload."""
        got = bytearray()
        while len(got) < size:
            for event in await self.connection.read():
                if isinstance(event, Payload):
                    got += event.data
        return bytes(got)


Script = Callable[[Visit], Awaitable[None]]


@dataclass
class ScriptedGateway:
    """Where it listens, and who came."""

    address: tuple[str, int]
    visits: list[Visit] = field(default_factory=list)
    connections: int = 0


async def opens(visit: Visit) -> None:
    """READY, OPENED, and the connection stays."""
    await visit.connection.send(Ready())
    await visit.connection.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
    await asyncio.get_running_loop().create_future()


async def reset(visit: Visit) -> None:
    """Reset, as a TURN server does without a permission."""
    visit.stream.reset()


async def ends(visit: Visit) -> None:
    """A clean end in place of READY."""
    visit.stream.close()


async def silent(visit: Visit) -> None:
    """Nothing at all, ever."""
    await asyncio.get_running_loop().create_future()


async def silent_behind_ready(visit: Visit) -> None:
    await visit.connection.send(Ready())
    await asyncio.get_running_loop().create_future()


async def reset_behind_ready(visit: Visit) -> None:
    await visit.connection.send(Ready())
    await visit.stream.flushed(5)
    visit.stream.reset()


def refuses(reason: str, *, behind_ready: bool = False, detail: str = "said the test") -> Script:
    """REFUSED with this reason, then read and discard."""

    async def script(visit: Visit) -> None:
        if behind_ready:
            await visit.connection.send(Ready())
        await visit.connection.send(Refused(reason, detail))
        await visit.connection.discard()

    return script


def says(data: bytes) -> Script:
    """These bytes, whatever they mean."""

    async def script(visit: Visit) -> None:
        await visit.stream.send(data)
        await asyncio.get_running_loop().create_future()

    return script


@asynccontextmanager
async def scripted(*scripts: Script, network: str = "b", addressee: str = "gw-1") -> AsyncIterator[ScriptedGateway]:
    """Run one on loopback."""
    verifier = PreambleVerifier({key.id: key for key in (KEY, KEY_C)}, network)
    listener = await Listener.open("127.0.0.1", 0)
    gateway = ScriptedGateway(listener.address)

    async def serve(stream: SocketStream) -> None:
        script = scripts[min(gateway.connections, len(scripts) - 1)]
        gateway.connections += 1
        first = await stream.recv()
        length = read_length(first)
        assert length is not None
        verifier.epoch = parse(first[:length]).epoch or UNKNOWN_EPOCH  # what a script makes of it is its own
        preamble = verifier.verify(first[:length], addressee=addressee, now_ms=time.time_ns() // 1_000_000)
        assert preamble.to_network == network
        stream.unread(first[length:])
        visit = Visit(CapsuleConnection(stream, Side.GATEWAY), first, preamble)
        visit.connection.received = length
        gateway.visits.append(visit)
        await script(visit)

    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(serve))
        try:
            yield gateway
        finally:
            serving.cancel()
            listener.close()
