"""Uploads that outgrow their first connection: both directions full at once, which a TURN server cannot carry on one connection."""

import asyncio
import hashlib
import itertools
import os
from collections.abc import Iterator

import pytest

from sniproxy.engine import SocketStream
from sniproxy.relay.upstreams import Connected
from sniproxy.transport.base import Candidate
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.relay_handshake import StreamRequest
from tests.support.hellos import client_hello
from tests.support.path import a_path, name_of
from tests.support.streams import read_all, until_reset

pytestmark = [pytest.mark.anyio, pytest.mark.interop]

TURNS = [pytest.param("coturn", marks=pytest.mark.needs("turnserver")), "embedded", "memory"]
BULK = os.urandom(1 << 20) * 16


async def _digest(stream: SocketStream) -> bytes:
    digest = hashlib.sha256()
    while data := await stream.recv(1 << 18):
        digest.update(data)
    return digest.digest()


@pytest.mark.parametrize("turn", TURNS)
async def test_an_upload_continues_while_its_client_reads_nothing(turn: str) -> None:
    """As on one TCP connection, a full direction to the client must not stop the direction to the service."""
    async with a_path(turn) as path:

        async def service(stream: SocketStream) -> None:
            await stream.recv_exactly(len(client_hello(name)))
            async with asyncio.TaskGroup() as group:
                answering = group.create_task(stream.send(BULK))
                uploaded.set_result(await _digest(stream))
                await answering
            stream.shutdown_write()

        uploaded: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        name = name_of(await path.serve(service))
        client = await path.dial(name)
        await client.send(BULK)
        client.shutdown_write()
        async with asyncio.timeout(30):
            assert await uploaded == hashlib.sha256(BULK).digest()
        assert await _digest(client) == hashlib.sha256(BULK).digest()
        client.close()
        relay, gateway = await path.ended()
    assert [relay[0]["reason"], gateway[0]["reason"]] == ["ok", "ok"]
    assert relay[0]["second"] is True
    assert len(relay) == len(gateway) == 1, "the second connection is logged with its stream"


@pytest.mark.parametrize("turn", TURNS)
async def test_a_stream_of_many_small_messages_keeps_one_connection(turn: str) -> None:
    async with a_path(turn) as path:

        async def echo(stream: SocketStream) -> None:
            await stream.recv_exactly(len(client_hello(name)))
            while data := await stream.recv():
                await stream.send(data)
            stream.shutdown_write()

        name = name_of(await path.serve(echo))
        client = await path.dial(name)
        message = os.urandom(2000)
        for _ in range(300):
            await client.send(message)
            assert await client.recv_exactly(len(message)) == message
        client.shutdown_write()
        assert await read_all(client) == b""
        client.close()
        relay, _ = await path.ended()
    assert "second" not in relay[0]


async def test_without_a_second_connection_an_upload_still_arrives() -> None:
    async def none(*_: object) -> CapsuleConnection:
        raise ConnectionError("refused by the test")

    async with a_path("embedded") as path:
        path.relay._upstreams.second = none  # type: ignore[assignment, method-assign]

        async def service(stream: SocketStream) -> None:
            await stream.recv_exactly(len(client_hello(name)))
            await stream.send(await _digest(stream))
            stream.shutdown_write()

        name = name_of(await path.serve(service))
        client = await path.dial(name)
        await client.send(BULK)
        client.shutdown_write()
        assert await read_all(client) == hashlib.sha256(BULK).digest()
        client.close()


async def _cut_while_sending(client: SocketStream) -> bool:
    """Send until it fails. Returns whether it failed with a reset."""
    try:
        await client.send(BULK)
    except OSError as error:
        return isinstance(error, ConnectionResetError)
    return False


@pytest.mark.parametrize("turn", TURNS)
async def test_a_cut_second_connection_is_a_cut_stream(turn: str) -> None:
    seconds: list[CapsuleConnection] = []
    dialled = asyncio.Event()
    async with a_path(turn) as path:
        dial = path.relay._upstreams.second

        async def kept(call: StreamRequest, candidate: Candidate, attempts: Iterator[int]) -> CapsuleConnection:
            seconds.append(await dial(call, candidate, attempts))
            dialled.set()
            return seconds[0]

        path.relay._upstreams.second = kept  # type: ignore[assignment, method-assign]
        arrived: asyncio.Future[SocketStream] = asyncio.get_running_loop().create_future()
        done = asyncio.Event()

        async def service(stream: SocketStream) -> None:
            await (
                dialled.wait()
            )  # until then everything between is full, so the upload has to move to a second connection
            await stream.recv_exactly(400_000)
            arrived.set_result(stream)
            await done.wait()

        client = await path.dial(name_of(await path.serve(service)))
        async with asyncio.TaskGroup() as group:
            uploading = group.create_task(_cut_while_sending(client))
            served = await arrived
            seconds[0].stream.reset()
            await until_reset(served)
            if not await uploading:  # the kernel reports a reset only once, to the first call
                await until_reset(client)
        client.close()
        done.set()
        relay, gateway = await path.ended()
    assert [relay[0]["reason"], gateway[0]["reason"]] == ["truncated", "truncated"]


@pytest.mark.parametrize("turn", ["embedded", "memory"])
async def test_a_second_connection_for_no_stream_is_refused(turn: str) -> None:
    async with a_path(turn) as path:

        async def service(stream: SocketStream) -> None:
            await stream.recv()
            await stream.send(b"x")
            await read_all(stream)

        client = await path.dial(name_of(await path.serve(service)))
        assert await client.recv() == b"x"
        connected: list[tuple[StreamRequest, Connected]] = []
        relay = path.relay
        opened = relay._upstreams.connect

        async def kept(call: StreamRequest, candidates: list[object]) -> Connected:
            connected.append((call, await opened(call, candidates)))  # type: ignore[arg-type]
            return connected[0][1]

        relay._upstreams.connect = kept  # type: ignore[assignment, method-assign]
        other = await path.dial(name_of(await path.serve(service)))
        assert await other.recv() == b"x"
        call, first = connected[0]
        other.shutdown_write()
        client.shutdown_write()
        await read_all(other)
        await path.ended(2)
        with pytest.raises(
            ConnectionError, match="not open here"
        ):  # before READY, so nothing of the upload was sent there
            await relay._upstreams.second(call, first.candidate, itertools.count(first.attempts + 1))
        assert [line["reason"] for line in path.gateway_log.events] == ["ok", "ok"], "it is not logged as a stream"
        client.close()
        other.close()
