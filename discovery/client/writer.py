"""Keeps our records at the servers as wanted: writes them, renews their lease, and writes them again if they are lost."""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence

from yarl import URL

from discovery.client.config import DiscoveryClientConfig
from discovery.client.desired_state import NOT_YET, Delete, DesiredState, Put
from discovery.client.refusals import Refusals
from discovery.client.servers import RequestRefused, ServerRetries, Servers, ServerUnavailable
from discovery.client.view import View
from discovery.model.mesh import Deletion, Key
from discovery.model.spec import with_fields

log = logging.getLogger(__name__)

OUR_RECORDS = "our lease and records"
LATE_S = 5.0
"""A record that is not written after this time counts as lacking."""

RIVAL_LOG_S = 60.0
"""Pause between two log lines about the same record and another process that writes it."""


class RecordWriter:
    """Writes our records while `run` runs. Its owner reports changes of the view, so that it notices what others do to them."""

    def __init__(self, servers: Servers, view: View, refusals: Refusals, config: DiscoveryClientConfig) -> None:
        self._servers = servers
        self._view = view
        self._refusals = refusals
        self._config = config
        self._desired = DesiredState(config.reassert_after_s)
        self._lease: str | None = None
        self._renew_at = 0.0
        self._epoch: str | None = None
        self._work = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._closed = False
        self._lacking_since: float | None = None
        self._written_once = False
        self._successor_expected = False
        self._rival_logged_at: dict[Key, float] = {}
        self._reduced: set[Key] = set()
        """Records that were written without fields that a server did not know."""

    # Wanted records.

    def publish(self, put: Put) -> None:
        """Keep a record published."""
        if self._desired.publish(put):
            self._wanted_changed()

    def withdraw(self, key: Key) -> None:
        """Stop publishing a record, and delete it."""
        if self._desired.withdraw(key):
            self._wanted_changed()

    def retry(self) -> None:
        """Retry refused requests at once: the server or our token has changed."""
        self._desired.retry()
        self._work.set()

    async def settled(self) -> None:
        """Wait until a server has acknowledged all our records."""
        await self._settled.wait()

    def expect_successor(self, expected: bool) -> None:
        """Set whether another process may overwrite our records without being reported."""
        self._successor_expected = expected
        if not expected:
            self.find_rivals()

    def lacking(self, connected: bool) -> list[tuple[Key, str]]:
        """Return the records that are not at the servers as wanted, and why.

        A record that is merely not written yet counts only after LATE_S, while we are connected and nothing is refused.
        """
        late = connected and not self._refusals and self._late()
        return [(key, why) for key, why in self._desired.lacking() if why != NOT_YET or late]

    def rivals(self) -> list[Key]:
        """Return our records that another process has recently overwritten."""
        return self._desired.rivals(asyncio.get_running_loop().time())

    # Changes at the servers.

    def deleted(self, deletions: Sequence[Deletion]) -> None:
        """Write our records again that somebody has deleted."""
        if [deletion for deletion in deletions if self._desired.deleted(deletion)]:
            log.warning("a record of ours was deleted and is written again")
            self._wanted_changed()

    def find_rivals(self, keys: Iterable[Key] | None = None) -> None:
        """Look for records of ours (`keys`, or all) that another process has overwritten: most likely it has our id."""
        if self._successor_expected or self._closed:
            return
        now = asyncio.get_running_loop().time()
        for key in self._desired.keys() if keys is None else keys:
            record = self._view.mesh.record(*key)
            if record is None or not self._desired.seen(record, self._lease, now):
                continue
            self._wanted_changed()
            if now - self._rival_logged_at.get(key, -RIVAL_LOG_S) >= RIVAL_LOG_S:
                self._rival_logged_at[key] = now
                kind, network, record_id = key
                why = "another process writes this record, too: give each process its own id"
                event = {"kind": kind, "network": network, "id": record_id, "lease": record.lease, "why": why}
                log.error("id_in_use", extra={"event": event})

    def note_epoch(self, epoch: str) -> None:
        """Write everything again if the store is a different one than before."""
        if epoch == self._epoch:
            return
        if self._epoch is not None:
            log.warning("discovery has another store, all our records are written again")
            self._lease = None
            self._desired.epoch_changed()
            self._wanted_changed()
        self._epoch = epoch

    def note_fields(self) -> None:
        """Write records again that lack fields, since what a server knows has changed: it was upgraded."""
        if self._desired.write_again(self._reduced):
            self._wanted_changed()
        self._reduced.clear()

    # Writing.

    async def run(self) -> None:
        """Write until cancelled or closed."""
        retries = ServerRetries(self._servers, self._config.backoff)
        loop = asyncio.get_running_loop()
        while not self._closed:
            url = self._servers.current
            try:
                self._work.clear()
                while await self._do_next(url, loop.time()):
                    retries.succeeded()
                    self._refusals.clear(OUR_RECORDS)
                if self._desired.settled:
                    self._refusals.clear(OUR_RECORDS)
            except (ServerUnavailable, RequestRefused) as error:
                log.debug("discovery cannot be written: %s", error)
                if isinstance(error, RequestRefused):
                    self._refusals.note(OUR_RECORDS, url, error)
                self._servers.failed(url)
                await retries.wait()
                continue
            wake_at = [self._desired.next_retry()] + ([self._renew_at] if self._lease is not None else [])
            try:
                async with asyncio.timeout_at(min((at for at in wake_at if at is not None), default=None)):
                    await self._work.wait()
            except TimeoutError:
                pass

    async def close(self) -> None:
        """End the lease, which deletes the records attached to it. Others stay. Takes at most `close_timeout_s`."""
        self._closed = True
        lease, self._lease = self._lease, None
        try:
            async with asyncio.timeout(self._config.close_timeout_s):
                if lease is not None:
                    async with self._servers.connected():
                        await self._servers.anywhere("DELETE", f"/v1/leases/{lease}")
        except (TimeoutError, ServerUnavailable, RequestRefused) as error:
            log.info("the lease could not be ended, it will expire: %s", error or "no answer in time")

    async def _do_next(self, url: URL, now: float) -> bool:
        """Send the most urgent request. Returns False if there is none. Raises ServerUnavailable, RequestRefused."""
        lease = self._lease
        if lease is not None and now >= self._renew_at:
            await self._renew(lease, url, now)
            return True
        work = self._desired.next_work(now)
        if work is None or self._closed:
            return False
        if isinstance(work, Put) and work.leased and lease is None:
            answer = await self._servers.request("POST", url, "/v1/leases", {"ttl_s": self._config.lease_ttl_s})
            self._lease = str(answer["id"])
            self._renew_at = now + self._config.lease_ttl_s / 3
            return True
        await self._do(work, lease, url, now)
        return True

    async def _renew(self, lease: str, url: URL, now: float) -> None:
        try:
            await self._servers.request("PUT", url, f"/v1/leases/{lease}")
        except RequestRefused as error:
            if error.status not in (403, 404, 410):
                raise
            log.warning("our lease has ended, its records are written again: %s", error.detail)
            self._lose_lease(lease)
        else:
            self._renew_at = now + self._config.lease_ttl_s / 3

    async def _do(self, work: Put | Delete, lease: str | None, url: URL, now: float) -> None:
        """Write or delete a record, and note the result."""
        try:
            revision, ours = await self._carry_out(work, url)
        except RequestRefused as error:
            if error.code == "no_lease":
                self._lose_lease(lease)
                # Not retried at once: a store that forgets leases would be flooded with requests.
                raise ServerUnavailable(str(error)) from None
            if error.status == 401 or error.code == "rate_limited":
                raise
            kind, network, record_id = work.key
            event = {"kind": kind, "network": network, "id": record_id, "why": str(error)}
            if self._desired.refuse(
                work, now, str(error)
            ):  # not each time: a publisher may have a thousand such records
                log.error("discovery refused a record of ours", extra={"event": event})
        else:
            self._desired.acknowledge(work, revision, ours=ours)
            self.find_rivals([work.key])
            self._update_settled()

    async def _carry_out(self, work: Put | Delete, url: URL) -> tuple[int, bool]:
        """Write or delete. Returns the revision of the record that is there now, and whether it is ours."""
        path = "/v1/records/" + "/".join(work.key)
        if isinstance(work, Delete):
            headers = {"If-Match": str(work.if_match)} if work.if_match is not None else {}
            try:
                await self._servers.request("DELETE", url, path, headers=headers)
            except RequestRefused as error:
                if error.status not in (404, 412):  # already deleted, or replaced by another writer
                    raise
            return 0, True
        spec = with_fields(work.spec, self._servers.fields(url))
        body: dict[str, object] = {"spec": spec, "lease": self._lease if work.leased else None}
        headers = {"If-None-Match": "*"} if work.if_absent else {}
        try:
            revision = int((await self._servers.request("PUT", url, path, body, headers=headers))["revision"])
            if spec != (better := with_fields(work.spec, self._servers.fields(url))):
                # It was the first answer of this server, and said which fields it knows.
                body["spec"] = spec = better
                revision = int((await self._servers.request("PUT", url, path, body))["revision"])
            if spec != work.spec:
                self._reduced.add(work.key)
            return revision, True
        except RequestRefused as error:
            if error.status != 412:
                raise
        try:
            return int((await self._servers.request("GET", url, path))["revision"]), False
        except RequestRefused as error:
            if error.status != 404:
                raise
            raise ServerUnavailable(f"{'/'.join(work.key)} existed and has just been deleted") from None

    def _lose_lease(self, lease: str | None) -> None:
        if self._lease != lease:
            return  # already handled by a change of epoch
        self._lease = None
        self._desired.lease_lost()
        self._update_settled()

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

    def _late(self) -> bool:
        since = self._lacking_since
        return not self._written_once or (since is not None and time.monotonic() - since > LATE_S)
