"""Fair scheduling of requests: light clients are served at once; heavy ones take turns and get at most half of the time."""

import asyncio
from collections import deque
from collections.abc import Hashable

MIN_PAUSE_S = 0.001
MAX_PAUSE_S = 0.1


class Gate:
    """Admits requests. Those of heavy clients (`crowd`) wait in one queue for each client; the queues take turns.

    After each such request there is a pause as long as the request took, so that heavy clients together get at most half of
    the process's time. The limit of connections bounds the queues.
    """

    def __init__(self) -> None:
        self._queues: dict[Hashable, deque[asyncio.Future[None]]] = {}
        self._serving = False

    async def enter(self, who: Hashable, *, crowd: bool) -> None:
        """Wait until the request may be handled. `crowd`: this client sends more than its share."""
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
            if not waiter.done():  # otherwise its connection was closed
                waiter.set_result(None)
                loop.call_soon(self._pause, loop.time())
                return
        self._serving = False

    def _pause(self, begun: float) -> None:
        """Leave as much time to others as this request took. It has finished by now: callbacks run in order."""
        loop = asyncio.get_running_loop()
        loop.call_later(min(max(loop.time() - begun, MIN_PAUSE_S), MAX_PAUSE_S), self._serve)
