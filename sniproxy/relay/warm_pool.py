"""Warm streams: connections to gateways that are kept ready, so that a new client pays no round trips to a TURN server.

A TURN server makes the gateway come for each stream: announcement, a connection, a bind. Where clients use an allocation, a relay
has that done beforehand: `size` connections whose preamble is proven and READY is said, waiting for OPEN. Each serves one client;
the next one is made at once. They are kept for as long as clients use the allocation, renewed now and then, and asked by PING
whether they still live, which keeps the mappings of NATs, too.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from discovery.pacing.backoff import Backoff
from sniproxy.transport.base import Candidate, CandidateKey
from sniproxy.transport.errors import DialError
from sniproxy.tunnel.capsules import CapsuleError
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import TOKEN_SIZE, Ping, Pong


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmTiming:
    """How long things take, and how many there are. The defaults are for real networks; tests shorten them."""

    pong_s: float = 5.0
    """From PING to PONG: two retransmissions on the way. A PING is sent so long before the transport's idle limit."""
    max_age_s: float = 600.0
    """Renewed after this: what is not used for ten minutes need not find out first that something on the way has changed."""
    kept_for_s: float = 600.0
    """How long after its last stream an allocation is kept warm."""
    retry: Backoff = Backoff(1.0, 60.0)
    """Between attempts that fail."""
    max_warm: int = 512
    """Of one relay: a descriptor each here, at the gateway two, and a few kilobytes at the TURN server."""


class Fate(StrEnum):
    """What became of a warm stream."""

    TAKEN = "taken"
    """A client's stream took it."""
    FAILED = "failed"
    """It could not be made."""
    LOST = "lost"
    """It was cut, refused or no longer answered while it waited."""
    OVER = "over"
    """It was old, or nobody has used its allocation for long."""


class _Ready:
    """One connection that waits for a stream."""

    def __init__(self, connection: CapsuleConnection, idle_limit_s: float, timing: WarmTiming) -> None:
        self.connection = connection
        self._ping_interval_s = max(idle_limit_s - timing.pong_s, idle_limit_s / 2)
        self._timing = timing
        self.wanted: bool | None = None
        """True: a stream takes it. False: it is to go."""
        self.asked: bytes | None = None
        """The token of a PING that waits for its PONG."""
        self._scope: asyncio.Timeout | None = None
        self._left = asyncio.Event()

    def leave(self, *, wanted: bool) -> None:
        """Have `wait` return soon."""
        self.wanted = wanted
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(0)

    async def left(self) -> None:
        """Wait until nobody reads there any more."""
        await self._left.wait()

    async def wait(self) -> Fate:
        """Keep it alive until somebody wants it, it is old, or it is of no use."""
        loop = asyncio.get_running_loop()
        old = loop.time() + self._timing.max_age_s * random.uniform(0.8, 1.0)
        try:
            while True:
                due = loop.time() + (self._timing.pong_s if self.asked else self._ping_interval_s)
                try:
                    async with asyncio.timeout_at(min(due, old)) as self._scope:
                        message = await self.connection.next_message()
                    if message != Pong(self.asked or b""):
                        return Fate.LOST  # REFUSED, as when the gateway drains
                    self.asked = None
                except TimeoutError:
                    if self.wanted is not None:
                        return Fate.TAKEN if self.wanted else Fate.OVER
                    if loop.time() >= old:
                        return Fate.OVER
                    if self.asked:
                        return Fate.LOST
                    self.asked = os.urandom(TOKEN_SIZE)
                    async with asyncio.timeout(self._timing.pong_s):
                        await self.connection.send(Ping(self.asked))
                finally:
                    self._scope = None
                if self.wanted is not None:
                    return Fate.TAKEN if self.wanted else Fate.OVER
        except (OSError, EOFError, CapsuleError):  # TimeoutError is an OSError
            return Fate.LOST
        finally:
            self._left.set()


