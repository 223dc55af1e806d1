"""Two bridges, mirror images of each other, over a real connection: what a client and a service see of each other."""

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

import pytest

from sniproxy.engine import SocketStream
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.bridge import StreamBridge
from sniproxy.tunnel.capsules import CapsuleType, header
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Done, Finished, Message, Opened, Ready
from sniproxy.tunnel.state import Side
from tests.support.bridges import GATEWAY, LIMITS, RELAY, TIMING, Half, a_half, digest_of, send_and_end
from tests.support.streams import nothing_large_kept, pair, peer_waits, read_all, turns, until_reset

pytestmark = pytest.mark.anyio


@dataclass
class Path:
    """client ⇄ bridge of the relay ⇄ bridge of the gateway ⇄ service."""

    client: SocketStream
    service: SocketStream
    relay: StreamBridge
    gateway: StreamBridge
    between: tuple[SocketStream, SocketStream]

    async def run(self, group: asyncio.TaskGroup) -> tuple[asyncio.Task[Reason], asyncio.Task[Reason]]:
        return group.create_task(self.relay.run()), group.create_task(self.gateway.run())


@pytest.fixture
def writes() -> list[bytes] | None:
    """Return None, or a list that gets what each write on the path has written."""
    return None


@pytest.fixture(params=["plain", "tls"])
async def path(request: pytest.FixtureRequest, writes: list[bytes] | None) -> AsyncIterator[Path]:
    client, relay_plain = await pair(writes=writes)
    service, gateway_plain = await pair(writes=writes)
    relay_stream, gateway_stream = await pair(request.param, writes=writes)
    relay, gateway = CapsuleConnection(relay_stream, Side.RELAY), CapsuleConnection(gateway_stream, Side.GATEWAY)
    await gateway.send(Ready())
    await gateway.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
    assert await relay.next_message() == Ready()
    assert isinstance(await relay.next_message(), Opened)
    yield Path(
        client=client,
        service=service,
        relay=StreamBridge(relay_plain, relay, Side.RELAY, **LIMITS),
        gateway=StreamBridge(gateway_plain, gateway, Side.GATEWAY, **LIMITS),
        between=(relay_stream, gateway_stream),
    )
    for stream in (client, service, relay_plain, gateway_plain, relay_stream, gateway_stream):
        stream.close()


