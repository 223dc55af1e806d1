"""The client of discovery servers: a live view of the mesh, and our own records kept true in it.

It takes several URLs and uses one as long as that works. When none does, the last view stays, in memory and on disk, and
everything that is up goes on with it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge
from yarl import URL

from discovery.client import snapshot_file
from discovery.client.contract import Discovery, DiscoveryError, IssuedCredentials, Subscribers
from discovery.client.desired_state import NOT_YET, Delete, DesiredState, Put
from discovery.client.servers import BACKOFF, Refused, ServerRetries, Servers, ServerUnavailable, parse_server_url
from discovery.client.view import GRACE_S, BadWatch, View
from discovery.model.mesh import Key, Kind, Mesh, Spec

__all__ = ["Discovery", "DiscoveryClient", "DiscoveryError", "IssuedCredentials", "parse_server_url"]

log = logging.getLogger(__name__)

LEASE_TTL_S = 10  # design; renewed at a third, so two renewals may be lost
SAVE_EVERY_S = 5.0
CLOSE_TIMEOUT_S = 2.0
LATE_S = 5.0  # for which a record of ours may be on its way before we say that it lacks
RIVAL_LOG_S = 60.0


class _Metrics:
    """What a client counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.connected = Gauge("crossnet_discovery_connected", "Whether the watch is live.", registry=registry)
        self.records = Gauge("crossnet_discovery_records", "Records in the mesh.", registry=registry)
        self.staleness = Gauge(
            "crossnet_discovery_staleness_seconds",
            "Time since a server last confirmed the view; -1 before there is one.",
            registry=registry,
        )
        self.connects = Counter("crossnet_discovery_connects", "Watches that were begun.", registry=registry)


