"""Warm streams on a whole path: the second client gets one, and it behaves like a new connection."""

import asyncio
import hashlib
import os

import pytest

from discovery.model.mesh import Kind
from sniproxy.engine import SocketStream
from tests.support.hellos import client_hello
from tests.support.path import ALLOCATION, Path, a_path, name_of
from tests.support.streams import read_all
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.interop]

TURNS = [pytest.param("coturn", marks=pytest.mark.needs("turnserver")), "embedded", "memory"]


async def echo(stream: SocketStream) -> None:
    """Send everything back, including the ClientHello."""
    while data := await stream.recv():
        await stream.send(data)
    stream.shutdown_write()


async def ask(path: Path, name: str, question: bytes = b"question") -> None:
    """Open one stream, and check that everything sent comes back."""
    client = await path.dial(name)
    assert await client.recv_exactly(len(client_hello(name))) == client_hello(name)

    async def send() -> None:
        await client.send(question)
        client.shutdown_write()

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        answer = await read_all(client)
    assert hashlib.sha256(answer).digest() == hashlib.sha256(question).digest()
    client.close()


async def warmed(path: Path, count: int = 2) -> None:
    await eventually(lambda: path.relay._upstreams.pool.ready >= count, what=f"{count} warm streams are ready")


@pytest.mark.parametrize("turn", TURNS)
async def test_the_second_client_gets_a_warm_stream(turn: str) -> None:
    async with a_path(turn) as path:
        name = name_of(await path.serve(echo))
        await ask(path, name)
        await warmed(path)
        await path.ended()
        assert len(path.gateway.ledger) == 0, "warm streams are not in the ledger"
        for _ in range(3):
            await ask(
                path, name, os.urandom(3_000_000)
            )  # more than coturn carries in both directions over one connection
            await warmed(path)
        relay, gateway = await path.ended(4)
    assert [line.get("warm") for line in relay] == [None, True, True, True]
    assert [line.get("warm") for line in gateway] == [None, True, True, True]
    assert [line["stream"] for line in relay] == [line["stream"] for line in gateway]
    assert {line["reason"] for line in (*relay, *gateway)} == {"ok"}
    assert [line["attempts"] for line in relay] == [1, 1, 1, 1]


@pytest.mark.parametrize("turn", ["embedded", "memory"])
async def test_more_clients_than_warm_streams(turn: str) -> None:
    async with a_path(turn) as path:
        name = name_of(await path.serve(echo))
        await ask(path, name)
        await warmed(path)
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(ask(path, name))
        relay, _ = await path.ended(21)
    assert {line["reason"] for line in relay} == {"ok"}
    assert sum(line.get("warm", False) is True for line in relay) >= 2


@pytest.mark.parametrize("turn", ["embedded", "memory"])
async def test_a_draining_gateway_closes_its_warm_streams(turn: str) -> None:
    async with a_path(turn) as path:
        name = name_of(await path.serve(echo))
        await ask(path, name)
        await warmed(path)
        path.gateway.close()
        await eventually(lambda: not path.relay._upstreams.pool.ready, what="no warm stream is left at the relay")
        assert len(path.gateway._warm) == 0


@pytest.mark.parametrize("turn", ["embedded", "memory"])
async def test_a_removed_record_ends_its_warm_streams(turn: str) -> None:
    async with a_path(turn) as path:
        name = name_of(await path.serve(echo))
        await ask(path, name)
        await warmed(path)
        if turn == "memory":
            path.discovery.remove(Kind.GATEWAY, "b", "gw-1")
        else:
            path.discovery.remove(Kind.ALLOCATION, "b", ALLOCATION)
        await eventually(lambda: not len(path.gateway._warm), what="no warm stream is left at the gateway")
