"""Two mirror images of Carry over a real connection: what a client and a service see of each other."""

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import IPv4Address

import pytest

from sniproxy.engine import Wire
from sniproxy.stream.capsule import CapsuleType, header
from sniproxy.stream.carry import Carry
from sniproxy.stream.control import Opened, Ready
from sniproxy.stream.ends import Side
from sniproxy.stream.framed import Framed
from sniproxy.stream.reason import Reason
from tests.sniproxy.engine.pairs import pair, read_all, until_reset

pytestmark = pytest.mark.anyio

LIMITS = {"idle_timeout_s": 20.0, "half_close_timeout_s": 20.0}


@dataclass
class Path:
    """client ⇄ relay's carry ⇄ gateway's carry ⇄ service."""

    client: Wire
    service: Wire
    relay: Carry
    gateway: Carry
    between: tuple[Wire, Wire]

    async def run(self, group: asyncio.TaskGroup) -> tuple[asyncio.Task[Reason], asyncio.Task[Reason]]:
        return group.create_task(self.relay.run()), group.create_task(self.gateway.run())


@pytest.fixture(params=["plain", "tls"])
async def path(request: pytest.FixtureRequest) -> AsyncIterator[Path]:
    client, relay_plain = await pair()
    service, gateway_plain = await pair()
    relay_wire, gateway_wire = await pair(request.param)
    relay, gateway = Framed(relay_wire, Side.RELAY), Framed(gateway_wire, Side.GATEWAY)
    await gateway.send(Ready())
    await gateway.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
    assert await relay.next_message() == Ready()
    assert isinstance(await relay.next_message(), Opened)
    yield Path(
        client=client,
        service=service,
        relay=Carry(relay_plain, relay, Side.RELAY, **LIMITS),
        gateway=Carry(gateway_plain, gateway, Side.GATEWAY, **LIMITS),
        between=(relay_wire, gateway_wire),
    )
    for wire in (client, service, relay_plain, gateway_plain, relay_wire, gateway_wire):
        wire.close()


