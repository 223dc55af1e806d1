"""Waiting for something to happen: for an event that is logged, a state of discovery, or, where nothing announces it, by polling.

    wait_until(lambda: mesh.ready("relay"), what="the relay is ready")
    await eventually(lambda: stream.closed)

Polling is for what another process, another thread or the kernel does. Where there is an event, a future or a queue, wait for that.
No test asserts how long a wait took: the limit only ends a test that would otherwise hang.
"""

import asyncio
import contextlib
import inspect
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from discovery.client.contract import Discovery

Found = TypeVar("Found")

LIMIT_S = 30.0
"""Far longer than anything that works takes, even under load. Below pytest's limit of 60 s, so that the error names the wait."""

POLL_INTERVAL_S = 0.01

Details = Callable[[], str]
"""Gives text for the error, such as the end of a log. It is called only on failure."""


def wait_until(
    holds: Callable[[], Found | None],
    limit_s: float = LIMIT_S,
    *,
    what: str = "",
    details: Details | None = None,
    interval_s: float = POLL_INTERVAL_S,
) -> Found:
    """Block the thread until `holds()` is true, and return its value. Inside an event loop, use `eventually`.

    Args:
        limit_s: seconds to wait at most. The condition is checked once more after that.
        what: the condition in words, for the error, where the line of the test does not say it.

    Raises:
        AssertionError: the limit was reached first.
    """
    deadline = time.monotonic() + limit_s
    while True:
        expired = time.monotonic() >= deadline
        if value := holds():
            return value
        if expired:
            raise _expired(what, limit_s, details)
        time.sleep(interval_s)


async def eventually(
    holds: Callable[[], Any],
    limit_s: float = LIMIT_S,
    *,
    what: str = "",
    details: Details | None = None,
) -> Any:
    """Wait in the event loop until `holds()` is true, and return its value. If it is awaitable, what it gives counts.

    Arguments and errors are those of `wait_until`.
    """
    deadline = time.monotonic() + limit_s
    while True:
        expired = time.monotonic() >= deadline
        found = holds()
        value = await found if inspect.isawaitable(found) else found
        if value:
            return value
        if expired:
            raise _expired(what, limit_s, details)
        await asyncio.sleep(POLL_INTERVAL_S)


async def later() -> None:
    """Wait until the loop's clock has moved on. It counts whole milliseconds."""
    loop = asyncio.get_running_loop()
    now = loop.time()
    while loop.time() == now:
        await asyncio.sleep(0.001)


def listens(address: str, port: int) -> bool:
    """Return whether a connection to this port is accepted, within a second."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


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


def _expired(what: str, limit_s: float, details: Details | None) -> AssertionError:
    text = f"not within {limit_s:g} s{': ' if what else ''}{what}"
    return AssertionError(text if details is None else f"{text}\n{details()}")
