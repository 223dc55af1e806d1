"""Streams through relay and gateway over coturn, the embedded TURN server, directly and in memory: no loss, no false end."""

import asyncio
import hashlib
import os
import random

import pytest

from sniproxy.engine import SocketStream
from tests.support.hellos import client_hello, padding
from tests.support.path import a_path, name_of
from tests.support.streams import read_all, until_reset
from turnreg.client.allocation import Timing

pytestmark = [pytest.mark.anyio, pytest.mark.interop]

TURNS = [pytest.param("coturn", marks=pytest.mark.needs("turnserver")), "embedded", "direct", "memory"]
TLS = [pytest.param("coturn-tls", marks=pytest.mark.needs("turnserver")), "embedded-tls"]
"""The gateway connects to the TURN server over TLS, so nothing is spliced."""


def sized_hello(name: str, size: int) -> bytes:
    """A ClientHello of about `size` bytes, in records of 16 KiB."""
    return client_hello(name, padding(max(size - 200, 0))) if size else client_hello(name)


async def skip_hello(wire: SocketStream, hello: bytes) -> None:
    """Read the ClientHello at the service, and check that it is unchanged."""
    assert await wire.recv_exactly(len(hello)) == hello


@pytest.mark.parametrize("turn", TURNS)
async def test_question_and_answer(turn: str) -> None:
    async with a_path(turn) as path:
        names = []  # type: ignore[var-annotated]

        async def service(wire: SocketStream) -> None:
            await skip_hello(wire, client_hello(names[0]))
            assert await read_all(wire) == b"question"
            await wire.send(b"answer")

        names.append(name_of(await path.serve(service)))
        client = await path.dial(names[0], behind=b"question")
        client.shutdown_write()
        assert await read_all(client) == b"answer"
        client.close()
        relay, gateway = await path.ended()
    assert relay[0]["reason"] == gateway[0]["reason"] == "ok"
    assert relay[0]["stream"] == gateway[0]["stream"]
    assert relay[0]["bytes_down"] == gateway[0]["bytes_down"] == 6
    assert relay[0]["bytes_up"] == gateway[0]["bytes_up"]


@pytest.mark.parametrize("hello_bytes", [0, 18_000, 60_000])
@pytest.mark.parametrize("turn", TURNS)
async def test_early_bytes_before_a_late_bind_arrive_in_order(turn: str, hello_bytes: int) -> None:
    """Megabytes directly after the ClientHello, while the gateway takes 0.4 s to bind."""
    early = os.urandom(3_000_000)
    async with a_path(turn, bind_delay_s=0.4) as path:
        seen: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        hellos = []  # type: ignore[var-annotated]

        async def service(wire: SocketStream) -> None:
            await skip_hello(wire, hellos[0])
            seen.set_result(await read_all(wire))
            await wire.send(b"thanks")

        port = await path.serve(service)
        name = name_of(port)
        hellos.append(sized_hello(name, hello_bytes))
        client = await path.dial(name, hello=hellos[0], behind=early)
        client.shutdown_write()
        assert await read_all(client) == b"thanks"
        assert hashlib.sha256(seen.result()).digest() == hashlib.sha256(early).digest()
        client.close()


@pytest.mark.parametrize("turn", TURNS + TLS)
async def test_a_service_that_sends_100000_bytes_and_closes_loses_none(turn: str) -> None:
    payload = os.urandom(100_000)
    async with a_path(turn) as path:

        async def service(wire: SocketStream) -> None:
            await wire.recv()
            await wire.send(payload)
            wire.shutdown_write()

        client = await path.dial(name_of(await path.serve(service)))
        assert await read_all(client) == payload
        client.close()
        relay, gateway = await path.ended()
    assert (relay[0]["reason"], gateway[0]["reason"]) == ("ok", "ok")


@pytest.mark.parametrize("turn", TURNS)
async def test_an_answer_that_begins_after_the_clients_end(turn: str) -> None:
    async with a_path(turn) as path:

        async def service(wire: SocketStream) -> None:
            question = await read_all(wire)
            await wire.send(hashlib.sha256(question).digest() * 3000)

        client = await path.dial(name_of(await path.serve(service)), behind=b"x" * 200_000)
        client.shutdown_write()
        answer = await read_all(client)
        assert len(answer) == 96_000
        client.close()


