"""Short talks with an echo service through a mesh: one question and answer, or a stream that is held while something happens."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from sniproxy.engine import SocketStream
from tests.support.hellos import client_hello
from tests.support.processes import Mesh
from tests.support.streams import read_all, until_reset
from tests.support.waiting import LIMIT_S


class Held:
    """A stream that stays open; the service says back what it hears."""

    def __init__(self, wire: SocketStream) -> None:
        self.wire = wire

    async def ping(self) -> None:
        """Hold that it goes both ways."""
        message = os.urandom(2000)
        async with asyncio.timeout(LIMIT_S):
            await self.wire.send(message)
            assert await self.wire.recv_exactly(len(message)) == message

    async def end(self) -> None:
        """End it, and hold that the service's end comes."""
        self.wire.shutdown_write()
        assert await read_all(self.wire) == b""
        self.wire.close()

    async def cut(self) -> None:
        """Hold that it is reset, and not ended as if all were well."""
        await until_reset(self.wire)
        self.wire.close()


class Talk:
    """The talks with one echo service."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self._mesh = mesh
        self.name = name
        self.count = 0
        """How many streams have been through."""

    async def once(self) -> None:
        """Open a stream, ask, hear the same, see it end."""
        question = os.urandom(3000)
        client = await self._mesh.dial(self.name, behind=question)
        try:
            client.shutdown_write()
            answer = await read_all(client)
            assert answer == question, f"{answer[:16].hex()}; the relay: {self._mesh.events('relay')[-3:]}"
        finally:
            client.close()
        self.count += 1

    async def at_once(self, count: int) -> None:
        """As many streams at once."""
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(self.once())

    @asynccontextmanager
    async def going_on(self, pause_s: float = 0.02) -> AsyncIterator[None]:
        """Have one stream after the other while the block runs."""

        async def on_and_on() -> None:
            while not over.is_set():
                await self.once()
                await asyncio.sleep(pause_s)

        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(on_and_on())
            try:
                yield
            finally:
                over.set()

    async def hold(self) -> Held:
        """Open a stream that stays."""
        held = Held(await self._mesh.dial(self.name))
        await held.ping()
        return held


@asynccontextmanager
async def talking(mesh: Mesh) -> AsyncIterator[Talk]:
    """Have an echo service in network b while the block runs."""

    async def echo(wire: SocketStream) -> None:
        with suppress(OSError):  # a cut is what some tests are about: the client's side holds what must be
            await wire.recv_exactly(hello_bytes)
            while data := await wire.recv():
                await wire.send(data)
            wire.shutdown_write()

    async with mesh.serving(echo) as port:
        name = mesh.name(port)
        hello_bytes = len(client_hello(name))
        yield Talk(mesh, name)
