"""Fair scheduling on one event loop: how much a connection may do before the others run.

A task that reads input which arrives faster than it works never has to wait, so it would never let anything else run: no timer, no
accept, no signal, no other stream. So each connection has a quantum, counted in bytes and in messages. Once it is used up, the
connection queues, and **one** connection of that queue resumes in each pass of the event loop (deficit round robin). However many
connections flood us, all others wait for one quantum in each pass, and not for the quanta of all.

`SocketStream` and the readers built on it spend the quantum, so every loop that reads from a stream is bounded.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

QUANTUM_BYTES = 4 * 1024 * 1024
"""Four full pipes, about a millisecond. A copied stream reaches the limit of reads first."""

QUANTUM_MESSAGES = 8
"""Messages, or reads that did not have to wait. The most expensive message, a signed STUN request, costs some 100 µs."""


class RoundRobin:
    """The connections of one event loop whose quantum is used up, in order of arrival."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def turn(self) -> asyncio.Future[None]:
        """Queue for a turn, which comes after at least one pass of the event loop (polling and timers)."""
        turn = self._loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._next)
        return turn

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # done: it was cancelled while it waited
                turn.set_result(None)
                break
        if self._waiting:
            self._loop.call_soon(self._next)


_QUEUES: WeakKeyDictionary[asyncio.AbstractEventLoop, RoundRobin] = WeakKeyDictionary()


def round_robin() -> RoundRobin:
    """Return the queue of the running loop."""
    loop = asyncio.get_running_loop()
    queue = _QUEUES.get(loop)
    if queue is None:
        queue = _QUEUES[loop] = RoundRobin(loop)
    return queue


class Quantum:
    """What one connection may still do in its turn. `max_bytes` bounds the bytes of a turn."""

    __slots__ = ("_bytes", "_max_bytes", "_messages", "_queue", "used_up")

    def __init__(self, *, max_bytes: int = QUANTUM_BYTES) -> None:
        self._queue = round_robin()
        self._max_bytes = max_bytes
        self._bytes = 0
        self._messages = 0.0
        self.used_up = False
        """Whether other connections have to run first: `await renew()` before doing more."""

    def spend(self, size: int, messages: float = 1) -> None:
        """Count `size` bytes and `messages` messages; a fraction for what costs a fraction of a message."""
        self._bytes += size
        self._messages += messages
        if self._messages >= QUANTUM_MESSAGES or self._bytes >= self._max_bytes:
            self.used_up = True

    def waited(self) -> None:
        """Note that the connection had to wait for input: others ran meanwhile, so the next message is free."""
        if self._messages >= 1:
            self._messages -= 1

    async def renew(self) -> None:
        """Let other connections run, then begin a new quantum."""
        await self._queue.turn()
        self._begin()

    def renew_then(self, go_on: Callable[[], None]) -> None:
        """As `renew`, for callback-driven protocols: calls `go_on` when the turn comes, with a new quantum."""

        def begin(_: asyncio.Future[None]) -> None:
            self._begin()
            go_on()

        self._queue.turn().add_done_callback(begin)

    def _begin(self) -> None:
        self._bytes = 0
        self._messages = 0.0
        self.used_up = False
