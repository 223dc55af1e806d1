"""GET /v1/watch: all records, or the changes since a revision, followed by each change as it is made."""

import asyncio
import logging
import time
from collections.abc import Iterator

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.api.messages import ApiError, marks, parse_fields, parse_revision
from discovery.api.timing import WatchTiming
from discovery.api.tokens import Principal
from discovery.api.watchers import NoRoom, Watcher, WatchHub, mark, mark_stale
from discovery.http.fairness import Gate
from discovery.store import Store

log = logging.getLogger(__name__)

BATCHES_AT_ONCE = 16
"""Batches of a backlog, one megabyte in total, before other clients get a turn."""


class WatchRoute:
    """The route GET /v1/watch."""

    def __init__(
        self, store: Store, hub: WatchHub, gate: Gate, registry: CollectorRegistry, timing: WatchTiming
    ) -> None:
        self._store = store
        self._timing = timing
        self._gate = gate
        self._hub = hub
        self._open = Gauge("crossnet_discovery_watchers", "Watches that are open.", registry=registry)
        displaced = Counter(
            "crossnet_discovery_watchers_displaced",
            "Watches that ended for those of a network or token that had fewer.",
            registry=registry,
        )
        hub.on_displaced = displaced.inc
        self._refused = Counter(
            "crossnet_discovery_watchers_refused", "Watches for which there was no room.", registry=registry
        )

    async def watch(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Stream records and changes until the client, the server or a timeout ends it. Raises ApiError."""
        revision = parse_revision(request.query.get("from"))
        fields = parse_fields(request.query.get("fields"))
        response = web.StreamResponse(headers={**marks(self._store), hdrs.CACHE_CONTROL: "no-store"})
        response.content_type = "application/x-ndjson"
        gives_up_at = time.monotonic() + self._timing.stale_watch_s if self._store.stale_s else 0.0
        try:
            watcher = self._hub.add(principal, fields)
        except NoRoom as error:
            self._refused.inc()
            raise ApiError(429, "too_many", str(error)) from None
        self._open.set(len(self._hub))
        try:
            # Changes are queued from here on; those that the backlog already has are skipped by their revision.
            # After a restart all watchers connect at once: they take turns.
            await self._gate.enter(("watch", principal.network), crowd=True)
            current, backlog = await self._hub.backlog(principal, revision, request.query.get("epoch"), fields)
            async with asyncio.timeout(self._timing.write_timeout_s) as deadline:
                await response.prepare(request)
                stream = _Stream(response, deadline, self._timing.write_timeout_s)
                await self._send_backlog(stream, backlog, principal)
                if gives_up_at:
                    await stream.write(mark_stale(self._store.revision, self._store.stale_s))
                await self._send_changes(stream, watcher, current, gives_up_at)
        except TimeoutError:
            log.info("a watcher that read nothing was cut off", extra={"event": {"token": principal.name}})
            if request.transport is not None:
                request.transport.abort()
        except ConnectionResetError:
            pass  # the reader has disconnected, which is normal
        finally:
            self._hub.remove(watcher)
            self._open.set(len(self._hub))
        return response

    async def _send_backlog(self, stream: "_Stream", backlog: Iterator[bytes], principal: Principal) -> None:
        """Encode and write a backlog in batches, so that other clients get a turn in between."""
        for number, batch in enumerate(backlog, 1):
            await stream.write(batch)
            if number % BATCHES_AT_ONCE == 0:
                stream.pause_deadline()
                await self._gate.enter(("watch", principal.network), crowd=True)
            else:
                await asyncio.sleep(0)

    async def _send_changes(self, stream: "_Stream", watcher: Watcher, current: int, gives_up_at: float) -> None:
        """Write changes as they are made, with heartbeats in between, until the watch ends."""
        while not watcher.overrun:
            data = watcher.next_batch(current)
            if data:
                await stream.write(data)
            elif watcher.closed:
                return
            elif not await self._changed(stream, watcher):
                stale_s = self._store.stale_s
                if stale_s and time.monotonic() > gives_up_at:
                    return  # the client tries another server, which may not be cut off
                await stream.write(mark_stale(self._store.revision, stale_s) if stale_s else b"\n")
        await stream.write(mark("reset", self._store.revision, self._store.epoch))
        log.info("a slow watcher was cut off", extra={"event": {"token": watcher.principal.name}})

    async def _changed(self, stream: "_Stream", watcher: Watcher) -> bool:
        """Wait for the next change. Returns False if a heartbeat is due first."""
        stream.pause_deadline()
        try:
            async with asyncio.timeout(self._timing.heartbeat_s):
                await watcher.wait()
        except TimeoutError:
            return False
        return True


class _Stream:
    """The body of one watch, with a deadline for each write."""

    __slots__ = ("_deadline", "_response", "_write_timeout_s")

    def __init__(self, response: web.StreamResponse, deadline: asyncio.Timeout, write_timeout_s: float) -> None:
        self._response = response
        self._deadline = deadline
        self._write_timeout_s = write_timeout_s

    async def write(self, data: bytes) -> None:
        """Write data. The enclosing asyncio.timeout raises TimeoutError if the reader does not read it in time."""
        self._deadline.reschedule(asyncio.get_running_loop().time() + self._write_timeout_s)
        await self._response.write(data)

    def pause_deadline(self) -> None:
        """Suspend the deadline while the server itself waits."""
        self._deadline.reschedule(None)
