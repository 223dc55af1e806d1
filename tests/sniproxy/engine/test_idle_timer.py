"""The timer of a stream: silence ends it, and a check is made meanwhile."""

import asyncio
import math

import pytest

from sniproxy.engine import IdleTimer

pytestmark = pytest.mark.anyio


async def test_silence_ends_the_block() -> None:
    timer = IdleTimer(0.05)
    with pytest.raises(TimeoutError):
        async with timer.watched():
            await asyncio.Event().wait()


async def test_a_stream_that_moves_is_not_ended() -> None:
    timer = IdleTimer(0.1)
    async with timer.watched():
        for _ in range(10):
            await asyncio.sleep(0.03)
            timer.touch()


async def test_a_check_is_made_again_and_again_until_the_end() -> None:
    checks = asyncio.Semaphore(0)
    timer = IdleTimer(math.inf, check=checks.release, check_every_s=0.01)
    async with asyncio.timeout(10), timer.watched():
        for _ in range(3):
            await checks.acquire()
    made = checks._value
    await asyncio.sleep(0.05)
    assert checks._value == made


async def test_without_a_limit_silence_ends_nothing() -> None:
    timer = IdleTimer(math.inf)
    with pytest.raises(TimeoutError):
        async with timer.watched():
            await asyncio.sleep(0.05)
            timer.limit(math.inf)
            await asyncio.sleep(0.05)
            timer.shorten(0.01)
            await asyncio.Event().wait()


async def test_checks_go_on_after_a_change_of_the_limit() -> None:
    checks = asyncio.Semaphore(0)
    timer = IdleTimer(60.0, check=checks.release, check_every_s=0.01)
    async with asyncio.timeout(10), timer.watched():
        timer.limit(30.0)
        for _ in range(3):
            await checks.acquire()


async def test_a_check_may_end_the_stream() -> None:
    ended = asyncio.Event()
    timer = IdleTimer(60.0, check=ended.set, check_every_s=0.01)
    async with asyncio.timeout(10), timer.watched():
        await ended.wait()
