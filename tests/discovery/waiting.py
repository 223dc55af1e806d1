"""Waiting in tests: for a log record, for a state of a store, or, where there is no event, by polling."""

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import Any

from discovery.store import Store

DEADLINE_S = 20.0
LOOK_EVERY_S = 0.02


class LogWaiter(logging.Handler):
    """Waits for log records, including those from before the call."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._wake: list[Callable[[], object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.getMessage()} {getattr(record, 'event', '')}")
        for wake in tuple(self._wake):
            wake()

    def count(self, text: str) -> int:
        """Return the number of records with this text in their message or event."""
        return sum(text in line for line in self._lines)

    async def until(self, text: str, count: int = 1) -> None:
        """Wait until this many records have this text in their message or event."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)  # some records are logged in threads

        self._wake.append(wake)
        try:
            async with asyncio.timeout(DEADLINE_S):
                while self.count(text) < count:
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise AssertionError(f"{text!r} was logged {self.count(text)} times, expected {count}") from None
        finally:
            self._wake.remove(wake)


async def stored(store: Store, holds: Callable[[], object]) -> None:
    """Wait until a condition holds, which is checked after each write. It may be a coroutine function, as a store's methods are."""
    changed = asyncio.Event()
    stop = store.subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not await _value(holds()):
                await changed.wait()
                changed.clear()
    finally:
        stop()


async def eventually(holds: Callable[[], object], limit_s: float = DEADLINE_S) -> Any:
    """Poll until the result is true, and return it: for other processes and sockets, which give no event."""
    async with asyncio.timeout(limit_s):
        while not (found := await _value(holds())):
            await asyncio.sleep(LOOK_EVERY_S)
    return found


async def _value(found: object) -> object:
    return await found if inspect.isawaitable(found) else found
