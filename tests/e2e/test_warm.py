"""Warm streams on a whole path: the second client finds a connection that is ready, and everything is as on a new one."""

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


async def echo(wire: SocketStream) -> None:
    """Give everything back behind the ClientHello, as it comes."""
    while data := await wire.recv():
        await wire.send(data)
    wire.shutdown_write()


async def ask(path: Path, name: str, question: bytes = b"question") -> None:
    """One stream: what is sent comes back."""
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


async def filled(path: Path, count: int = 2) -> None:
    await eventually(lambda: path.relay._upstreams.pool.ready >= count, what=f"{count} warm streams are ready")


@pytest.mark.parametrize("turn", TURNS)
async def test_the_second_client_comes_by_a_connection_that_is_ready(turn: str) -> None:
    async with a_path(turn) as path:
        name = name_of(await path.serve(echo))
        await ask(path, name)
        await filled(path)
        await path.ended()
        assert len(path.gateway.ledger) == 0, "what is kept ready is no stream"
        for _ in range(3):
            await ask(path, name, os.urandom(3_000_000))  # more than one connection carries both ways through coturn
            await filled(path)
        relay, gateway = await path.ended(4)
    assert [line.get("warm") for line in relay] == [None, True, True, True]
    assert [line.get("warm") for line in gateway] == [None, True, True, True]
    assert [line["stream"] for line in relay] == [line["stream"] for line in gateway]
    assert {line["reason"] for line in (*relay, *gateway)} == {"ok"}
    assert [line["attempts"] for line in relay] == [1, 1, 1, 1]


@pytest.mark.parametrize("turn", ["embedded", "memory"])
async def test_more_clients_than_are_kept_ready(turn: str) -> None:
    async with a_path(turn) as path:
        name = name_of(await path.serve(echo))
        await ask(path, name)
        await filled(path)
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(ask(path, name))
        relay, _ = await path.ended(21)
    assert {line["reason"] for line in relay} == {"ok"}
    assert sum(line.get("warm", False) is True for line in relay) >= 2


@pytest.mark.parametrize("turn", ["embedded", "memory"])
async def test_a_gateway_that_drains_lets_go_what_is_kept_ready(turn: str) -> None:
    async with a_path(turn) as path:
        name = name_of(await path.serve(echo))
        await ask(path, name)
        await filled(path)
        path.gateway.close()
        await eventually(lambda: not path.relay._upstreams.pool.ready, what="no warm stream is left at the relay")
        assert len(path.gateway._warm) == 0


@pytest.mark.parametrize("turn", ["embedded", "memory"])
async def test_a_record_that_goes_ends_what_was_kept_ready_for_it(turn: str) -> None:
    async with a_path(turn) as path:
        name = name_of(await path.serve(echo))
        await ask(path, name)
        await filled(path)
        if turn == "memory":
            path.discovery.remove(Kind.GATEWAY, "b", "gw-1")
        else:
            path.discovery.remove(Kind.ALLOCATION, "b", ALLOCATION)
        await eventually(lambda: not len(path.gateway._warm), what="no warm stream is left at the gateway")
