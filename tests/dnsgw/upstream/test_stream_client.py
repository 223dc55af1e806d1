"""The connection to an upstream, with a peer that cuts, floods and lies."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from dnsgw.turns import Turns
from dnsgw.upstream.stream_client import StreamClient
from tests.dnsgw.packets import query

pytestmark = pytest.mark.anyio

Waiting = dict[int, str]
MESSAGE = query("www.example.test")
FRAME = len(MESSAGE).to_bytes(2, "big") + MESSAGE


class Peer:
    """A listening socket and what the pipeline to it reported."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.listening.setblocking(False)
        self.received: list[bytes] = []
        self.news = asyncio.Event()
        self.lost = 0
        self.loop = asyncio.get_running_loop()

    def pipeline(self) -> StreamClient[Waiting]:
        pipeline: StreamClient[Waiting] = StreamClient(
            self.loop, {}, received=self._on_received, lost=self._on_lost, turns=Turns(self.loop)
        )
        pipeline.open(socket.AF_INET, self.listening.getsockname())
        return pipeline

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
    peer = Peer()
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


async def test_the_end_of_the_connection_is_told_once(peer: Peer) -> None:
    pipeline = peer.pipeline()
    (await peer.accept()).close()
    await peer.until(lost=1)
    pipeline.close()
    assert (peer.lost, pipeline.closed) == (1, True)


@pytest.mark.parametrize("size", [0, 11])
async def test_what_is_no_message_ends_the_connection(peer: Peer, size: int) -> None:
    peer.pipeline()
    with await peer.accept() as sock:
        await peer.loop.sock_sendall(sock, FRAME + size.to_bytes(2, "big") + b"x" * size)
        await peer.until(received=1, lost=1)


async def test_nobody_there_is_told(peer: Peer) -> None:
    peer.listening.close()
    pipeline = StreamClient[Waiting](
        peer.loop, {}, turns=Turns(peer.loop), received=peer._on_received, lost=peer._on_lost
    )
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening: refused
        pipeline.open(socket.AF_INET, held.getsockname())
        pipeline.send(MESSAGE)
        await peer.until(lost=1)


async def test_an_idle_connection_ends(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnsgw.upstream.stream_client.IDLE_S", 0.02)
    pipeline = peer.pipeline()
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


async def test_closing_inside_a_callback_stops_the_reading(peer: Peer) -> None:
    pipeline: StreamClient[Waiting] | None = None

    def close_at_once(message: bytes, pending: dict[int, str]) -> None:
        assert pipeline is not None
        peer._on_received(message, pending)
        pipeline.close()

    pipeline = StreamClient(peer.loop, {}, received=close_at_once, lost=peer._on_lost, turns=Turns(peer.loop))
    pipeline.open(socket.AF_INET, peer.listening.getsockname())
    with await peer.accept() as sock:
        await peer.loop.sock_sendall(sock, FRAME * 3)
        await peer.until(received=1, lost=1)
    assert len(peer.received) == 1
