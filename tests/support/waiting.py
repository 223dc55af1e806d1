"""Waiting for state that announces no event: that of another process or thread, or inside a library.

Wherever there is an event, a future or a queue, tests wait for that instead.
"""

import asyncio
import time
from collections.abc import Callable

LIMIT_S = 10.0
_LOOK_EVERY_S = 0.01


async def eventually(holds: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait until `holds()` is true, while the loop runs. Raises TimeoutError after `limit_s` seconds."""
    async with asyncio.timeout(limit_s):
        while not holds():
            await asyncio.sleep(_LOOK_EVERY_S)


def eventually_blocking(holds: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait until `holds()` is true, where there is no loop. Raises TimeoutError after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s:g} s")
        time.sleep(_LOOK_EVERY_S)


async def some_turns(count: int = 20) -> None:
    """Let the loop run `count` times: for what happens within a few callbacks, or must not."""
    for _ in range(count):
        await asyncio.sleep(0)
