"""A watch: what is, or what has changed since a revision, and then every change as it comes."""

import asyncio
import logging
import time

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.api.messages import ApiError, marks, parse_revision
from discovery.api.tokens import Principal
from discovery.api.watchers import NoRoom, WatchHub, mark, mark_stale
from discovery.http.fairness import Gate
from discovery.store import Store

log = logging.getLogger(__name__)

STALE_WATCH_S = 30.0  # at a server that is cut off: then the client is sent to look for a better one
HEARTBEAT_S = 10.0
BATCHES_AT_ONCE = 16
"""Of a backlog, before other crowds have their turn: a megabyte."""

WRITE_TIMEOUT_S = 30.0  # a watcher that takes nothing for so long has gone


class WatchRoute:
    """Answers watches."""

    def __init__(self, store: Store, hub: WatchHub, gate: Gate, registry: CollectorRegistry) -> None:
        self._store = store
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
        revision = parse_revision(request.query.get("from"))
        response = web.StreamResponse(headers={**marks(self._store), hdrs.CACHE_CONTROL: "no-store"})
        ends_at = time.monotonic() + STALE_WATCH_S if self._store.stale_s else 0.0
        response.content_type = "application/x-ndjson"
        try:
            watcher = self._hub.add(principal)
        except NoRoom as error:
            self._refused.inc()
            raise ApiError(429, "too_many", str(error)) from None
        self._open.set(len(self._hub))
        try:
            # Changes are queued from here on; those that the backlog has already are skipped by their revision.
            asks = ("watch", principal.network)
            await self._gate.enter(asks, crowd=True)  # after a server's end all watchers come at once
            current, backlog = await self._hub.backlog(principal, revision, request.query.get("epoch"))
            async with asyncio.timeout(WRITE_TIMEOUT_S) as deadline:

                async def write(data: bytes) -> None:
                    deadline.reschedule(asyncio.get_running_loop().time() + WRITE_TIMEOUT_S)
                    await response.write(data)

                await response.prepare(request)
                for number, batch in enumerate(backlog, 1):
                    await write(batch)
                    # A large backlog is encoded and written piece by piece; in between others get their turn.
                    if number % BATCHES_AT_ONCE == 0:
                        deadline.reschedule(None)
                        await self._gate.enter(asks, crowd=True)
                    else:
                        await asyncio.sleep(0)
                if ends_at:
                    await write(mark_stale(self._store.revision, self._store.stale_s))
                while not watcher.overrun:
                    data = watcher.take(current)
                    if data:
                        await write(data)
                        continue
                    if watcher.closed:
                        return response
                    deadline.reschedule(None)
                    try:
                        async with asyncio.timeout(HEARTBEAT_S):
                            await watcher.wait()
                    except TimeoutError:
                        stale_s = self._store.stale_s
                        if stale_s and time.monotonic() > ends_at:
                            return response  # there may be a server that is not cut off
                        await write(mark_stale(self._store.revision, stale_s) if stale_s else b"\n")
                await write(mark("reset", self._store.revision, self._store.epoch))
                log.info("a slow watcher was cut off", extra={"event": {"token": principal.name}})
        except TimeoutError:
            log.info("a watcher that took nothing was cut off", extra={"event": {"token": principal.name}})
            if request.transport is not None:
                request.transport.abort()
        except ConnectionResetError:
            pass  # the reader has gone, as readers do
        finally:
            self._hub.remove(watcher)
            self._open.set(len(self._hub))
        return response
