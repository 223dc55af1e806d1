"""Whose turn it is in a server: who asks little goes at once, who asks much waits in turn and leaves half of the time to others."""

import asyncio
from collections import deque
from collections.abc import Hashable

MIN_PAUSE_S = 0.001
MAX_PAUSE_S = 0.1


class Gate:
    """Lets requests in. Crowds wait in one queue for each of whoever asks; the queues take turns.

    After each request of a crowd there is a pause of the time that the request took, so crowds together take at most half of
    the process, however many they are. Callers are bounded by the connections that there may be.
    """

    def __init__(self) -> None:
        """Begin with nobody waiting."""
        self._queues: dict[Hashable, deque[asyncio.Future[None]]] = {}
        self._serving = False

    async def enter(self, who: Hashable, *, crowd: bool) -> None:
        """Return when the request may be handled. `crowd` says that this one asks more than its share."""
        if not crowd:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._queues.setdefault(who, deque()).append(waiter)
        if not self._serving:
            self._serving = True
            self._serve()
        await waiter

    def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queues:
            who = next(iter(self._queues))
            queue = self._queues.pop(who)
            waiter = queue.popleft()
            if queue:
                self._queues[who] = queue  # behind all others
            if not waiter.done():  # else its connection has gone
                waiter.set_result(None)
                loop.call_soon(self._pause, loop.time())
                return
        self._serving = False

    def _pause(self, begun: float) -> None:
        """Let others have as long as this one took; it has run by now, for callbacks run in order."""
        loop = asyncio.get_running_loop()
        loop.call_later(min(max(loop.time() - begun, MIN_PAUSE_S), MAX_PAUSE_S), self._serve)
