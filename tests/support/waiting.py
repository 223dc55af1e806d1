"""Waiting for something to happen: for an event that is logged, a state of discovery, or, where nothing announces it, by looking.

Looking is for what another process or thread does, or a library inside. Wherever there is an event, a future or a queue, tests wait
for that.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from discovery.client.contract import Discovery

LIMIT_S = 20.0
_LOOK_EVERY_S = 0.01


async def eventually(holds: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait until `holds()`, or what it returns to be awaited, is true. Raises TimeoutError after `limit_s` seconds."""
    async with asyncio.timeout(limit_s):
        while not (await found if inspect.isawaitable(found := holds()) else found):
            await asyncio.sleep(_LOOK_EVERY_S)


def eventually_blocking(holds: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait until `holds()` is true, where no loop runs. Raises TimeoutError after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s:g} s")
        time.sleep(_LOOK_EVERY_S)


async def discovery_has(discovery: Discovery, holds: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait until `holds()` is true, asked after each change of discovery. Raises TimeoutError after `limit_s` seconds."""
    changed = asyncio.Event()
    unsubscribe = discovery.subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(limit_s):
            while not holds():
                await changed.wait()
                changed.clear()
    finally:
        unsubscribe()


@contextmanager
def logged(logger: str, *names: str) -> Iterator[asyncio.Event]:
    """Give an event that is set as soon as one of these events is logged below `logger`, at level INFO or above."""
    seen = asyncio.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() in names:
                seen.set()

    watched, watch = logging.getLogger(logger), Watch()
    level = watched.level
    watched.addHandler(watch)
    watched.setLevel(logging.INFO)
    try:
        yield seen
    finally:
        watched.removeHandler(watch)
        watched.setLevel(level)
