"""Streams between two networks over links on which TURN servers lose data: no byte, no end and no order is lost.

An MTU of 1500, no larger segments, 100 Mb/s (tests.support.hosts). With `late_mesh`, every bind is delayed by 0.4 s as well.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import time

import pytest

from sniproxy.engine import SocketStream, connect
from tests.netns.conftest import LATE_S
from tests.support import bulk
from tests.support.hellos import client_hello, padding
from tests.support.processes import Mesh
from tests.support.streams import read_all
from tests.support.traffic import BULK_TIMEOUT_S, receive, send
from turnreg.client.allocation import Allocation, Bound, Credentials
from turnreg.stun.auth import rest_credentials

pytestmark = [pytest.mark.anyio, pytest.mark.netns, pytest.mark.needs("netns", "ip", "nft", "tc"), pytest.mark.slow]


@pytest.mark.timeout(BULK_TIMEOUT_S + 30)
async def test_bulk_both_ways_at_once_arrives_as_it_was_sent(mesh: Mesh) -> None:
    await bulk.one_stream(mesh)


@pytest.mark.timeout(BULK_TIMEOUT_S + 30)
async def test_two_hundred_streams_at_any_pace(late_mesh: Mesh) -> None:
    await bulk.many_streams(late_mesh)


async def test_raw_peers_see_what_these_links_do_to_a_turn_server(mesh: Mesh) -> None:
    """The control: without our protocol, coturn loses bytes sent before a late bind. Otherwise these tests prove nothing."""
    early = os.urandom(48 * 1024)
    streams: asyncio.Queue[Bound] = asyncio.Queue()
    dialled: list[int] = []

    def unconnected(part: str) -> socket.socket:
        with mesh.ground.on(part):
            return socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    async def late(address: str, port: int, *, timeout_s: float) -> SocketStream:
        if dialled:
            await asyncio.sleep(LATE_S)
        dialled.append(port)
        return await connect(address, port, timeout_s=timeout_s, sock=unconnected("gateway"))

    async def peer(to: tuple[str, int]) -> int:
        """Send 48 KiB before the bind and a few bytes after it. Returns how many of the 48 KiB arrived."""
        sent = await connect(*to, timeout_s=10, sock=unconnected("relay"))
        await sent.send(early)
        bound = await streams.get()
        await sent.send(b"the end")
        got = b""
        while not got.endswith(b"the end"):
            got += await bound.stream.recv()
        for wire in (sent, bound.stream):
            wire.close()
        return len(got) - len(b"the end")

    username, password = rest_credentials(mesh.turn_secret, "raw", time.time() + 3600)
    allocation = Allocation(
        address=mesh.plan.turn,
        port=mesh.plan.turn_port,
        credentials=Credentials(username=username, password=password),
        on_stream=streams.put_nowait,
        via="a",
        turn="turn-1",
        record="raw",
        peers=frozenset({mesh.plan.relay}),
        dial=late,
    )
    ready = asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(allocation.run(ready.set))
        await ready.wait()
        assert allocation.relayed is not None
        arrived = [await peer(allocation.relayed) for _ in range(3)]
        await allocation.close()
        running.cancel()
    if mesh.turn == "coturn":
        assert min(arrived) < len(early), "these links do not show the loss"
    else:
        assert arrived == [len(early)] * 3


@pytest.mark.parametrize("hello_bytes", [0, 18_000, 60_000])
async def test_megabytes_directly_after_a_hello_of_any_size_arrive_in_order(late_mesh: Mesh, hello_bytes: int) -> None:
    early = os.urandom(3_000_000)
    seen: list[bytes] = []

    async def service(wire: SocketStream) -> None:
        assert await wire.recv_exactly(len(hello)) == hello
        seen.append(hashlib.sha256(await read_all(wire)).digest())
        await wire.send(b"thanks")
        wire.shutdown_write()

    async with late_mesh.serving(service) as port:
        name = late_mesh.name(port)
        hello = client_hello(name, padding(hello_bytes - 200)) if hello_bytes else client_hello(name)
        client = await late_mesh.dial(name, hello=hello, behind=early)
        client.shutdown_write()
        assert await read_all(client) == b"thanks"
        client.close()
    assert seen == [hashlib.sha256(early).digest()]


async def test_a_service_that_sends_100000_bytes_and_closes_loses_none(late_mesh: Mesh) -> None:
    payload = os.urandom(100_000)

    async def service(wire: SocketStream) -> None:
        await wire.recv_exactly(len(client_hello(name)))
        await wire.send(payload)
        wire.close()

    async def ask() -> bytes:
        client = await late_mesh.dial(name)
        try:
            return await read_all(client)
        finally:
            client.close()

    async with late_mesh.serving(service) as port:
        name = late_mesh.name(port)
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(ask()) for _ in range(20)]
    assert [len(answer.result()) for answer in answers] == [100_000] * 20
    assert {answer.result() for answer in answers} == {payload}


async def test_a_client_that_sends_100000_bytes_and_closes_loses_none(late_mesh: Mesh) -> None:
    payload = os.urandom(100_000)
    seen: list[bytes] = []

    async def service(wire: SocketStream) -> None:
        await wire.recv_exactly(len(client_hello(name)))
        seen.append(await read_all(wire))

    async def tell() -> None:
        client = await late_mesh.dial(name, behind=payload)
        client.close()

    async with late_mesh.serving(service) as port:
        name = late_mesh.name(port)
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(tell())
        await late_mesh.eventually("every service has read to the end", lambda: len(seen) == 20)
    assert set(seen) == {payload}


async def test_an_answer_that_begins_after_the_clients_end(late_mesh: Mesh) -> None:
    async def service(wire: SocketStream) -> None:
        question = await receive(wire)
        await wire.send(question.digest.encode() * 3000)
        wire.shutdown_write()

    async with late_mesh.serving(service) as port:
        client = await late_mesh.dial(late_mesh.name(port))
        await send(client, 300_000, seed=3)
        answer = await read_all(client)
        client.close()
    assert len(answer) == 64 * 3000
    assert answer == answer[:64] * 3000


async def test_a_cut_in_the_middle_is_a_reset_and_never_a_clean_end(late_mesh: Mesh) -> None:
    """Down and up, cut by the service and by the client: all four combinations at once."""
    arrived: dict[int, asyncio.Future[SocketStream]] = {}
    over = asyncio.Event()

    async def service(wire: SocketStream) -> None:
        await wire.recv_exactly(len(client_hello(name)))
        arrived[(await wire.recv_exactly(1))[0]].set_result(wire)
        await over.wait()

    async def pour(wire: SocketStream) -> OSError:
        while True:
            try:
                await wire.send(random.randbytes(50_000))
            except OSError as error:
                return error

    async def expect_reset(wire: SocketStream, pouring: asyncio.Task[OSError] | None) -> None:
        with contextlib.suppress(ConnectionResetError):
            while await wire.recv():
                pass
            # The kernel reports a reset only once: the writer of this socket may have received it instead.
            assert pouring is not None, "a clean end instead of a reset"
            assert isinstance(await pouring, ConnectionResetError)

    async def stream(number: int) -> None:
        arrived[number] = asyncio.get_running_loop().create_future()
        client = await late_mesh.dial(name, behind=bytes([number]))
        served = await arrived[number]
        source, drain = (served, client) if number & 1 else (client, served)
        async with asyncio.TaskGroup() as group:
            pouring = group.create_task(pour(source))
            await drain.recv_exactly(500_000)
            cut, other = (served, client) if number & 2 else (client, served)
            cut.reset()
            await expect_reset(other, pouring if other is source else None)
        client.close()

    async with late_mesh.serving(service) as port, asyncio.timeout(40):
        name = late_mesh.name(port)
        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(stream(number))
        over.set()
