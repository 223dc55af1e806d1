"""One timer for each stream: it ends the stream after too much silence, and has it checked every few seconds until then."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

CHECK_EVERY_S: Final = 5.0
"""How often an open stream is checked: a fraction of the 30 s within which a lost host is to be found."""


class IdleTimer:
    """Knows when a stream last moved a byte, on the loop's clock, and ends the stream after too much silence."""

    __slots__ = ("_check", "_check_every_s", "_is_watched", "_limit_s", "_loop", "_scope", "_timer", "last")

    def __init__(
        self, limit_s: float, *, check: Callable[[], None] | None = None, check_every_s: float = CHECK_EVERY_S
    ) -> None:
        """Start with a byte moved now.

        Args:
            limit_s: seconds of silence that end the stream; infinite for none.
            check: called every `check_every_s` seconds while the stream is watched.
        """
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._check = check
        self._check_every_s = check_every_s
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._is_watched = False
        self.last = self._loop.time()

    def now(self) -> float:
        """Return the time of the loop's clock, in seconds."""
        return self._loop.time()

    def touch(self) -> None:
        """Note that a byte was moved."""
        self.last = self._loop.time()

    def idle_s(self) -> float:
        """Return for how many seconds nothing has moved."""
        return self._loop.time() - self.last

    def limit(self, limit_s: float) -> None:
        """Change the limit: seconds without a byte in either direction, counted from now."""
        self._limit_s = limit_s
        self.touch()
        if self._is_watched:
            self._schedule(limit_s)

    def shorten(self, limit_s: float) -> None:
        """Lower the limit, unless it is already lower."""
        if limit_s < self._limit_s:
            self.limit(limit_s)

    def _schedule(self, left_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._check is not None:
            left_s = min(left_s, self._check_every_s)
        if left_s < float("inf"):
            self._timer = self._loop.call_later(left_s, self._look)

    def _look(self) -> None:
        # One timer for each stream, set again only when it fires: a byte costs one clock reading and no timer operation.
        left_s = self.last + self._limit_s - self._loop.time()
        if left_s <= 0:
            self._scope.reschedule(self._loop.time())
            return
        if self._check is not None:
            self._check()
        if self._is_watched:  # the check may have ended the stream
            self._schedule(left_s)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Run the block under the limit. To be used once.

        Raises:
            TimeoutError: nothing moved for that long.
        """
        self.touch()
        async with self._scope:
            self._is_watched = True
            self._schedule(self._limit_s)
            try:
                yield
            finally:
                self._is_watched = False
                self._check = None  # it belongs to what holds this timer: a reference cycle for each stream
                if self._timer is not None:
                    self._timer.cancel()
