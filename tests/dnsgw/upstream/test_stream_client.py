"""The connection to an upstream, with a peer that resets, floods and lies."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from dnsgw.upstream.stream_client import Spawn, StreamClient, StreamTiming
from tests.support.dns_packets import query

pytestmark = pytest.mark.anyio

Waiting = dict[int, str]
MESSAGE = query("www.example.test")
FRAME = len(MESSAGE).to_bytes(2, "big") + MESSAGE


class Peer:
    """A listening socket and what the pipeline to it reported."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.tasks = tasks
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.listening.setblocking(False)
        self.received: list[bytes] = []
        self.news = asyncio.Event()
        self.lost = 0
        self.loop = asyncio.get_running_loop()

    def pipeline(self, timing: StreamTiming | None = None) -> StreamClient[Waiting]:
        pipeline = self.made(self._on_received, timing)
        pipeline.open(socket.AF_INET, self.listening.getsockname())
        return pipeline

    def made(
        self,
        received: Callable[[bytes, Waiting], None],
        timing: StreamTiming | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        spawn: Spawn | None = None,
    ) -> StreamClient[Waiting]:
        return StreamClient(
            {},
            spawn=spawn or self.tasks.create_task,
            received=received,
            lost=self._on_lost,
            tls=tls,
            server_name="localhost" if tls else "",
            timing=timing or StreamTiming(),
        )

    def _on_received(self, message: bytes, pending: dict[int, str]) -> None:
        self.received.append(message)
        self.news.set()

    def _on_lost(self, pipeline: StreamClient[Waiting]) -> None:
        self.lost += 1
        self.news.set()

    async def accept(self) -> socket.socket:
        async with asyncio.timeout(5):
            sock, _ = await self.loop.sock_accept(self.listening)
        return sock

    async def until(self, *, received: int = 0, lost: int = 0) -> None:
        async with asyncio.timeout(5):
            while len(self.received) < received or self.lost < lost:
                self.news.clear()
                await self.news.wait()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with asyncio.TaskGroup() as tasks:
        peer = Peer(tasks)
        yield peer
        peer.listening.close()


async def test_messages_wait_for_the_connection_and_go_out_in_order(peer: Peer) -> None:
    pipeline = peer.pipeline()
    pipeline.send(MESSAGE)
    pipeline.send(b"x" * 20)
    with await peer.accept() as sock:
        data = b""
        while len(data) < len(FRAME) + 22:
            data += await peer.loop.sock_recv(sock, 4096)
        assert data == FRAME + b"\0\x14" + b"x" * 20
        pipeline.close()
        assert peer.lost == 1


@pytest.mark.parametrize("step", [1, 7, len(FRAME), 2 * len(FRAME) + 1])
async def test_answers_arrive_in_any_cut(peer: Peer, step: int) -> None:
    pipeline = peer.pipeline()
    with await peer.accept() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = FRAME * 5
        for begin in range(0, len(stream), step):
            await peer.loop.sock_sendall(sock, stream[begin : begin + step])
            await asyncio.sleep(0)
        await peer.until(received=5)
        assert peer.received == [MESSAGE] * 5
        pipeline.close()


async def test_the_end_of_the_connection_is_reported_once(peer: Peer) -> None:
    pipeline = peer.pipeline()
    (await peer.accept()).close()
    await peer.until(lost=1)
    pipeline.close()
    assert (peer.lost, pipeline.closed) == (1, True)


@pytest.mark.parametrize("size", [0, 11])
async def test_an_invalid_length_ends_the_connection(peer: Peer, size: int) -> None:
    peer.pipeline()
    with await peer.accept() as sock:
        await peer.loop.sock_sendall(sock, FRAME + size.to_bytes(2, "big") + b"x" * size)
        await peer.until(received=1, lost=1)


async def test_a_refused_connection_is_reported(peer: Peer) -> None:
    peer.listening.close()
    pipeline = peer.made(peer._on_received)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening: refused
        pipeline.open(socket.AF_INET, held.getsockname())
        pipeline.send(MESSAGE)
        await peer.until(lost=1)


async def test_an_idle_connection_ends(peer: Peer) -> None:
    pipeline = peer.pipeline(StreamTiming(idle_s=0.02))
    pipeline.pending[1] = "waits"
    with await peer.accept() as sock:
        await peer.loop.sock_sendall(sock, FRAME)
        await peer.until(received=1)
        assert not pipeline.closed
        pipeline.pending.clear()
        await peer.until(lost=1)


async def test_a_peer_that_does_not_read_holds_up_nobody(peer: Peer) -> None:
    pipeline = peer.pipeline()
    with await peer.accept() as sock:
        for _ in range(1000):
            pipeline.send(b"x" * 4000)
        total = 0
        async with asyncio.timeout(5):
            while total < 4002 * 1000:
                total += len(await peer.loop.sock_recv(sock, 1 << 20))
        assert total == 4002 * 1000
        pipeline.close()


async def test_messages_that_the_peer_never_reads_are_bounded(peer: Peer) -> None:
    pipeline = peer.pipeline()
    with await peer.accept() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        async with asyncio.timeout(10):
            while not pipeline.closed:
                pipeline.send(b"x" * 60_000)
                await asyncio.sleep(0)
        assert peer.lost == 1


async def test_a_handshake_that_goes_on_too_long_ends_the_connection(peer: Peer) -> None:
    tls = ssl.create_default_context()
    pipeline = peer.made(peer._on_received, StreamTiming(connect_s=0.05), tls=tls)
    pipeline.open(socket.AF_INET, peer.listening.getsockname())
    with await peer.accept():
        await peer.until(lost=1)


@pytest.mark.parametrize("steps", [0, 1, 5])
async def test_cancelling_its_task_closes_it_without_calling_lost(peer: Peer, steps: int) -> None:
    async with asyncio.TaskGroup() as tasks:
        started: list[asyncio.Task[None]] = []

        def spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            started.append(tasks.create_task(work))
            return started[-1]

        pipeline = peer.made(peer._on_received, spawn=spawn)
        pipeline.open(socket.AF_INET, peer.listening.getsockname())
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in started:
            task.cancel()
    with await peer.accept() as sock:
        assert await peer.loop.sock_recv(sock, 1) == b""
    assert peer.lost == 0


async def test_closing_inside_a_callback_stops_the_reading(peer: Peer) -> None:
    pipeline: StreamClient[Waiting] | None = None

    def close_at_once(message: bytes, pending: dict[int, str]) -> None:
        assert pipeline is not None
        peer._on_received(message, pending)
        pipeline.close()

    pipeline = peer.made(close_at_once)
    pipeline.open(socket.AF_INET, peer.listening.getsockname())
    with await peer.accept() as sock:
        await peer.loop.sock_sendall(sock, FRAME * 3)
        await peer.until(received=1, lost=1)
    assert len(peer.received) == 1
