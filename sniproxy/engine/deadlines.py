"""One time limit for many wires, without a timer each, and with a bound on what its ends cost at a time."""

import asyncio
from collections import OrderedDict

from sniproxy.engine.byte_stream import ByteStream

EXPIRED_A_TURN = 4
"""Wires whose time is over that are ended in one turn of the loop. Thousands that fall due at the same moment are a burst of work,
and whoever comes meanwhile waits for a turn of it, not for all."""


class Deadlines:
    """Gives wires the same time to be read from: first come, first due. What is over gets `ByteStream.expire`."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._due: OrderedDict[ByteStream, float] = OrderedDict()
        self._timer: asyncio.Handle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def begin(self, wire: ByteStream) -> None:
        """Let this wire's time begin now."""
        self._due[wire] = self._loop.time() + self.limit_s
        if self._timer is None:
            self._timer = self._loop.call_later(self.limit_s, self._look)

    def end(self, wire: ByteStream) -> None:
        """Let this wire have all the time there is; one that has is left alone."""
        self._due.pop(wire, None)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        for _ in range(EXPIRED_A_TURN):
            if not self._due:
                return
            wire, at = next(iter(self._due.items()))
            if at > now:
                self._timer = self._loop.call_later(at - now, self._look)
                return
            del self._due[wire]
            wire.expire()
        self._timer = self._loop.call_soon(self._look)