@pytest.mark.parametrize("victim", ["service", "client"])
@pytest.mark.parametrize("turn", TURNS)
async def test_a_cut_is_a_reset_and_never_a_clean_end(turn: str, victim: str) -> None:
    async with a_path(turn) as path:
        arrived: asyncio.Future[SocketStream] = asyncio.get_running_loop().create_future()
        done = asyncio.Event()

        async def service(wire: SocketStream) -> None:
            await wire.recv()
            await wire.send(b"half an answer")
            arrived.set_result(wire)
            await done.wait()

        client = await path.dial(name_of(await path.serve(service)))
        assert await client.recv_exactly(14) == b"half an answer"
        served = await arrived
        if victim == "service":
            served.reset()
            await until_reset(client)
        else:
            client.reset()
            await until_reset(served)
        client.close()
        done.set()
        relay, gateway = await path.ended()
    expected = ("truncated", "server_reset") if victim == "service" else ("client_reset", "truncated")
    assert (relay[0]["reason"], gateway[0]["reason"]) == expected


@pytest.mark.parametrize("turn", TURNS)
async def test_two_hundred_streams_at_any_pace(turn: str) -> None:
    """Random sizes, pauses, slow readers and half-closes on 200 streams at once: every byte and every end must arrive."""
    async with a_path(turn) as path:

        async def paced(wire: SocketStream, payload: bytes, dice: random.Random) -> None:
            at = 0
            while at < len(payload):
                size = dice.choice((1, 500, 20_000, 100_000))
                await wire.send(payload[at : at + size])
                at += size
                if dice.random() < 0.3:
                    await asyncio.sleep(dice.random() / 50)
            wire.shutdown_write()

        async def slow(wire: SocketStream, dice: random.Random) -> bytes:
            got = bytearray()
            while data := await wire.recv(dice.choice((1000, 65536))):
                got += data
                if dice.random() < 0.1:
                    await asyncio.sleep(dice.random() / 50)
            return bytes(got)

        async def service(wire: SocketStream) -> None:
            """Echo; for every other stream, only after the end of the question."""
            await wire.recv_exactly(hello_size)
            mode = (await wire.recv_exactly(1))[0]
            dice = random.Random(mode)
            if mode % 2:
                await paced(wire, await slow(wire, dice), dice)
            else:
                while data := await wire.recv():
                    await wire.send(data)
                wire.shutdown_write()

        name = name_of(await path.serve(service))
        hello_size = len(client_hello(name))

        async def stream(seed: int) -> None:
            dice = random.Random(seed)
            payload = dice.randbytes(dice.choice((0, 10, 3000, 200_000)))
            client = await path.dial(name, behind=bytes([seed % 256]))
            async with asyncio.TaskGroup() as group:
                group.create_task(paced(client, payload, dice))
                got = await slow(client, random.Random(seed + 1))
            assert got == payload, f"stream {seed}"
            client.close()

        async with asyncio.TaskGroup() as group:
            for seed in range(200):
                group.create_task(stream(seed))
        relay, gateway = await path.ended(200)
    assert {line["reason"] for line in relay} == {line["reason"] for line in gateway} == {"ok"}


@pytest.mark.parametrize("turn", TURNS + TLS)
async def test_bulk_both_ways_with_the_same_digest(turn: str) -> None:
    block = os.urandom(1 << 20)
    count = 48

    async def send(wire: SocketStream) -> None:
        for _ in range(count):
            await wire.send(block)
        wire.shutdown_write()

    async def receive(wire: SocketStream) -> str:
        digest = hashlib.sha256()
        while data := await wire.recv(1 << 18):
            digest.update(data)
        return digest.hexdigest()

    expected = hashlib.sha256(block * count).hexdigest()
    async with a_path(turn) as path:
        up: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def service(wire: SocketStream) -> None:
            await wire.recv_exactly(len(client_hello(name)))
            async with asyncio.TaskGroup() as group:
                group.create_task(send(wire))
                up.set_result(await receive(wire))

        name = name_of(await path.serve(service))
        client = await path.dial(name)
        async with asyncio.TaskGroup() as group:
            group.create_task(send(client))
            assert await receive(client) == expected
        assert await up == expected
        client.close()


@pytest.mark.needs("turnserver")
async def test_a_gateway_takes_a_stream_after_its_nonce_has_expired() -> None:
    async with a_path("coturn", coturn_options=("--stale-nonce=2",), timing=Timing(nonce_fresh_s=0.5)) as path:

        async def service(wire: SocketStream) -> None:
            await wire.recv()
            await wire.send(b"still here")
            wire.shutdown_write()

        name = name_of(await path.serve(service))
        for _ in range(2):
            await asyncio.sleep(3.5)  # until the nonce has expired, which the server does not announce
            client = await path.dial(name)
            assert await read_all(client) == b"still here"
            client.close()


def test_sized_hellos_have_about_their_size() -> None:
    assert 17_000 < len(sized_hello(name_of(1), 18_000)) < 19_000
    assert 59_000 < len(sized_hello(name_of(1), 60_000)) < 61_000