class DiscoveryClient(Discovery):
    """Discovery by way of servers."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        network: str,
        token: str | None = None,
        ca_file: Path | None = None,
        cert_file: Path | None = None,
        key_file: Path | None = None,
        insecure: bool = False,
        snapshot_file: Path | None = None,
        registry: CollectorRegistry | None = None,
        grace_s: float = GRACE_S,
        lease_ttl_s: int = LEASE_TTL_S,
    ) -> None:
        """Take URLs, in order of preference, and the network that we are in. Raises ValueError, OSError, ssl.SSLError."""
        self._servers = Servers.at(
            urls,
            token=token,
            ca_file=ca_file,
            cert_file=cert_file,
            key_file=key_file,
            insecure=insecure,
            on_epoch=self._note_epoch,
        )
        for url in urls:
            if url.startswith("http:") and insecure:
                log.warning("discovery at %s is used without TLS, by configuration", url)
        self._network = network
        self._snapshot_file = snapshot_file
        self._metrics = _Metrics(registry if registry is not None else CollectorRegistry())
        self._metrics.staleness.set_function(lambda: -1.0 if self.age_s is None else self.age_s)
        self._lease_ttl_s = lease_ttl_s
        self._view = View(grace_s)
        self._subscribers = Subscribers()
        self._known_at = 0.0  # Unix time at which the view was last known to be true
        self._connected = False
        self._desired = DesiredState()
        self._lease: str | None = None
        self._renew_at = 0.0
        self._publish_epoch: str | None = None
        self._work = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._unsaved = asyncio.Event()
        self._grace_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._refusals: dict[str, str] = {}  # by what was asked: the server's words
        self._lacking_since: float | None = None
        self._written_once = False
        self._successor_expected = False
        self._rival_logged_at: dict[Key, float] = {}

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
        return self._connected

    @property
    def age_s(self) -> float | None:
        """For how many seconds the view has not been confirmed by a server; None before there is one."""
        if not self._view.synced:
            return None
        return self._view.stale_s if self._connected else max(0.0, time.time() - self._known_at)

    @property
    def troubles(self) -> tuple[tuple[str, str], ...]:
        """What keeps our records from standing as we wrote them: `discovery_access` or `discovery_records`, and the words for it.

        Servers that are away are no trouble: what is up goes on.
        """
        found = [("discovery_access", words) for words in dict.fromkeys(self._refusals.values())]
        for key, why in self._desired.lacking():
            # New records are written within moments; only what does not get there is told.
            if why != NOT_YET or (self._connected and not self._refusals and self._late()):
                found.append(("discovery_records", f"the record {'/'.join(key)}: {why}"))
        return tuple(found)

    @property
    def rivals(self) -> tuple[str, ...]:
        """Records of ours that another process has written too, lately."""
        return tuple("/".join(key) for key in self._desired.rivals(asyncio.get_running_loop().time()))

    @property
    def clock_ahead_s(self) -> float | None:
        """By how much the server's clock is ahead of ours; None before it has said."""
        return self._servers.clock_ahead_s

    def expect_successor(self, expected: bool) -> None:
        """Have what is written in place of our records be as it should: by the process that takes our place."""
        self._successor_expected = expected
        if not expected:
            self._look_for_rivals(self._desired.keys())

    def _late(self) -> bool:
        since = self._lacking_since
        return not self._written_once or (since is not None and time.monotonic() - since > LATE_S)

    def use_token(self, token: str | None) -> None:
        """Show this token from the next request on. What hangs on a lease of the one before is written anew."""
        self._servers.use_token(token)
        self._desired.retry()
        self._work.set()

    def subscribe(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Have `callback` called with each new mesh."""
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
        """Want this record to be there."""
        if self._desired.publish(Put((kind, network or self._network, id), spec, leased, if_absent)):
            self._wanted_changed()

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        """No longer want a record."""
        if self._desired.withdraw((kind, network or self._network, id)):
            self._wanted_changed()

    async def settled(self, timeout_s: float) -> bool:
        """Wait until the server has acknowledged all desired state."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Keep the view and the desired state true until cancelled."""
        if self._snapshot_file is not None:
            copy = await asyncio.to_thread(snapshot_file.load, self._snapshot_file, self._network)
            if copy is not None and not self._view.synced:
                self._view.restore(copy.mesh(), copy.epoch, copy.revision)
                self._known_at = copy.saved_at
                event = {"records": len(copy.records), "age_s": round(time.time() - copy.saved_at)}
                log.info("the mesh is begun with as it was saved", extra={"event": event})
                self._tell()
        try:
            async with self._servers.connected(), asyncio.TaskGroup() as group:
                group.create_task(self._keep_watching(), name="discovery-watch")
                group.create_task(self._keep_publishing(), name="discovery-publish")
                if self._snapshot_file is not None:
                    group.create_task(self._keep_saving(self._snapshot_file), name="discovery-save")
        finally:
            self._set_connected(False)
            if self._grace_timer is not None:
                self._grace_timer.cancel()

    async def close(self) -> None:
        """End the lease, which withdraws all that hangs on it, and save the mesh. Records without a lease stay."""
        self._closed = True
        lease, self._lease = self._lease, None
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if lease is not None:
                    async with self._servers.connected():
                        await self._servers.anywhere("DELETE", f"/v1/leases/{lease}")
        except (TimeoutError, ServerUnavailable, Refused) as error:
            log.info("the lease could not be ended, it will run out: %s", error or "no answer in time")
        if self._snapshot_file is not None and self._unsaved.is_set():
            await self._save(self._snapshot_file)

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        """Have the server issue credentials for that network's TURN servers."""
        try:
            async with self._servers.connected():
                answer = await self._servers.anywhere("POST", "/v1/turn-credentials", {"network": network})
            return IssuedCredentials(
                username=str(answer["username"]),
                password=str(answer["password"]),
                ttl_s=int(answer["ttl_s"]),
                urls=tuple(map(str, answer["urls"])),
            )
        except Refused as error:
            raise DiscoveryError(error.code, error.detail) from None
        except (ServerUnavailable, KeyError, TypeError, ValueError) as error:
            raise DiscoveryError("unavailable", str(error)) from None

    # Watching.

    async def _keep_watching(self) -> None:
        retries = ServerRetries(self._servers)
        loop = asyncio.get_running_loop()
        said: str | None = None
        while True:
            url = self._servers.current
            begun = loop.time()
            try:
                await self._watch(url)
                why = "the server ended the watch"
            except (ServerUnavailable, Refused, BadWatch) as error:
                why = str(error)
                if isinstance(error, Refused):
                    self._refused("the watch", url, error)
            self._view.ended(loop.time())
            if self._connected and loop.time() - begun > BACKOFF.longest_s:
                retries.succeeded()
            if self._connected or why != said:
                # Once for each state and each new reason, not once for each attempt.
                log.warning("discovery is away", extra={"event": {"url": str(url), "why": why}})
                said = why
            self._set_connected(False)
            self._servers.failed(url)
            await retries.wait()

    async def _watch(self, url: URL) -> None:
        query = {}
        if self._view.revision is not None and self._view.epoch is not None:
            query = {"from": str(self._view.revision), "epoch": self._view.epoch}
        self._metrics.connects.inc()
        skipped = self._view.skipped
        async with aclosing(self._servers.lines(url, "/v1/watch", query)) as pieces:
            async for piece in pieces:
                self._feed(piece, url)
                if self._view.skipped > skipped:
                    skipped = self._view.skipped
                    log.warning("discovery has %d changes that this version cannot read", skipped)

    def _feed(self, data: bytes, url: URL) -> None:
        view = self._view
        mesh, revision, synced = view.mesh, view.revision, view.synced
        deletions = view.feed(data, asyncio.get_running_loop().time())
        self._known_at = time.time()
        if view.live and not self._connected:
            log.info("discovery is there", extra={"event": {"url": str(url), "revision": view.revision}})
            self._set_connected(True)
            self._refusals.pop("the watch", None)
            self._desired.retry()
            self._work.set()
        if view.revision != revision:
            self._unsaved.set()
        if [deletion for deletion in deletions if self._desired.deleted(deletion)]:
            log.warning("a record of ours was deleted: written again")
            self._wanted_changed()
        if view.mesh is not mesh or view.synced != synced:
            self._look_for_rivals(self._desired.keys())
            self._tell()
            self._arm_grace()

    def _look_for_rivals(self, keys: Iterable[Key]) -> None:
        """Find records of ours that another process has written: most likely it has our id."""
        if self._successor_expected or self._closed:
            return
        now = asyncio.get_running_loop().time()
        for key in keys:
            record = self._view.mesh.record(*key)
            if record is None or not self._desired.seen(record, self._lease, now):
                continue
            self._wanted_changed()
            if now - self._rival_logged_at.get(key, -RIVAL_LOG_S) >= RIVAL_LOG_S:
                self._rival_logged_at[key] = now
                kind, network, record_id = key
                why = "another process writes this record of ours: give each process an id of its own"
                event = {"kind": kind, "network": network, "id": record_id, "lease": record.lease, "why": why}
                log.error("id_in_use", extra={"event": event})

    def _refused(self, what: str, url: URL, error: Refused) -> None:
        """Keep a refusal that lasts until somebody mends it, in the server's words, and say it once."""
        if error.code == "rate_limited":
            return
        words = f"discovery at {url} refuses {what}: {error}"
        if self._refusals.get(what) != words:
            event = {"url": str(url), "asked": what, "status": error.status, "why": str(error)}
            log.error("discovery_refused", extra={"event": event})
        self._refusals[what] = words

    def _set_connected(self, connected: bool) -> None:
        if self._connected and not connected:
            self._unsaved.set()  # so that the file's age counts from now
        self._connected = connected
        self._metrics.connected.set(connected)

    def _tell(self) -> None:
        self._metrics.records.set(len(self._view.mesh))
        self._subscribers.tell(self._view.mesh)

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
            self._unsaved.set()
            self._tell()
        self._arm_grace()

    # Publishing.

    def _wanted_changed(self) -> None:
        self._work.set()
        self._update_settled()

    def _update_settled(self) -> None:
        if self._desired.settled:
            self._settled.set()
        else:
            self._settled.clear()
        if not self._desired.lacking():
            self._lacking_since, self._written_once = None, True
        elif self._lacking_since is None:
            self._lacking_since = time.monotonic()

    async def _keep_publishing(self) -> None:
        retries = ServerRetries(self._servers)
        loop = asyncio.get_running_loop()
        while not self._closed:
            url = self._servers.current
            try:
                self._work.clear()
                while await self._publish_one(url, loop.time()):
                    retries.succeeded()
                    self._refusals.pop("our lease and records", None)
                if self._desired.settled:
                    self._refusals.pop("our lease and records", None)
            except (ServerUnavailable, Refused) as error:
                log.debug("discovery cannot be written: %s", error)
                if isinstance(error, Refused):
                    self._refused("our lease and records", url, error)
                self._servers.failed(url)
                await retries.wait()
                continue
            wake_at = [self._desired.next_retry()] + ([self._renew_at] if self._lease is not None else [])
            try:
                async with asyncio.timeout_at(min((at for at in wake_at if at is not None), default=None)):
                    await self._work.wait()
            except TimeoutError:
                pass

    async def _publish_one(self, url: URL, now: float) -> bool:
        """Do the most urgent thing; False when there is nothing to do. Raises Away, Refused."""
        lease = self._lease
        if lease is not None and now >= self._renew_at:
            try:
                await self._servers.request("PUT", url, f"/v1/leases/{lease}")
            except Refused as error:
                if error.status not in (403, 404, 410):
                    raise
                log.warning("our lease has ended, all is written again: %s", error.detail)
                self._lose_lease(lease)
            else:
                self._renew_at = now + self._lease_ttl_s / 3
            return True
        work = self._desired.next_work(now)
        if work is None or self._closed:
            return False
        if isinstance(work, Put) and work.leased and lease is None:
            answer = await self._servers.request("POST", url, "/v1/leases", {"ttl_s": self._lease_ttl_s})
            self._lease = str(answer["id"])
            self._renew_at = now + self._lease_ttl_s / 3
            return True
        try:
            revision, ours = await self._carry_out(work, url)
        except Refused as error:
            if error.code == "no_lease":
                self._lose_lease(lease)
                raise ServerUnavailable(
                    str(error)
                ) from None  # not at once again: a store that forgets leases would be flooded
            if error.status == 401 or error.code == "rate_limited":
                raise
            kind, network, record_id = work.key
            event = {"kind": kind, "network": network, "id": record_id, "why": str(error)}
            log.error("discovery refused a record of ours", extra={"event": event})
            self._desired.refuse(work, now, str(error))
        else:
            self._desired.acknowledge(work, revision, ours=ours)
            self._look_for_rivals([work.key])
            self._update_settled()
        return True

    async def _carry_out(self, work: Put | Delete, url: URL) -> tuple[int, bool]:
        """Write or delete; gives the revision of the record that stands there now, and whether it is ours."""
        path = "/v1/records/" + "/".join(work.key)
        if isinstance(work, Delete):
            headers = {"If-Match": str(work.if_match)} if work.if_match is not None else {}
            try:
                await self._servers.request("DELETE", url, path, headers=headers)
            except Refused as error:
                if error.status not in (404, 412):  # gone, or another one: neither is ours to delete any more
                    raise
            return 0, True
        body = {"spec": work.spec, "lease": self._lease if work.leased else None}
        headers = {"If-None-Match": "*"} if work.if_absent else {}
        try:
            return int((await self._servers.request("PUT", url, path, body, headers=headers))["revision"]), True
        except Refused as error:
            if error.status != 412:
                raise
        try:
            return int((await self._servers.request("GET", url, path))["revision"]), False
        except Refused as error:
            if error.status != 404:
                raise
            raise ServerUnavailable(f"{'/'.join(work.key)} was there and is gone again") from None

    def _lose_lease(self, lease: str | None) -> None:
        if self._lease != lease:
            return  # a change of epoch has seen to it
        self._lease = None
        self._desired.lease_lost()
        self._update_settled()

    def _note_epoch(self, epoch: str) -> None:
        if epoch == self._publish_epoch:
            return
        if self._publish_epoch is not None:
            log.warning("discovery has another store: all of ours is written again")
            self._lease = None
            self._desired.epoch_changed()
            self._wanted_changed()
        self._publish_epoch = epoch

    # The copy on disk.

    async def _keep_saving(self, path: Path) -> None:
        while True:
            await self._unsaved.wait()
            await self._save(path)
            await asyncio.sleep(SAVE_EVERY_S)

    async def _save(self, path: Path) -> None:
        view = self._view
        if view.epoch is None or view.revision is None:
            return
        self._unsaved.clear()
        records = tuple(view.confirmed())
        try:
            await asyncio.to_thread(
                snapshot_file.save, path, self._network, view.epoch, records, view.revision, self._known_at
            )
        except OSError as error:
            log.warning("the mesh cannot be saved in %s: %s", path, error.strerror or error)
