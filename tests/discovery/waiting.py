"""Waiting for what discovery does: for a log line, and for a state of a store. For the rest see `tests.support.waiting`."""

import asyncio
import inspect
import logging
from collections.abc import Callable

from discovery.store import Store

DEADLINE_S = 20.0


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


async def _value(found: object) -> object:
    return await found if inspect.isawaitable(found) else found
