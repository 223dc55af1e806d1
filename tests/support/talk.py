"""Streams to an echo service through a mesh: one question and answer, or a stream that is held open while something happens."""

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
    """An open stream to the echo service."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream

    async def ping(self) -> None:
        """Check that both directions work."""
        message = os.urandom(2000)
        async with asyncio.timeout(LIMIT_S):
            await self.stream.send(message)
            assert await self.stream.recv_exactly(len(message)) == message

    async def end(self) -> None:
        """End our direction, and check that the service ends its own."""
        self.stream.shutdown_write()
        assert await read_all(self.stream) == b""
        self.stream.close()

    async def cut(self) -> None:
        """Check that it is reset, not cleanly ended."""
        await until_reset(self.stream)
        self.stream.close()


class Talk:
    """Opens streams to one echo service."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self._mesh = mesh
        self.name = name
        self.count = 0
        """Number of streams that `once` has completed."""

    async def once(self) -> None:
        """Open a stream, send data, and check that the same data and the end come back."""
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
        """Run `once` for `count` streams at the same time."""
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(self.once())

    @asynccontextmanager
    async def repeating(self, pause_s: float = 0.02) -> AsyncIterator[None]:
        """Run `once` repeatedly while the block runs."""

        async def repeat() -> None:
            while not over.is_set():
                await self.once()
                await asyncio.sleep(pause_s)

        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(repeat())
            try:
                yield
            finally:
                over.set()

    async def hold(self) -> Held:
        """Open a stream and keep it open."""
        held = Held(await self._mesh.dial(self.name))
        await held.ping()
        return held


@asynccontextmanager
async def talking(mesh: Mesh) -> AsyncIterator[Talk]:
    """Run an echo service in network b while the block runs."""

    async def echo(stream: SocketStream) -> None:
        with suppress(OSError):  # some tests cut streams; the client's side checks the outcome
            await stream.recv_exactly(hello_bytes)
            while data := await stream.recv():
                await stream.send(data)
            stream.shutdown_write()

    async with mesh.serving(echo) as port:
        name = mesh.name(port)
        hello_bytes = len(client_hello(name))
        yield Talk(mesh, name)