class _Shelf:
    """What is kept for one allocation."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.used_at = 0.0
        self.gone = False
        self.slots = 0
        self.ready: list[_Ready] = []

    def clear(self) -> None:
        """Let everything go that waits here."""
        while self.ready:
            self.ready.pop().leave(wanted=False)


class WarmPool:
    """The warm streams of one relay."""

    def __init__(
        self,
        dial: Callable[[Candidate], Awaitable[CapsuleConnection]],
        *,
        size: int,
        count: Callable[[Fate], None] = lambda _fate: None,
        timing: WarmTiming = WarmTiming(),
    ) -> None:
        """Keep `size` connections to each allocation that is in use.

        Args:
            dial: makes a connection up to READY; DialError if it cannot.
            count: told what became of each.
        """
        self.size = size
        self._dial = dial
        self._count = count
        self._timing = timing
        self._shelves: dict[CandidateKey, _Shelf] = {}
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = asyncio.Event()

    @property
    def ready(self) -> int:
        """How many wait for a stream."""
        return sum(len(shelf.ready) for shelf in self._shelves.values())

    async def run(self) -> None:
        """Keep them, until `close`."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._closed.wait()
                for task in self._tasks:
                    task.cancel()
        finally:
            self._group = None

    def close(self) -> None:
        """Let all of them go, and make no more."""
        self._closed.set()

    def used(self, candidate: Candidate) -> None:
        """Note that a stream goes by this allocation: keep some ready for the next ones."""
        if self._group is None or self._closed.is_set() or not self.size:
            return
        shelf = self._shelves.get(candidate.key)
        if shelf is None:
            shelf = self._shelves[candidate.key] = _Shelf(candidate)
        shelf.used_at = asyncio.get_running_loop().time()
        self._fill_up(shelf)

    def resize(self, size: int) -> None:
        """Keep so many from now on: those that are too many go, and those that lack are made where there are some."""
        self.size = size
        for shelf in self._shelves.values():
            for ready in shelf.ready[: max(0, shelf.slots - size)]:
                shelf.ready.remove(ready)
                ready.leave(wanted=False)
            if self._group is not None and not self._closed.is_set():
                self._fill_up(shelf)

    def _fill_up(self, shelf: _Shelf) -> None:
        """Begin to keep as many of a shelf as there should be."""
        assert self._group is not None, "only while running"
        slots = sum(shelf.slots for shelf in self._shelves.values())
        for _ in range(min(self.size - shelf.slots, self._timing.max_warm - slots)):
            shelf.slots += 1
            task = self._group.create_task(self._fill(shelf))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def has(self, candidate: Candidate) -> bool:
        """Whether one waits at this allocation."""
        shelf = self._shelves.get(candidate.key)
        return shelf is not None and bool(shelf.ready)

    async def take(self, candidate: Candidate) -> CapsuleConnection | None:
        """Give a connection that waits at this allocation, None if there is none. It is the caller's from then on."""
        shelf = self._shelves.get(candidate.key)
        while shelf is not None:
            ready = next((ready for ready in reversed(shelf.ready) if not ready.asked), None)  # the youngest
            if ready is None:
                break
            shelf.ready.remove(ready)
            ready.leave(wanted=True)
            try:
                await ready.left()
            except BaseException:  # the client has gone, say: nobody owns it now
                ready.connection.stream.close()
                raise
            if not ready.connection.stream.closed:
                return ready.connection
        return None

    def distrust(self, candidate: Candidate) -> None:
        """One of this allocation's turned out to be dead: the others may be, too."""
        shelf = self._shelves.get(candidate.key)
        if shelf is not None:
            shelf.clear()

    def keep(self, is_current: Callable[[Candidate], bool]) -> None:
        """Let go what waits at candidates that are not current any more."""
        for key, shelf in list(self._shelves.items()):
            if not is_current(shelf.candidate):
                del self._shelves[key]
                shelf.gone = True
                shelf.clear()

    async def _fill(self, shelf: _Shelf) -> None:
        """Keep one place of a shelf filled for as long as its allocation is in use."""
        loop = asyncio.get_running_loop()
        failures = 0
        try:
            while not shelf.gone and shelf.slots <= self.size and loop.time() < shelf.used_at + self._timing.kept_for_s:
                fate = await self._hold(shelf)
                self._count(fate)
                if fate not in (Fate.FAILED, Fate.LOST):
                    failures = 0
                    continue
                failures += 1
                await asyncio.sleep(self._timing.retry.pause_s(failures))
        finally:
            shelf.slots -= 1
            if not shelf.slots and self._shelves.get(shelf.candidate.key) is shelf:
                del self._shelves[shelf.candidate.key]

    async def _hold(self, shelf: _Shelf) -> Fate:
        """Make one connection and keep it ready."""
        try:
            connection = await self._dial(shelf.candidate)
        except DialError:
            return Fate.FAILED
        ready = _Ready(connection, shelf.candidate.traits.idle_limit_s, self._timing)
        fate = Fate.OVER
        try:
            if not shelf.gone:
                shelf.ready.append(ready)
                fate = await ready.wait()
            return fate
        finally:
            with suppress(ValueError):
                shelf.ready.remove(ready)
            if fate is not Fate.TAKEN:
                connection.stream.close()
