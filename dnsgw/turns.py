"""Shares the loop out among connections that have more to do than is fair to do at once.

Whoever is fed faster than it works would else never give the loop back: timers, signals and everybody else would stand
still. Work is cut into portions, which take turns; all of them together get `PASS_S` before the loop sees to its sockets
and timers again, however many connections there are. Who just woke goes before those who never rest, but every
`_OLD_EVERY`-th turn is theirs (as the new flows of FQ-CoDel, RFC 8290 section 4.2).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import TypeAlias

log = logging.getLogger(__name__)

PORTION = 4  # messages that one connection handles in its turn
PASS_S = 0.001  # of work between two looks at sockets and timers
_OLD_EVERY = 4

Work: TypeAlias = Callable[[], bool]
"""Does one portion; says whether there is more to do now."""


class Turns:
    """The queue of those who have something to do."""

    __slots__ = ("_loop", "_new", "_old", "_turn", "_woken")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin with nothing to do."""
        self._loop = loop
        self._new: deque[Work] = deque()
        self._old: deque[Work] = deque()
        self._turn = 0
        self._woken = False

    def add(self, work: Work) -> None:
        """Give this work its turns until it has no more to do. It must not be waiting already."""
        self._new.append(work)
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        new, old = self._new, self._old
        end = perf_counter() + PASS_S
        while new or old:
            self._turn += 1
            olds_turn = not new or (old and not self._turn % _OLD_EVERY)
            work = old.popleft() if olds_turn else new.popleft()
            try:
                more = work()
            except Exception:  # a fault of ours, which must not cost the others their turns
                log.exception("dns_turn_failed")
                more = False
            if more:
                old.append(work)
            if perf_counter() >= end:
                break
        self._woken = bool(new or old)
        if self._woken:
            self._loop.call_soon(self._pass)
