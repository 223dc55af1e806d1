"""Shares the loop out among connections that have more to do than is fair to do at once.

Whoever is fed faster than it works would else never give the loop back: timers, signals and everybody else would stand
still. Work is cut into portions, which take turns; all of them together get `PASS_S` before the loop sees to its sockets
and timers again, however many connections there are.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import TypeAlias

log = logging.getLogger(__name__)

PORTION = 4  # messages that one connection handles in its turn
PASS_S = 0.002  # of work between two looks at sockets and timers

Work: TypeAlias = Callable[[], bool]
"""Does one portion; says whether there is more to do now."""


class Turns:
    """The queue of those who have something to do."""

    __slots__ = ("_loop", "_waiting", "_woken")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin with nothing to do."""
        self._loop = loop
        self._waiting: deque[Work] = deque()
        self._woken = False

    def add(self, work: Work) -> None:
        """Give this work its turns until it has no more to do. It must not be waiting already."""
        self._waiting.append(work)
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        waiting = self._waiting
        end = perf_counter() + PASS_S
        while waiting:
            work = waiting.popleft()
            try:
                more = work()
            except Exception:  # a fault of ours, which must not cost the others their turns
                log.exception("dns_turn_failed")
                more = False
            if more:
                waiting.append(work)
            if perf_counter() >= end:
                break
        self._woken = bool(waiting)
        if waiting:
            self._loop.call_soon(self._pass)
