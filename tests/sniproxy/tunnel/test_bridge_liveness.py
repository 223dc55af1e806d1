"""A bridge whose other side, or plain end, is lost: it says heartbeats, hears them, and ends the stream that hears none."""

import asyncio

import pytest

from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.bridge import BridgeTiming
from sniproxy.tunnel.capsules import CapsuleType, Control
from sniproxy.tunnel.heartbeat import HeartbeatTiming
from sniproxy.tunnel.messages import Heartbeat
from sniproxy.tunnel.state import Side
from tests.support.bridges import a_half
from tests.support.streams import until_reset

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("side", Side)]

QUICK = BridgeTiming(linger_s=0.0, check_every_s=0.02, heartbeat=HeartbeatTiming(interval_s=0.04, silence_s=0.3))

PIECES = 128
"""Megabytes: more than the kernel takes in the buffers of two connections."""


async def test_a_silent_other_side_is_lost(side: Side) -> None:
    async with a_half(side) as half:
        assert await half.bridge(side, heartbeats=True, timing=QUICK).run() is Reason.PATH_LOST
        await until_reset(half.plain)


async def test_heartbeats_are_said_and_heard(side: Side) -> None:
    async with a_half(side) as half, asyncio.TaskGroup() as group:
        running = group.create_task(half.bridge(side, heartbeats=True, timing=QUICK).run())
        heard = 0
        while heard < 12:  # longer than silence would be tolerated
            for event in await half.peer.read():
                assert isinstance(event, Control)
                assert event.type is CapsuleType.HEARTBEAT
                heard += 1
                await half.peer.send(Heartbeat())
        assert not running.done()
        half.peer.stream.reset()
        assert await running is Reason.TRUNCATED


async def test_none_is_said_to_a_side_that_does_not_know_them(side: Side) -> None:
    async with a_half(side) as half, asyncio.TaskGroup() as group:
        running = group.create_task(half.bridge(side, timing=QUICK).run())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await half.peer.read()
        assert not running.done()
        half.peer.stream.reset()
        await running


async def test_a_side_whose_plain_end_does_not_read_does_not_judge(side: Side) -> None:
    """The other side says heartbeats, but nobody reads them behind the payload."""
    async with a_half(side) as half, asyncio.TaskGroup() as group:
        running = group.create_task(half.bridge(side, heartbeats=True, timing=QUICK).run())

        async def send() -> None:
            for _ in range(PIECES):
                await half.peer.send_data(bytes(1_000_000))

        sending = group.create_task(send())
        await asyncio.sleep(1.0)
        assert not sending.done()
        assert not running.done()
        left = PIECES * 1_000_000
        while left:
            left -= len(await half.plain.recv())
        await sending
        assert await running is Reason.PATH_LOST, "now that it reads, and nothing comes"


async def test_a_lost_plain_end_ends_the_stream(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {Side.RELAY: Reason.CLIENT_LOST, Side.GATEWAY: Reason.SERVER_LOST}[side]
    async with a_half(side) as half:
        monkeypatch.setattr(type(half.our_plain), "lost_peer", lambda stream: stream is half.our_plain)
        assert await half.bridge(side, timing=QUICK).run() is lost
        await until_reset(half.peer.stream)


async def test_a_lost_neighbour_ends_the_stream(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_half(side) as half:
        monkeypatch.setattr(type(half.our_plain), "lost_peer", lambda stream: stream is half.ours.stream)
        assert await half.bridge(side, timing=QUICK).run() is Reason.PATH_LOST
