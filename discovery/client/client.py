"""The client of discovery servers: a live view of the mesh, and our own records in it.

It has the URLs of several servers and uses one as long as that works. If none works, the last view stays, in memory and on disk,
and running processes continue with it. `follower` keeps the view current, `writer` writes our records, and `snapshot_file`
keeps the copy on disk.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from discovery.client.config import DiscoveryClientConfig
from discovery.client.contract import Discovery, DiscoveryError, IssuedCredentials, Subscribers
from discovery.client.desired_state import Put
from discovery.client.follower import News, ViewFollower
from discovery.client.refusals import Refusals
from discovery.client.servers import RequestRefused, Servers, ServerUnavailable
from discovery.client.snapshot_file import SnapshotKeeper
from discovery.client.view import View
from discovery.client.writer import RecordWriter
from discovery.model.mesh import Kind, Mesh, Spec

log = logging.getLogger(__name__)


class DiscoveryClient(Discovery):
    """Discovery by servers."""

    def __init__(
        self,
        config: DiscoveryClientConfig,
        *,
        registry: CollectorRegistry | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ValueError, OSError or ssl.SSLError for a configuration that cannot be used."""
        self._network = config.network
        self._servers = Servers.at(
            config.urls,
            token=config.token,
            ca_file=config.ca_file,
            cert_file=config.cert_file,
            key_file=config.key_file,
            insecure=config.insecure,
            on_epoch=lambda epoch: self._writer.note_epoch(epoch),
            on_fields=lambda: self._writer.note_fields(),
            wall_clock=wall_clock,
        )
        for url in config.urls:
            if url.startswith("http:") and config.insecure:
                log.warning("discovery at %s is used without TLS, by configuration", url)
        self._view = View(config.grace_s)
        self._refusals = Refusals()
        self._subscribers = Subscribers()
        self._writer = RecordWriter(self._servers, self._view, self._refusals, config)
        self._snapshot = SnapshotKeeper(config.snapshot_file, config.network, self._view, wall_clock)
        self._follower = ViewFollower(
            self._servers,
            self._view,
            self._refusals,
            self._on_news,
            registry=registry if registry is not None else CollectorRegistry(),
            backoff=config.backoff,
            wall_clock=wall_clock,
        )

    @property
    def mesh(self) -> Mesh:
        """The current view."""
        return self._view.mesh

    @property
    def synced(self) -> bool:
        """Whether a snapshot, live or from disk, has been loaded."""
        return self._view.synced

    @property
    def connected(self) -> bool:
        """Whether the view is live."""
        return self._follower.connected

    @property
    def age_s(self) -> float | None:
        """Seconds since a server last confirmed the view; None before there is one."""
        return self._follower.age_s

    @property
    def troubles(self) -> tuple[tuple[str, str], ...]:
        """Reasons why our records are not as wanted: `discovery_access` or `discovery_records`, and a sentence.

        Servers that are down are not a reason: running processes are not affected.
        """
        access = [("discovery_access", words) for words in self._refusals.words()]
        lacking = self._writer.lacking(self.connected)
        return (*access, *(("discovery_records", f"the record {'/'.join(key)}: {why}") for key, why in lacking))

    @property
    def rivals(self) -> tuple[str, ...]:
        """Our records that another process has recently overwritten."""
        return tuple("/".join(key) for key in self._writer.rivals())

    @property
    def clock_ahead_s(self) -> float | None:
        """Seconds by which the server's clock is ahead of ours; None before the first answer."""
        return self._servers.clock_ahead_s

    def expect_successor(self, expected: bool) -> None:
        """Set whether the process that replaces this one may overwrite our records. Then they do not count as taken."""
        self._writer.expect_successor(expected)

    def use_token(self, token: str | None) -> None:
        """Use this token from the next request on. Records on a lease of the previous token are written again."""
        self._servers.use_token(token)
        self._writer.retry()

    def subscribe(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Call `callback` with each new mesh. Returns a function that unsubscribes."""
        return self._subscribers.add(callback)

    def publish(
        self,
        kind: Kind,
        id: str,  # noqa: A002
        spec: Spec,
        *,
        network: str | None = None,
        leased: bool = True,
        if_absent: bool = False,
    ) -> None:
        """Keep this record published."""
        self._writer.publish(Put((kind, network or self._network, id), spec, leased, if_absent))

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        """Stop publishing a record, and delete it."""
        self._writer.withdraw((kind, network or self._network, id))

    async def settled(self, timeout_s: float) -> bool:
        """Wait until a server has acknowledged all our records. Returns False if that takes longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.settled()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Keep the view and our records up to date until cancelled."""
        if await self._snapshot.restore():
            self._follower.report(News(mesh_changed=True))
        async with self._servers.connected(), asyncio.TaskGroup() as group:
            group.create_task(self._follower.run(), name="discovery-watch")
            group.create_task(self._writer.run(), name="discovery-publish")
            group.create_task(self._snapshot.run(), name="discovery-save")

    async def close(self) -> None:
        """End the lease, which deletes our leased records, and save the mesh. Records without a lease stay."""
        await self._writer.close()
        await self._snapshot.save_if_needed()

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        """Request credentials for the TURN servers of a network. Raises DiscoveryError."""
        try:
            async with self._servers.connected():
                answer = await self._servers.anywhere("POST", "/v1/turn-credentials", {"network": network})
            return IssuedCredentials(
                username=str(answer["username"]),
                password=str(answer["password"]),
                ttl_s=int(answer["ttl_s"]),
                urls=tuple(map(str, answer["urls"])),
            )
        except RequestRefused as error:
            raise DiscoveryError(error.code, error.detail) from None
        except (ServerUnavailable, KeyError, TypeError, ValueError) as error:
            raise DiscoveryError("unavailable", str(error)) from None

    def _on_news(self, news: News) -> None:
        if news.to_save:
            self._snapshot.changed()
        if news.live_again:
            self._writer.retry()
        self._writer.deleted(news.deletions)
        if news.mesh_changed:
            self._writer.find_rivals()
            self._subscribers.notify(self._view.mesh)
