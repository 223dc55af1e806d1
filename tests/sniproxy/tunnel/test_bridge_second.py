"""Second connections: when an upload moves to one, and what a peer may not do with it."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.capsules import Payload
from sniproxy.tunnel.connection import RECEIVED_BYTES, CapsuleConnection
from sniproxy.tunnel.messages import Continued, Finished, Received
from sniproxy.tunnel.state import LIMIT_UNRECEIVED, RECEIVED_INTERVAL, Side
from tests.support.bridges import GATEWAY, RELAY, TIMING, Half, a_half, payload_of, send_and_end
from tests.support.streams import pair, read_all

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[Side.RELAY, Side.GATEWAY], ids=["relay", "gateway"])
async def half(request: pytest.FixtureRequest) -> AsyncIterator[Half]:
    async with a_half(request.param) as half:
        yield half


@RELAY
@pytest.mark.parametrize("failures", [0, 3])
async def test_an_upload_that_outgrows_its_connection_goes_on_over_another(half: Half, failures: int) -> None:
    """If it is not available at once, as on a saturated link, it is requested again."""
    timing = replace(TIMING, second_retry_s=(0.01, 0.02, 0.03))
    ours, theirs = await pair()
    second = CapsuleConnection(theirs, Side.GATEWAY)
    payload = os.urandom(1 << 20)
    failed = [ConnectionError("READY is late")] * failures

    async def dial() -> CapsuleConnection:
        if failed:
            raise failed.pop()
        return CapsuleConnection(ours, Side.RELAY)

    async with asyncio.TaskGroup() as group:
        carrying = group.create_task(half.bridge(Side.RELAY, second=dial, timing=timing).run())
        group.create_task(send_and_end(half.plain, payload))
        before = await payload_of(half.peer, until=Continued)
        assert 0 < half.peer.received <= LIMIT_UNRECEIVED + 8, "what a TURN server may hold"
        assert before + await payload_of(second) == payload
        half.peer.ends.end_elsewhere()
        await half.peer.send(Finished())
        await half.peer.send_data(b"thanks", final=True)
        assert await read_all(half.plain) == b"thanks"
        while not half.peer.ends.done:
            await half.peer.read()
        half.peer.stream.close()
    assert carrying.result() is Reason.OK
    assert ours.closed
    theirs.close()


@RELAY
async def test_an_upload_that_is_taken_needs_no_second_connection(half: Half) -> None:
    async def dial() -> CapsuleConnection:
        pytest.fail("a second connection was asked for")

    async with asyncio.TaskGroup() as group:
        carrying = group.create_task(half.bridge(Side.RELAY, second=dial).run())
        for _ in range(20):
            await half.plain.send(bytes(20_000))
            taken = 0
            while taken < 20_000:
                taken += sum(len(event.data) for event in await half.peer.read() if isinstance(event, Payload))
            await half.peer.send(Received(half.peer.received))
        half.plain.reset()
        assert await carrying is Reason.CLIENT_RESET


@RELAY
async def test_received_of_what_was_never_sent(half: Half) -> None:
    await half.peer.send(Received(1 << 40))
    assert await half.bridge(Side.RELAY).run() is Reason.PROTOCOL_ERROR


@RELAY
async def test_received_that_goes_back(half: Half) -> None:
    async with asyncio.TaskGroup() as group:
        carrying = group.create_task(half.bridge(Side.RELAY).run())
        await half.plain.send(bytes(RECEIVED_BYTES))
        taken = 0
        while taken < RECEIVED_BYTES:
            taken += sum(len(event.data) for event in await half.peer.read() if isinstance(event, Payload))
        await half.peer.send(Received(5))
        await half.peer.send(Received(4))
        assert await carrying is Reason.PROTOCOL_ERROR


@RELAY
async def test_received_again_and_again(half: Half) -> None:
    """One is allowed for each 16 KiB sent, and one more."""
    async with asyncio.TaskGroup() as group:
        carrying = group.create_task(half.bridge(Side.RELAY).run())
        await half.plain.send(b"question")
        await half.peer.read()
        await half.peer.send(Received(1))
        await half.peer.send(Received(1))
        assert await carrying is Reason.FLOOD


@GATEWAY
async def test_continued_on_a_direct_connection(half: Half) -> None:
    await half.peer.send(Continued())
    assert await half.bridge(Side.GATEWAY).run() is Reason.PROTOCOL_ERROR


@GATEWAY
async def test_continued_on_the_second_connection(half: Half) -> None:
    """There is no third connection: two tasks would read the second one."""
    theirs, ours = await pair()

    async def arrived() -> CapsuleConnection:
        return CapsuleConnection(ours, Side.GATEWAY)

    await half.peer.send(Continued())
    await theirs.send(Continued().pack())
    async with asyncio.timeout(5):
        assert await half.bridge(Side.GATEWAY, second=arrived).run() is Reason.PROTOCOL_ERROR
    theirs.close()


@GATEWAY
async def test_continued_and_then_nothing(half: Half) -> None:
    await half.peer.send(Continued())

    async def never() -> CapsuleConnection:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    timing = replace(TIMING, done_s=0.05)
    async with asyncio.timeout(5):
        assert await half.bridge(Side.GATEWAY, second=never, timing=timing).run() is Reason.TRUNCATED


@GATEWAY
async def test_a_gateway_reports_what_it_has_received(half: Half) -> None:
    async def never() -> CapsuleConnection:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    counts = []  # type: ignore[var-annotated]
    async with asyncio.TaskGroup() as group:
        group.create_task(half.bridge(Side.GATEWAY, second=never).run())
        for _ in range(10):
            await half.peer.send_data(bytes(10_000))
            await half.plain.recv_exactly(10_000)
        while not counts or counts[-1] < 2 * RECEIVED_INTERVAL:
            message = await half.peer.next_message()
            assert isinstance(message, Received)
            counts.append(message.count)
        half.plain.reset()
    assert counts == sorted(counts)
    assert counts[-1] <= half.peer.sent
