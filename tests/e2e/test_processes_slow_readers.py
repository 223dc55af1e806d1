"""Clients that read slowly, through real processes: what each process's kernel memory for them is, and that they get every byte."""

import asyncio
import hashlib
import http.client
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sniproxy.engine import SocketStream
from tests.support.hellos import client_hello
from tests.support.processes import TURNS, Loopback, Mesh, running_mesh
from tests.support.streams import read_all

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(120)]

MIB = 1024 * 1024
READERS = 20
MOST_BYTES = 1.5 * MIB
"""For each direction: `buffer`, and what its pieces exceed it by."""


@pytest.fixture(params=TURNS)
def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mesh]:
    with running_mesh(Mesh(tmp_path, Loopback(), turn=request.param)) as mesh:
        yield mesh


def metric(mesh: Mesh, part: str, name: str) -> float:
    with closing(http.client.HTTPConnection(*mesh.plan.admin(part), timeout=5)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return float(text.partition(f"\n{name} ")[2].split()[0])


async def test_slow_readers_hold_little_and_get_everything(mesh: Mesh) -> None:
    payload = os.urandom(MIB) * 12

    async def service(wire: SocketStream) -> None:
        await wire.recv_exactly(len(client_hello(name)))
        await wire.send(payload)
        wire.shutdown_write()

    async def rest(client: SocketStream) -> bytes:
        return hashlib.sha256(begun[client] + await read_all(client, 60)).digest()

    parts = ["relay", "gateway", *(["turn"] if mesh.turn == "embedded" else [])]
    begun: dict[SocketStream, bytes] = {}
    async with mesh.serving(service) as port:
        name = mesh.name(port)
        for _ in range(READERS):
            client = await mesh.dial(name)
            begun[client] = await client.recv_exactly(2000)
        for _ in range(20):
            for client in begun:
                begun[client] += await client.recv_exactly(2000)
            await asyncio.sleep(0.1)
        for part in parts:
            assert metric(mesh, part, 'crossnet_stream_directions{pace="slow"}') >= READERS
            assert 0 < metric(mesh, part, "crossnet_stream_memory_largest_bytes") <= MOST_BYTES
        async with asyncio.TaskGroup() as group:
            arrived = [group.create_task(rest(client)) for client in begun]
        assert {task.result() for task in arrived} == {hashlib.sha256(payload).digest()}