@pytest.mark.parametrize("path", ["plain"], indirect=True)
async def test_an_idle_stream_keeps_nothing_of_what_it_moved(path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        with nothing_large_kept():
            for near, far in ((path.client, path.service), (path.service, path.client)):
                await near.send(bytes(50_000))
                assert len(await far.recv_exactly(50_000)) == 50_000
                await turns()
        for end in ends:
            end.cancel()


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
        for stream in (path.client, path.service):
            group.create_task(send_and_end(stream, payload))
        digests = [group.create_task(digest_of(stream)) for stream in (path.client, path.service)]
    assert [digest.result() for digest in digests] == [expected, expected]
    assert [end.result() for end in ends] == [Reason.OK, Reason.OK]


@pytest.mark.parametrize("seed", range(8))
async def test_any_pace_of_both_sides(path: Path, seed: int) -> None:
    """Random sizes, pauses and half-closes: both sides get exactly what the other sent, then its end."""
    dice = random.Random(seed)
    payloads = [dice.randbytes(dice.choice((0, 1, 7, 70_000, 3_000_000))) for _ in range(2)]

    async def send(stream: SocketStream, payload: bytes, dice: random.Random) -> None:
        at = 0
        while at < len(payload):
            size = dice.choice((1, 100, 65536, 400_000))
            await stream.send(payload[at : at + size])
            at += size
            if dice.random() < 0.2:
                await asyncio.sleep(dice.random() / 100)
        stream.shutdown_write()

    async def receive(stream: SocketStream, dice: random.Random) -> bytes:
        got = bytearray()
        while data := await stream.recv(dice.choice((1000, 65536, 1 << 20))):
            got += data
            if dice.random() < 0.2:
                await asyncio.sleep(dice.random() / 100)
        return bytes(got)

    async with asyncio.TaskGroup() as group:
        ends = await path.run(group)
        for stream, payload in zip((path.client, path.service), payloads, strict=True):
            group.create_task(send(stream, payload, random.Random(dice.random())))
        got = [
            group.create_task(receive(stream, random.Random(dice.random()))) for stream in (path.client, path.service)
        ]
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
    """A FIN between relay and gateway is never an end: neither peer may mistake it for one."""
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
                await path.service.writable()
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
    relay_stream, peer = await pair()
    relay, gateway = CapsuleConnection(relay_stream, Side.RELAY), CapsuleConnection(peer, Side.GATEWAY)
    await gateway.send(Ready())
    await gateway.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
    await relay.next_message()
    await relay.next_message()
    await peer.send(wrong)
    reason = await StreamBridge(plain, relay, Side.RELAY, **LIMITS).run()
    assert reason is Reason.PROTOCOL_ERROR
    await until_reset(client)
    client.close()
    peer.close()


@pytest.mark.parametrize("writes", [[]])
async def test_a_small_message_costs_one_write_each_way(path: Path, writes: list[bytes]) -> None:
    """Header and payload leave in one write: counted, not timed."""
    async with asyncio.TaskGroup() as group:
        await path.run(group)
        writes.clear()
        for _ in range(10):
            await path.client.send(b"ping")
            await path.service.recv_exactly(4)
            await path.service.send(b"pong")
            await path.client.recv_exactly(4)
        assert len(writes) == 10 * 6
        path.client.close()
        path.service.close()


# --- one side against a scripted other ------------------------------------------------------------------------------


@pytest.fixture(params=[Side.RELAY, Side.GATEWAY], ids=["relay", "gateway"])
async def half(request: pytest.FixtureRequest) -> AsyncIterator[Half]:
    async with a_half(request.param) as half:
        yield half


@RELAY
async def test_a_lost_client_does_not_keep_an_upload_that_stands_still(half: Half) -> None:
    """A write finds its reset, while the data that it sent before waits for a gateway that reads nothing."""
    async with asyncio.TaskGroup() as group:
        carrying = group.create_task(half.bridge(Side.RELAY, timing=replace(TIMING, stalled_s=0.05)).run())
        try:
            async with asyncio.timeout(0.3):
                while True:
                    await half.plain.send(bytes(1 << 20))
        except TimeoutError:
            pass  # all buffers up to the gateway are full
        half.plain.reset()
        async with asyncio.timeout(10):
            await half.peer.send_data(b"to nobody")
            assert await carrying is Reason.CLIENT_RESET


class Unconfirmed(CapsuleConnection):
    """A connection that is gone when the end is to be confirmed."""

    async def send(self, *messages: Message, data: bytes = b"") -> None:
        if any(isinstance(message, Finished) for message in messages):
            raise ConnectionResetError("the connection is gone")
        await super().send(*messages, data=data)


@pytest.mark.parametrize("side", list(Side))
async def test_where_the_confirmation_fails_the_stream_is_cut(side: Side) -> None:
    """Nothing reads from the connection any more, so nothing else would notice."""
    async with a_half(side, Unconfirmed) as half:
        await half.peer.send_data(b"all", final=True)
        async with asyncio.timeout(5):
            assert await half.bridge(side).run() is Reason.TRUNCATED


async def test_cancelled_before_the_first_step(half: Half) -> None:
    """No coroutine of a direction is left that was never awaited."""
    async with asyncio.TaskGroup() as group:
        carrying = group.create_task(half.bridge(half.ours.ends._side).run())
        await asyncio.sleep(0)
        carrying.cancel()
    assert half.our_plain.closed
    assert half.ours.stream.closed
    await until_reset(half.plain)


async def test_cancelled_in_the_middle_both_see_a_reset(half: Half) -> None:
    async with asyncio.TaskGroup() as group:
        carrying = group.create_task(half.bridge(half.ours.ends._side).run())
        await half.peer.send_data(b"half")
        assert await half.plain.recv_exactly(4) == b"half"
        carrying.cancel()
    await until_reset(half.plain)
    await until_reset(half.peer.stream)


@GATEWAY
async def test_bytes_that_were_read_with_the_preamble_go_first(half: Half) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(half.bridge(Side.GATEWAY, first=b"ClientHello ").run())
        await half.peer.send_data(b"and more")
        assert await half.plain.recv_exactly(20) == b"ClientHello and more"
        half.plain.reset()


# --- TIME_WAIT ------------------------------------------------------------------------------------------------------


async def finished(half: Half) -> None:
    """Play both ends of a stream at a gateway, up to the last FINISHED."""
    await half.peer.send_data(b"", final=True)
    half.plain.shutdown_write()
    assert await read_all(half.plain) == b""
    while not (half.peer.exhausted and half.peer.ends.finished_received):
        await half.peer.read()
    await half.peer.send(Finished())


@pytest.mark.parametrize("dialled", [True, False])
async def test_after_done_a_gateway_resets_what_it_has_dialled(dialled: bool) -> None:
    """No port of its own stays in TIME_WAIT then. The service sees an ordinary end."""
    async with a_half(Side.GATEWAY) as half, asyncio.TaskGroup() as group:
        running = group.create_task(half.bridge(Side.GATEWAY, resets_when_done=dialled).run())
        await finished(half)
        await half.peer.send(Done())
        if dialled:
            await until_reset(half.peer.stream)
        else:
            assert await read_all(half.peer.stream) == b""
        assert await running is Reason.OK
        assert await read_all(half.plain) == b""
        for peer, waits in ((half.peer.stream, not dialled), (half.plain, False)):
            peer.close()
            assert peer_waits(peer) is waits


async def test_without_done_a_gateway_closes() -> None:
    """Something may be in flight, such as its own FINISHED, which a reset could overtake in a TURN server."""
    timing = replace(TIMING, done_s=0.05)
    async with a_half(Side.GATEWAY) as half, asyncio.TaskGroup() as group:
        running = group.create_task(half.bridge(Side.GATEWAY, resets_when_done=True, timing=timing).run())
        await finished(half)
        assert await read_all(half.peer.stream) == b""
        assert await running is Reason.OK
        half.peer.stream.close()
        assert peer_waits(half.peer.stream)


@pytest.mark.parametrize("ends", ["close", "reset"])
async def test_a_relay_takes_either_end_after_done_for_a_good_one(ends: str) -> None:
    async with a_half(Side.RELAY) as half, asyncio.TaskGroup() as group:
        running = group.create_task(half.bridge(Side.RELAY).run())
        await finished(half)
        while not half.peer.ends.done:
            await half.peer.read()
        getattr(half.peer.stream, ends)()
        assert await running is Reason.OK
        assert await read_all(half.plain) == b""
