"""Waiting for what happens in another process or thread, or in the kernel, and sends us no event."""

import asyncio
import time
from collections.abc import Callable

INTERVAL_S = 0.005


async def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until `condition()` is true. TimeoutError if that takes longer than `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(INTERVAL_S)


def eventually_true(condition: Callable[[], object], timeout_s: float = 10.0, interval_s: float = INTERVAL_S) -> bool:
    """Block until `condition()` is true; False if that takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True
