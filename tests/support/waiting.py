"""Polling, for state that a real process or a kernel object does not announce. Where there is an event, wait for the event instead.

    wait_until("the relay is ready", lambda: mesh.ready("relay"))
    await eventually("the socket is closed", lambda: wire.closed)

No test asserts how long a wait took: the limit only ends a test that would otherwise hang.
"""

import asyncio
import contextlib
import inspect
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

Found = TypeVar("Found")

LIMIT_S = 30.0
"""Far longer than anything that works takes, even under load. Below pytest's limit of 60 s, so that the error names the wait."""

POLL_INTERVAL_S = 0.01


def wait_until(
    what: str,
    holds: Callable[[], Found | None],
    limit_s: float = LIMIT_S,
    *,
    details: Callable[[], str] | None = None,
) -> Found:
    """Block the thread until `holds()` is true, and return its value. Inside an event loop, use `eventually`.

    Args:
        what: the condition in words, for the error.
        limit_s: seconds to wait at most. The condition is checked once more after that.
        details: gives text for the error, such as the end of a log. It is called only on failure.

    Raises:
        AssertionError: names `what` if the limit is reached first.
    """
    deadline = time.monotonic() + limit_s
    while True:
        expired = time.monotonic() >= deadline
        if value := holds():
            return value
        if expired:
            raise _expired(what, limit_s, details)
        time.sleep(POLL_INTERVAL_S)


async def eventually(
    what: str,
    holds: Callable[[], Awaitable[object] | object],
    limit_s: float = LIMIT_S,
    *,
    details: Callable[[], str] | None = None,
) -> None:
    """Wait in the event loop until `holds()` is true. It may return an awaitable, which is awaited and its result checked.

    Arguments and errors are those of `wait_until`.
    """
    deadline = time.monotonic() + limit_s
    while True:
        expired = time.monotonic() >= deadline
        value = holds()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return
        if expired:
            raise _expired(what, limit_s, details)
        await asyncio.sleep(POLL_INTERVAL_S)


def listens(address: str, port: int) -> bool:
    """Return whether a connection to this port is accepted, within a second."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


def _expired(what: str, limit_s: float, details: Callable[[], str] | None) -> AssertionError:
    more = f"\n{details()}" if details is not None else ""
    return AssertionError(f"not within {limit_s:g} s: {what}{more}")
