"""One time limit for many streams, with a single timer, and with a bound on how many expire at once."""

import asyncio
from collections import OrderedDict

from sniproxy.engine.byte_stream import ByteStream

EXPIRED_A_TURN = 4
"""Streams that expire in one pass of the loop. If thousands fall due at the same moment, new clients wait for one pass and not for
all of them."""


class Deadlines:
    """Gives each stream the same time and then calls its `expire`: first begun, first expired."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._due: OrderedDict[ByteStream, float] = OrderedDict()
        self._timer: asyncio.Handle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def begin(self, stream: ByteStream) -> None:
        """Start the time of this stream now."""
        self._due[stream] = self._loop.time() + self.limit_s
        if self._timer is None:
            self._timer = self._loop.call_later(self.limit_s, self._look)

    def end(self, stream: ByteStream) -> None:
        """Remove the limit of this stream, if it has one."""
        self._due.pop(stream, None)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        for _ in range(EXPIRED_A_TURN):
            if not self._due:
                return
            stream, at = next(iter(self._due.items()))
            if at > now:
                self._timer = self._loop.call_later(at - now, self._look)
                return
            del self._due[stream]
            stream.expire()
        self._timer = self._loop.call_soon(self._look)
