"""Slow and fast readers behind joined streams: what the kernel holds for them, and that no byte is lost."""

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sniproxy.engine import CopyDirection, PipePool, SocketStream, Splice, direction_memory
from sniproxy.engine.copy import RUNNING
from tests.support.delayed_link import delayed_hosts
from tests.support.streams import pair, read_all
from tests.support.two_hosts import THERE
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
LIMITS: dict[str, Any] = {"idle_timeout_s": 60.0, "half_close_timeout_s": 20.0}
FAR_S = 0.05


class Joined:
    """A sender, two streams that are joined, and a reader."""

    def __init__(self, left: SocketStream, a: SocketStream, b: SocketStream, right: SocketStream) -> None:
        self.source, self.reader = left, right
        self.pool = PipePool()
        self.splice = Splice(a, b, **LIMITS, pool=self.pool)

    @property
    def way(self) -> CopyDirection:
        return self.splice.a_to_b

    def pace(self) -> str:
        return "fast" if self.way.is_fast else "slow"

    def held(self) -> int:
        return sum(self.way.held().values())

    async def settled(self) -> int:
        """Wait until nothing moves any more, and return what is held."""
        before = -1

        async def stands() -> bool:
            nonlocal before
            last, before = before, self.way.moved
            await asyncio.sleep(0.3)
            return last == before

        await eventually(stands)
        return self.held()


@pytest.fixture
async def joined() -> AsyncIterator[Joined]:
    left, a = await pair()
    right, b = await pair()
    made = Joined(left, a, b, right)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(made.splice.run())
        yield made
        running.cancel()
    left.close()
    right.close()
    assert made.pool.taken == 0
    made.pool.close()
    assert not RUNNING
    assert not direction_memory.LARGE


async def sending(stream: SocketStream, payload: bytes) -> None:
    await stream.send(payload)
    stream.shutdown_write()


async def test_a_reader_that_takes_little_holds_no_more_than_its_buffer(joined: Joined) -> None:
    payload = os.urandom(MIB) * 40
    async with asyncio.TaskGroup() as group:
        group.create_task(sending(joined.source, payload))
        seen = await joined.reader.recv_exactly(100_000)
        assert await joined.settled() <= 1.5 * MIB
        seen += await read_all(joined.reader)
    assert hashlib.sha256(seen).digest() == hashlib.sha256(payload).digest()


async def test_a_reader_that_stops_gives_its_pipe_back_and_may_become_fast_again(joined: Joined) -> None:
    payload = os.urandom(MIB) * 160
    async with asyncio.TaskGroup() as group:
        group.create_task(sending(joined.source, payload))
        seen = bytearray()
        while not (joined.way.is_fast and joined.pool.taken):
            seen += await joined.reader.recv()
        await joined.settled()
        joined.way.look()
        await eventually(lambda: not joined.pool.taken)
        assert joined.pace() == "slow"
        assert len(seen) < len(payload)
        paces = set()
        while data := await joined.reader.recv():
            seen += data
            paces.add(joined.pace())
    assert "fast" in paces
    assert seen == payload


async def test_readers_that_were_fast_share_a_limit(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direction_memory, "MAX_LARGE_BUFFERS", 0)
    payload = os.urandom(MIB) * 40
    async with asyncio.TaskGroup() as group:
        group.create_task(sending(joined.source, payload))
        seen = await joined.reader.recv_exactly(20 * MIB)
        assert not joined.way.is_fast
        assert await joined.settled() <= 2.5 * MIB
        seen += await read_all(joined.reader)
    assert seen == payload


@pytest.mark.netns
@pytest.mark.needs("netns", "ip")
@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="no /dev/net/tun")
async def test_the_receive_queue_grows_with_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link with a round trip of 100 ms needs more than a slow stream's queue, also if the system allows no large buffer."""
    monkeypatch.setattr(direction_memory, "MAX_LARGE_BUFFERS", 0)
    payload = os.urandom(MIB) * 24
    with delayed_hosts(FAR_S) as (here, there):
        with there.entered():
            listening = socket.create_server((THERE, 0))
        with here.entered():
            near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
        listening.close()
        source, a = SocketStream(far), SocketStream(near)
        b, reader = await pair()
        splice = Splice(a, b, **LIMITS)
        assert a.memory is not None
        async with asyncio.TaskGroup() as group:
            group.create_task(splice.run())
            group.create_task(sending(source, payload))
            seen = await reader.recv_exactly(16 * MIB)
            assert a.memory.receive_limit > 2 * MIB
            seen += await read_all(reader)
            reader.close()
            source.close()
        assert seen == payload
