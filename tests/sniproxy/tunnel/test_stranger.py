"""PROTOCOL.md is sufficient: a gateway written from it alone works with our relay, and agrees with the test vectors."""

import ast
import asyncio
import os
import pathlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from discovery.model.mesh import AllocationSpec, GatewaySpec, Kind, TurnSpec
from sniproxy.engine import SocketStream
from tests.sniproxy.tunnel import stranger
from tests.sniproxy.tunnel.stranger import RefusedError, StrangerGateway
from tests.sniproxy.tunnel.test_protocol_vectors import EPOCH, HEADERS, KEYS, NOW_MS, VECTORS
from tests.support.fixed_discovery import record
from tests.support.hellos import EARLY_DATA, client_hello
from tests.support.relays import ALERT, Running, a_relay, name_of
from tests.support.scripted_gateways import KEY
from tests.support.streams import read_all
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

KEY_OF_TESTS = {KEY.id: (KEY.from_network, KEY.to_network, KEY.secret)}


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(pathlib.Path(stranger.__file__).read_text())
    names = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert names <= sys.stdlib_module_names


# --- the vectors ------------------------------------------------------------------------------------------------------


def of_the_vectors(**more: bool) -> StrangerGateway:
    keys = {key.id: (key.from_network, key.to_network, key.secret) for key in KEYS.values()}
    return StrangerGateway("b", VECTORS["gateway"]["addressee"], keys, EPOCH, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HEADERS)
def test_it_takes_our_preambles(name: str) -> None:
    warm, _ = of_the_vectors().verify(HEADERS[name], NOW_MS)
    assert warm is (name == "warm")


@pytest.mark.parametrize(
    "vector", VECTORS["refused_preambles"][1:], ids=[vector["name"] for vector in VECTORS["refused_preambles"][1:]]
)
def test_it_refuses_what_we_refuse(vector: dict[str, str]) -> None:
    gateway = of_the_vectors(require_epoch=bool(vector.get("require_epoch")))
    for before in vector.get("after", []):
        gateway.verify(HEADERS[before], NOW_MS)
    with pytest.raises(RefusedError) as refused:
        gateway.verify(bytes.fromhex(vector["header"]), NOW_MS)
    assert refused.value.reason == vector.get("told", vector["reason"])
    if "detail" in vector:
        assert refused.value.detail == vector["detail"]


# --- our relay --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(gateway: StrangerGateway, **config: Any) -> AsyncIterator[Running]:
    """Our relay in network a, and the independent gateway in network b, dialled directly or as an allocation."""
    async with (
        a_relay(**config) as relay,
        await asyncio.start_server(gateway.serve, "127.0.0.1", 0) as server,
    ):
        port = server.sockets[0].getsockname()[1]
        if gateway.through_turn:
            turn = TurnSpec(
                url="turn:127.0.0.1:3478?transport=tcp", relay_addresses=["127.0.0.1"], port_min=1024, port_max=65535
            )
            allocation = AllocationSpec(via="a", turn="turn-1", gateway="gw-1", port=port, proto=gateway.proto)
            relay.discovery.put(record(Kind.TURN, "a", "turn-1", turn))
            relay.discovery.put(record(Kind.ALLOCATION, "b", gateway.addressee, allocation))
        else:
            spec = GatewaySpec(address=f"127.0.0.1:{port}", proto=gateway.proto)
            relay.discovery.put(record(Kind.GATEWAY, "b", gateway.addressee, spec))
        yield relay


async def echo(stream: SocketStream) -> None:
    """Answer when the client has ended, as many an HTTP/1.0 server."""
    got = await read_all(stream)
    await stream.send(b"got " + got)
    stream.shutdown_write()


async def test_a_stream_with_a_half_close() -> None:
    gateway = StrangerGateway("b", "gw-1", KEY_OF_TESTS)
    async with running(gateway) as relay:
        name = name_of(await relay.serve(echo), "b")
        client = await relay.dial(name, behind=EARLY_DATA)
        await client.send(b"question")
        client.shutdown_write()
        assert await read_all(client) == b"got " + client_hello(name) + EARLY_DATA + b"question"
        client.close()
        (ended,) = await relay.ended()
    assert ended["reason"] == "ok"
    assert gateway.log == ["ok"]


async def test_the_service_ends_first() -> None:
    async def speaks(stream: SocketStream) -> None:
        await stream.send(b"bye")
        stream.shutdown_write()
        got.set_result(await read_all(stream))

    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    gateway = StrangerGateway("b", "gw-1", KEY_OF_TESTS)
    async with running(gateway) as relay:
        name = name_of(await relay.serve(speaks), "b")
        client = await relay.dial(name)
        assert await read_all(client) == b"bye"
        await client.send(b"still here")
        client.shutdown_write()
        assert await got == client_hello(name) + b"still here"
        client.close()
        (ended,) = await relay.ended()
    assert ended["reason"] == "ok"


async def test_another_epoch_and_a_dead_service() -> None:
    """The relay signs the epoch it was told, and then finds that nothing answers."""
    gateway = StrangerGateway("b", "gw-1", KEY_OF_TESTS)
    async with running(gateway) as relay:
        port = await relay.serve(echo)
        gateway.epoch = os.urandom(16)
        client = await relay.dial(name_of(port, "b"))
        client.shutdown_write()
        assert await read_all(client) == b"got " + client_hello(name_of(port, "b"))
        client.close()
        await relay.ended()
        assert gateway.log == ["stale_epoch", "ok"]
        client = await relay.dial(name_of(9, "b"))
        assert await read_all(client) == ALERT["internal_error"]
        client.close()
        ended = await relay.ended(2)
    assert [event["reason"] for event in ended] == ["ok", "dial_failed"]


async def test_an_upload_that_needs_a_second_connection() -> None:
    gateway = StrangerGateway("b", "alloc-1", KEY_OF_TESTS, through_turn=True)
    bulk = os.urandom(4 << 20)
    async with running(gateway, pool=0) as relay:
        name = name_of(await relay.serve(echo), "b")
        client = await relay.dial(name)
        async with asyncio.TaskGroup() as group:
            group.create_task(_upload(client, bulk))
            got = await read_all(client)
        assert got == b"got " + client_hello(name) + bulk
        client.close()
        (ended,) = await relay.ended()
    assert (ended["reason"], ended["second"]) == ("ok", True)
    assert gateway.log == ["second", "ok"]


async def _upload(client: SocketStream, data: bytes) -> None:
    await client.send(data)
    client.shutdown_write()


async def test_a_warm_connection() -> None:
    gateway = StrangerGateway("b", "alloc-1", KEY_OF_TESTS, through_turn=True)
    async with running(gateway, pool=1) as relay:
        name = name_of(await relay.serve(echo), "b")
        for _ in range(2):
            client = await relay.dial(name)
            await _upload(client, b"question")
            assert await read_all(client) == b"got " + client_hello(name) + b"question"
            client.close()
            await eventually(lambda: relay.sample("crossnet_relay_warm_streams_ready"))
        ended = await relay.ended(2)
    assert [event["reason"] for event in ended] == ["ok", "ok"]
    assert "open" in gateway.log
