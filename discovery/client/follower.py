"""Follows the mesh by watches: one at a time, at the next server when it ends."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge
from yarl import URL

from discovery.client.refusals import Refusals
from discovery.client.servers import RequestRefused, ServerRetries, Servers, ServerUnavailable
from discovery.client.view import BadWatch, View
from discovery.model.mesh import Deletion
from discovery.model.spec import NEGOTIATED
from discovery.pacing.backoff import Backoff

log = logging.getLogger(__name__)

THE_WATCH = "the watch"


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What has just changed."""

    live_again: bool = False
    """The view is complete and live again, after it was not."""

    deletions: Sequence[Deletion] = ()
    mesh_changed: bool = False
    """There is a new mesh, or the first one."""

    to_save: bool = False
    """A copy of the view on disk is out of date."""


class _Metrics:
    """Metrics of the view."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.connected = Gauge("crossnet_discovery_connected", "Whether the watch is live.", registry=registry)
        self.records = Gauge("crossnet_discovery_records", "Records in the mesh.", registry=registry)
        self.staleness = Gauge(
            "crossnet_discovery_staleness_seconds",
            "Time since a server last confirmed the view; -1 before there is one.",
            registry=registry,
        )
        self.connects = Counter("crossnet_discovery_connects", "Watches that were begun.", registry=registry)


class ViewFollower:
    """Keeps a view current while `run` runs, and reports each change."""

    def __init__(
        self,
        servers: Servers,
        view: View,
        refusals: Refusals,
        on_news: Callable[[News], None],
        *,
        registry: CollectorRegistry,
        backoff: Backoff,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._servers = servers
        self._view = view
        self._refusals = refusals
        self._on_news = on_news
        self._backoff = backoff
        self._wall_clock = wall_clock
        self._metrics = _Metrics(registry)
        self._metrics.staleness.set_function(lambda: -1.0 if self.age_s is None else self.age_s)
        self._connected = False
        self._grace_timer: asyncio.TimerHandle | None = None

    @property
    def connected(self) -> bool:
        """Whether a server has sent all records and keeps sending changes."""
        return self._connected

    @property
    def age_s(self) -> float | None:
        """Seconds since a server last confirmed the view; None before there is one."""
        if not self._view.synced:
            return None
        return self._view.stale_s if self._connected else max(0.0, self._wall_clock() - self._view.known_at)

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            await self._follow()
        finally:
            self._set_connected(False)
            if self._grace_timer is not None:
                self._grace_timer.cancel()

    def report(self, news: News) -> None:
        """Update the metric and pass the news on."""
        self._metrics.records.set(len(self._view.mesh))
        self._on_news(news)

    async def _follow(self) -> None:
        retries = ServerRetries(self._servers, self._backoff)
        loop = asyncio.get_running_loop()
        said: str | None = None
        while True:
            url = self._servers.current
            begun = loop.time()
            try:
                await self._watch(url)
                why = "the server ended the watch"
            except (ServerUnavailable, RequestRefused, BadWatch) as error:
                why = str(error)
                if isinstance(error, RequestRefused):
                    self._refusals.note(THE_WATCH, url, error)
            self._view.ended(loop.time())
            if self._connected and loop.time() - begun > self._backoff.longest_s:
                retries.succeeded()
            if self._connected or why != said:
                # Logged once for each state and each new reason, not for each attempt.
                log.warning("discovery is away", extra={"event": {"url": str(url), "why": why}})
                said = why
            self._set_connected(False)
            self._servers.failed(url)
            await retries.wait()

    async def _watch(self, url: URL) -> None:
        while not await self._watch_from(url):
            self._view.want_all()

    async def _watch_from(self, url: URL) -> bool:
        """Watch until the server ends it. Returns False if the view cannot be continued, since its records lack fields."""
        view = self._view
        query = {"fields": ",".join(sorted(NEGOTIATED))}
        resumes = view.revision is not None and view.epoch is not None
        if resumes:
            query |= {"from": str(view.revision), "epoch": str(view.epoch)}
        self._metrics.connects.inc()
        skipped = view.skipped
        async with aclosing(self._servers.lines(url, "/v1/watch", query)) as pieces:
            async for piece in pieces:
                if view.fields != (fields := self._servers.fields(url)):
                    if resumes:
                        return False
                    view.fields = fields
                self._feed(piece, url)
                if view.skipped > skipped:
                    skipped = view.skipped
                    log.warning("discovery has %d changes that this version cannot read", skipped)
        return True

    def _feed(self, data: bytes, url: URL) -> None:
        view = self._view
        mesh, revision, synced = view.mesh, view.revision, view.synced
        deletions = view.feed(data, asyncio.get_running_loop().time())
        view.known_at = self._wall_clock()
        live_again = view.live and not self._connected
        if live_again:
            log.info("discovery is there", extra={"event": {"url": str(url), "revision": view.revision}})
            self._set_connected(True)
            self._refusals.clear(THE_WATCH)
        mesh_changed = view.mesh is not mesh or view.synced != synced
        if live_again or deletions or mesh_changed or view.revision != revision:
            self.report(
                News(
                    live_again=live_again,
                    deletions=deletions,
                    mesh_changed=mesh_changed,
                    to_save=view.revision != revision,
                )
            )
        if mesh_changed:
            self._arm_grace()

    def _set_connected(self, connected: bool) -> None:
        lost = self._connected and not connected
        self._connected = connected
        self._metrics.connected.set(connected)
        if lost:
            self.report(News(to_save=True))  # so that the age of the copy counts from now

    def _arm_grace(self) -> None:
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        deadline = self._view.next_expiry()
        if deadline is not None:
            self._grace_timer = asyncio.get_running_loop().call_at(deadline, self._end_grace)

    def _end_grace(self) -> None:
        before = self._view.mesh
        self._view.expire(asyncio.get_running_loop().time())
        if self._view.mesh is not before:
            self.report(News(mesh_changed=True, to_save=True))
        self._arm_grace()
