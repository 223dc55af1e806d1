"""Warm connections: opened to gateways in advance, so that a new client does not wait for round trips to a TURN server.

Through a TURN server, each stream needs an announcement, a connection from the gateway, and a bind. For an allocation that
clients use, a relay does this in advance: it keeps `size` connections whose preamble is verified and which got READY, waiting for
OPEN. Each serves one client, and is replaced at once. They are kept for as long as clients use the allocation, renewed now and
then, and checked by PING, which also keeps NAT mappings alive.
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
    """Times and limits of a pool. The defaults are for real networks; tests shorten them."""

    pong_s: float = 5.0
    """From PING to PONG; allows for two retransmissions. A PING is sent this long before the transport's idle limit."""
    max_age_s: float = 600.0
    """A connection is renewed after this time, so that no client finds out that something on the path has changed."""
    kept_for_s: float = 600.0
    """How long an allocation is kept warm after its last stream."""
    retry: Backoff = Backoff(1.0, 60.0)
    """Pauses after attempts that fail."""
    max_warm: int = 512
    """The limit for one relay. Each costs a descriptor here, two at the gateway, and a few kilobytes at the TURN server."""


class Fate(StrEnum):
    """What became of a warm connection."""

    TAKEN = "taken"
    """A client's stream uses it."""
    FAILED = "failed"
    """It could not be opened."""
    LOST = "lost"
    """While it waited, it was cut or refused, or it stopped answering."""
    OVER = "over"
    """It was too old, or its allocation was not used for too long."""


class _Ready:
    """One connection that waits for a stream."""

    def __init__(self, connection: CapsuleConnection, idle_limit_s: float, timing: WarmTiming) -> None:
        self.connection = connection
        self._ping_interval_s = max(idle_limit_s - timing.pong_s, idle_limit_s / 2)
        self._timing = timing
        self.wanted: bool | None = None
        """True: a stream takes it. False: it has to be closed."""
        self.asked: bytes | None = None
        """The token of a PING that has no PONG yet."""
        self._scope: asyncio.Timeout | None = None
        self._left = asyncio.Event()

    def leave(self, *, wanted: bool) -> None:
        """Make `wait` return soon."""
        self.wanted = wanted
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(0)

    async def left(self) -> None:
        """Wait until `wait` has returned, so that nothing reads from the connection any more."""
        await self._left.wait()

    async def wait(self) -> Fate:
        """Keep it alive until a stream takes it, it is too old, or it is lost."""
        loop = asyncio.get_running_loop()
        old = loop.time() + self._timing.max_age_s * random.uniform(0.8, 1.0)
        try:
            while True:
                due = loop.time() + (self._timing.pong_s if self.asked else self._ping_interval_s)
                try:
                    async with asyncio.timeout_at(min(due, old)) as self._scope:
                        message = await self.connection.next_message()
                    if message != Pong(self.asked or b""):
                        return Fate.LOST  # for example REFUSED, because the gateway drains
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
    """The warm connections of one allocation."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.used_at = 0.0
        self.gone = False
        self.slots = 0
        self.ready: list[_Ready] = []

    def clear(self) -> None:
        """Close all connections that wait here."""
        while self.ready:
            self.ready.pop().leave(wanted=False)


class WarmPool:
    """The warm connections of one relay."""

    def __init__(
        self,
        dial: Callable[[Candidate], Awaitable[CapsuleConnection]],
        *,
        size: int,
        count: Callable[[Fate], None] = lambda _fate: None,
        timing: WarmTiming = WarmTiming(),
    ) -> None:
        """Prepare a pool; `run` keeps the connections.

        Args:
            dial: opens a connection up to READY. Raises DialError if it cannot.
            size: connections to keep for each allocation in use.
            count: called with the fate of each connection.
            timing: times and limits.
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
        """How many connections wait for a stream."""
        return sum(len(shelf.ready) for shelf in self._shelves.values())

    async def run(self) -> None:
        """Keep connections warm, until `close`."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._closed.wait()
                for task in self._tasks:
                    task.cancel()
        finally:
            self._group = None

    def close(self) -> None:
        """Close all of them, and open no more."""
        self._closed.set()

    def used(self, candidate: Candidate) -> None:
        """Note that a stream uses this allocation, and keep connections for the next ones."""
        if self._group is None or self._closed.is_set() or not self.size:
            return
        shelf = self._shelves.get(candidate.key)
        if shelf is None:
            shelf = self._shelves[candidate.key] = _Shelf(candidate)
        shelf.used_at = asyncio.get_running_loop().time()
        self._fill_up(shelf)

    def resize(self, size: int) -> None:
        """Keep `size` connections for each allocation in use from now on; close surplus ones and open missing ones."""
        self.size = size
        for shelf in self._shelves.values():
            for ready in shelf.ready[: max(0, shelf.slots - size)]:
                shelf.ready.remove(ready)
                ready.leave(wanted=False)
            if self._group is not None and not self._closed.is_set():
                self._fill_up(shelf)

    def _fill_up(self, shelf: _Shelf) -> None:
        """Start the missing slots of a shelf."""
        assert self._group is not None, "only while running"
        slots = sum(shelf.slots for shelf in self._shelves.values())
        for _ in range(min(self.size - shelf.slots, self._timing.max_warm - slots)):
            shelf.slots += 1
            task = self._group.create_task(self._fill(shelf))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def has(self, candidate: Candidate) -> bool:
        """Return whether a connection to this allocation is ready."""
        shelf = self._shelves.get(candidate.key)
        return shelf is not None and bool(shelf.ready)

    async def take(self, candidate: Candidate) -> CapsuleConnection | None:
        """Return a warm connection to this allocation, None if there is none. The caller owns it."""
        shelf = self._shelves.get(candidate.key)
        while shelf is not None:
            ready = next((ready for ready in reversed(shelf.ready) if not ready.asked), None)  # the youngest
            if ready is None:
                break
            shelf.ready.remove(ready)
            ready.leave(wanted=True)
            try:
                await ready.left()
            except BaseException:  # for example because the client is gone: nothing owns the connection now
                ready.connection.stream.reset()
                raise
            if not ready.connection.stream.closed:
                return ready.connection
        return None

    def distrust(self, candidate: Candidate) -> None:
        """Close all connections to this allocation: one turned out to be dead, so the others may be dead too."""
        shelf = self._shelves.get(candidate.key)
        if shelf is not None:
            shelf.clear()

    def keep(self, is_current: Callable[[Candidate], bool]) -> None:
        """Close the connections of candidates that are no longer current."""
        for key, shelf in list(self._shelves.items()):
            if not is_current(shelf.candidate):
                del self._shelves[key]
                shelf.gone = True
                shelf.clear()

    async def _fill(self, shelf: _Shelf) -> None:
        """Keep one slot of a shelf filled for as long as its allocation is in use."""
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
        """Open one connection and keep it warm."""
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
                connection.stream.reset()  # carries no stream: a close would keep the local port for a minute (TIME_WAIT)