async def test_question_and_answer(path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        await path.client.send(b"question")
        path.client.shutdown_write()
        assert await read_all(path.service) == b"question"
        await path.service.send(b"an answer after the client's end")
        path.service.shutdown_write()
        assert await read_all(path.client) == b"an answer after the client's end"
    assert [end.result() for end in ends] == [Reason.OK, Reason.OK]
    assert path.relay.outbound.moved == path.gateway.inbound.moved == 8
    assert path.relay.inbound.moved == path.gateway.outbound.moved == 32


async def test_a_service_that_sends_and_closes_at_once_loses_nothing(path: Path) -> None:
    payload = os.urandom(100_000)
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        await path.service.send(payload)
        path.service.close()
        assert await read_all(path.client) == payload
        path.client.close()
    assert [end.result() for end in ends] == [Reason.OK, Reason.OK]


async def test_bulk_both_ways_is_spliced_and_intact(path: Path) -> None:
    payload = os.urandom(1 << 20) * 40 + b"tail"
    expected = hashlib.sha256(payload).hexdigest()
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        for wire in (path.client, path.service):
            group.create_task(_send_and_end(wire, payload))
        digests = [group.create_task(_digest(wire)) for wire in (path.client, path.service)]
    assert [digest.result() for digest in digests] == [expected, expected]
    assert [end.result() for end in ends] == [Reason.OK, Reason.OK]


@pytest.mark.parametrize("seed", range(8))
async def test_any_pace_of_both_sides(path: Path, seed: int) -> None:
    """Random sizes, pauses and half-closes: both sides get exactly what the other sent, then its end."""
    dice = random.Random(seed)
    payloads = [dice.randbytes(dice.choice((0, 1, 7, 70_000, 3_000_000))) for _ in range(2)]

    async def send(wire: Wire, payload: bytes, dice: random.Random) -> None:
        at = 0
        while at < len(payload):
            size = dice.choice((1, 100, 65536, 400_000))
            await wire.send(payload[at : at + size])
            at += size
            if dice.random() < 0.2:
                await asyncio.sleep(dice.random() / 100)
        wire.shutdown_write()

    async def receive(wire: Wire, dice: random.Random) -> bytes:
        got = bytearray()
        while data := await wire.recv(dice.choice((1000, 65536, 1 << 20))):
            got += data
            if dice.random() < 0.2:
                await asyncio.sleep(dice.random() / 100)
        return bytes(got)

    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        for wire, payload in zip((path.client, path.service), payloads, strict=True):
            group.create_task(send(wire, payload, random.Random(dice.random())))
        got = [group.create_task(receive(wire, random.Random(dice.random()))) for wire in (path.client, path.service)]
    assert [task.result() for task in got] == payloads[::-1]
    assert [end.result() for end in ends] == [Reason.OK, Reason.OK]


async def test_a_client_reset_reaches_the_service_as_a_reset(path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        await path.client.send(b"half a req")
        await path.service.recv_exactly(10)
        path.client.reset()
        await until_reset(path.service)
    assert [end.result() for end in ends] == [Reason.CLIENT_RESET, Reason.TRUNCATED]


async def test_a_service_reset_reaches_the_client_as_a_reset(path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        await path.service.send(b"half an ans")
        await path.client.recv_exactly(11)
        path.service.reset()
        await until_reset(path.client)
    assert [end.result() for end in ends] == [Reason.TRUNCATED, Reason.SERVER_RESET]


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_cut_in_the_middle_is_a_reset_on_both_sides(path: Path, how: str) -> None:
    """A FIN between relay and gateway is never an end: neither peer may take it for one."""
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        await path.service.send(b"half an ans")
        await path.client.send(b"half a req")
        await path.client.recv_exactly(11)
        await path.service.recv_exactly(10)
        getattr(path.between[0], how)()
        await until_reset(path.client)
        await until_reset(path.service)
    assert [end.result() for end in ends] == [Reason.TRUNCATED, Reason.TRUNCATED]


async def test_a_cut_after_one_end_is_still_a_reset(path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        path.client.shutdown_write()
        assert await path.service.recv() == b""
        path.between[0].reset()
        await until_reset(path.client)
        with pytest.raises(OSError, match=r"."):
            while True:
                await path.service.send(b"x")
                await asyncio.sleep(0.001)
    assert [end.result() for end in ends] == [Reason.TRUNCATED, Reason.TRUNCATED]


async def test_an_answer_and_close_during_an_upload_arrives(path: Path) -> None:
    answer = os.urandom(200_000)
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)

        async def upload() -> None:
            with pytest.raises(OSError, match=r"."):
                while True:
                    await path.client.send(bytes(65536))

        uploading = group.create_task(upload())
        await path.service.recv_exactly(100_000)
        await path.service.send(answer)
        assert await path.service.flushed(10)
        path.service.close()  # with unread bytes: the kernel makes it a reset
        assert await path.client.recv_exactly(len(answer)) == answer
        await uploading
    assert ends[1].result() is Reason.SERVER_RESET


async def test_idle(path: Path) -> None:
    path.relay._activity.limit(0.05)
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        await until_reset(path.client)
        await until_reset(path.service)
    assert [end.result() for end in ends] == [Reason.IDLE_TIMEOUT, Reason.TRUNCATED]


@pytest.mark.parametrize(
    "wrong",
    [
        header(CapsuleType.FINISHED, 0),
        header(CapsuleType.READY, 0),
        header(CapsuleType.DONE, 0),
        header(CapsuleType.PING, 8) + bytes(8),
        header(CapsuleType.FINAL_DATA, 1) + b"x" + header(CapsuleType.DATA, 1) + b"y",
        header(CapsuleType.FINAL_DATA, 0) + header(CapsuleType.FINAL_DATA, 0),
        header(CapsuleType.REFUSED, 6) + b"\x05other",
        b"\xff" * 16,
    ],
)
async def test_a_broken_protocol_ends_the_stream(wrong: bytes) -> None:
    client, plain = await pair()
    relay_wire, peer = await pair()
    relay, gateway = Framed(relay_wire, Side.RELAY), Framed(peer, Side.GATEWAY)
    await gateway.send(Ready())
    await gateway.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
    await relay.next_message()
    await relay.next_message()
    await peer.send(wrong)
    reason = await Carry(plain, relay, Side.RELAY, **LIMITS).run()
    assert reason is Reason.PROTOCOL_ERROR
    await until_reset(client)
    client.close()
    peer.close()


async def test_a_small_message_costs_one_write_each_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header and payload leave in one send: counted, not timed."""
    writes = 0
    try_send = Wire.try_send

    def counting(self: Wire, *arguments: object, **options: object) -> int:
        nonlocal writes
        writes += 1
        return try_send(self, *arguments, **options)  # type: ignore[arg-type]

    async with asyncio.TaskGroup() as group:
        await path.run(group)
        monkeypatch.setattr(Wire, "try_send", counting)
        for _ in range(10):
            await path.client.send(b"ping")
            await path.service.recv_exactly(4)
            await path.service.send(b"pong")
            await path.client.recv_exactly(4)
        assert writes == 10 * 6
        path.client.close()
        path.service.close()


async def _send_and_end(wire: Wire, payload: bytes) -> None:
    await wire.send(payload)
    wire.shutdown_write()


async def _digest(wire: Wire) -> str:
    digest = hashlib.sha256()
    while data := await wire.recv(1 << 18):
        digest.update(data)
    return digest.hexdigest()
