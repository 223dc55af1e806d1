"""The store in etcd, which several discovery servers share.

Revisions, leases and the watch are etcd's own. All servers report the same revisions, so a client that moves to another
server resumes where it was; and etcd ends leases, whichever servers are up. Reads are answered from a copy in memory that the
watch keeps current; a write is answered once the copy has it too. While etcd cannot be reached, reads are still answered from
the copy, and `stale_s` says for how long it has not been confirmed.

Revisions are those of the whole cluster: they rise with every write and may have gaps. `etcd_keys` has the layout.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from yarl import URL

from discovery.model.mesh import AnyRecord, Deletion, Key, Record, Spec
from discovery.store.base import Change, Lease, PreconditionFailed, StoreError, UnknownLease
from discovery.store.etcd_keys import EtcdKeys, encode_lease, encode_spec, lease_id_of, lease_number, lease_of
from discovery.store.etcdapi import (
    COMPACTED,
    NOT_FOUND,
    TIMING,
    Etcd,
    EtcdAccess,
    EtcdError,
    EtcdTiming,
    bytes_of,
    number_of,
    range_end,
    text_of,
)
from discovery.store.memory import MAX_TOMBSTONES, Batch, MemoryStore

log = logging.getLogger(__name__)

PAGE = 500
"""Keys that are read at once."""


class EtcdStore(MemoryStore):
    """Records in an etcd cluster."""

    def __init__(
        self,
        access: EtcdAccess,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_tombstones: int = MAX_TOMBSTONES,
        timing: EtcdTiming = TIMING,
        page: int = PAGE,
    ) -> None:
        """`page` is the number of keys that are read at once. Raises OSError, ssl.SSLError for files that cannot be used."""
        super().__init__(clock=clock, max_tombstones=max_tombstones)
        self._etcd = Etcd(access, timing)
        self._timing = timing
        self._page = page
        self._prefix = access.prefix
        self._keys = EtcdKeys(access.prefix)
        self._applied = asyncio.Event()  # replaced with each change of the copy
        self._confirmed_at = clock()

    @property
    def stale_s(self) -> float:
        """Number of seconds for which etcd has not confirmed the copy; 0 while it does."""
        age = self._clock() - self._confirmed_at
        return age if age > self._timing.stale_after_s else 0.0

    async def open(self) -> None:
        """Connect and read everything. Raises StoreError if etcd cannot be reached within `open_s`."""
        self._etcd.open()
        error = EtcdError("no answer in time")
        try:
            async with asyncio.timeout(self._timing.open_s):
                while True:
                    try:
                        await self._load()
                        return
                    except EtcdError as refusal:
                        error = refusal
                    await asyncio.sleep(self._timing.retry_s)
        except TimeoutError:
            await self.close()
            raise StoreError(f"etcd: {error}") from error
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._etcd.close()

    async def run(self) -> None:
        """Keep the copy current until cancelled."""
        while True:
            url = self._etcd.current
            error = await self._follow(url)
            if error.code == COMPACTED:
                log.info("etcd has compacted the history that we missed, everything is read again")
                await self._reload()
                continue
            if not self.stale_s:
                # Logged once for each member when the trouble starts, not for each attempt while none can be reached.
                log.warning("etcd gave an unexpected answer", extra={"event": {"why": str(error)[:300]}})
            self._etcd.failed(url)
            await asyncio.sleep(self._timing.retry_s)

    async def _follow(self, url: URL) -> EtcdError:
        """Watch and probe one member until either fails. Returns the error."""
        failure: asyncio.Future[EtcdError] = asyncio.get_running_loop().create_future()

        async def until_failure(doing: Awaitable[None]) -> None:
            try:
                await doing
            except EtcdError as error:
                if not failure.done():
                    failure.set_result(error)

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(until_failure(self._watch(url)), name="etcd-watch"),
                group.create_task(until_failure(self._probe(url)), name="etcd-probe"),
            ]
            try:
                return await failure
            finally:
                for task in tasks:
                    task.cancel()

    # Records.

    async def put(
        self,
        key: Key,
        spec: Spec,
        *,
        lease: str | None = None,
        if_match: int | None = None,
        if_none_match: bool = False,
    ) -> AnyRecord:
        """Write a record."""
        where = self._keys.record(key)
        put = {"key": where, "value": encode_spec(spec)}
        if lease is not None:
            put["lease"] = str(lease_number(lease))
        try:
            revision = await self._transact(where, {"request_put": put}, 0 if if_none_match else if_match)
        except EtcdError as error:
            if error.code == NOT_FOUND and lease is not None:
                raise UnknownLease(lease) from None
            raise StoreError(f"etcd: {error}") from error
        await self._reach(revision)
        kind, network, record_id = key
        return Record(kind=kind, network=network, id=record_id, revision=revision, lease=lease, spec=spec)

    async def delete(self, key: Key, *, if_match: int | None = None) -> Deletion | None:
        """Delete a record."""
        where = self._keys.record(key)
        try:
            revision = await self._transact(where, {"request_delete_range": {"key": where}}, if_match, delete=True)
        except EtcdError as error:
            raise StoreError(f"etcd: {error}") from error
        if not revision:
            return None
        await self._reach(revision)
        return Deletion(key, revision)

    async def since(self, revision: int) -> Sequence[Change] | None:
        """Return the changes after a revision; None if some of them may have been forgotten."""
        if revision > self._revision:
            # A client that comes from another server may be ahead of this copy for a moment.
            await self._reach(revision)
            if revision > self._revision and self.stale_s:
                raise StoreError("etcd: this server's copy is older than the revision that the watcher has")
        return await super().since(revision)

    async def _transact(
        self, where: str, operation: Mapping[str, Any], revision: int | None, *, delete: bool = False
    ) -> int:
        """Carry out an operation if the key has that revision (0: if it does not exist).

        Returns the new revision, 0 if there was nothing to delete. Raises EtcdError, PreconditionFailed.
        """
        compare = [{"key": where, "target": "MOD", "mod_revision": str(revision)}] if revision is not None else []
        request = {"compare": compare, "success": [operation], "failure": [{"request_range": {"key": where}}]}
        answer = await self._etcd.call("kv/txn", request)
        at = number_of(answer.get("header", {}), "revision")
        if not answer.get("succeeded"):
            # So that the copy has the conflicting record. Only a short wait: `at` is the revision of the whole cluster, which
            # the copy never reaches if it belongs to a key that is not ours.
            await self._reach(at, self._timing.reach_s / 7)
            found = _response(answer, "response_range").get("kvs")
            raise PreconditionFailed(number_of(found[0], "mod_revision") if found else None)
        if delete and not number_of(_response(answer, "response_delete_range"), "deleted"):
            return 0
        return at

    # Leases.

    async def grant(self, ttl_s: int, owner: str) -> Lease:
        """Grant a lease. etcd has a minimum TTL, some two seconds by default; the lease has the TTL that etcd granted."""
        try:
            granted = await self._etcd.call("lease/grant", {"TTL": str(ttl_s)})
            number = number_of(granted, "ID")
            lease = Lease(id=lease_id_of(number), ttl_s=number_of(granted, "TTL"), owner=owner)
            put = {"key": self._keys.lease(lease.id), "value": encode_lease(lease), "lease": str(number)}
            answer = await self._etcd.call("kv/txn", {"success": [{"request_put": put}]})
        except EtcdError as error:
            raise StoreError(f"etcd: {error}") from error
        await self._reach(number_of(answer.get("header", {}), "revision"))
        return lease

    async def lease(self, lease_id: str) -> Lease | None:
        """Return a lease. One that is not in the copy is looked up in etcd: another server may just have granted it."""
        known = self._leases.get(lease_id)
        if known is not None:
            return known
        try:
            answer = await self._etcd.call("kv/range", {"key": self._keys.lease(lease_id)}, repeatable=True)
        except EtcdError as error:
            raise StoreError(f"etcd: {error}") from error
        kvs = answer.get("kvs")
        return lease_of(lease_id, kvs[0]) if kvs else None

    async def renew(self, lease_id: str) -> Lease:
        """Reset a lease to its full TTL."""
        lease = await self.lease(lease_id)
        if lease is None:
            raise UnknownLease(lease_id)
        try:
            answer = await self._etcd.call("lease/keepalive", {"ID": str(lease_number(lease_id))}, repeatable=True)
        except EtcdError as error:
            raise StoreError(f"etcd: {error}") from error
        if not number_of(answer.get("result", {}), "TTL"):
            raise UnknownLease(lease_id)
        return lease

    async def revoke(self, lease_id: str) -> Sequence[Deletion]:
        """End a lease and delete the records attached to it."""
        try:
            answer = await self._etcd.call("lease/revoke", {"ID": str(lease_number(lease_id))})
        except EtcdError as error:
            if error.code == NOT_FOUND:
                raise UnknownLease(lease_id) from None
            raise StoreError(f"etcd: {error}") from error
        revision = number_of(answer.get("header", {}), "revision")
        await self._reach(revision)
        return [Deletion(key, deleted) for key, deleted in self._tombstones.items() if deleted == revision]

    async def expire(self) -> Sequence[Deletion]:
        """Do nothing: etcd ends leases, and the watch reports it."""
        return ()

    # The copy.

    async def _load(self) -> None:
        """Read everything and replace the copy with it. Subscribers get the differences."""
        began = self._clock()
        await self._find_epoch()
        records: dict[Key, AnyRecord] = {}
        leases: dict[str, Lease] = {}
        first, revision = text_of(self._prefix), 0
        while True:
            request = {"key": first, "range_end": range_end(self._prefix), "limit": str(self._page)}
            answer = await self._etcd.call(
                "kv/range", request | ({"revision": str(revision)} if revision else {}), repeatable=True
            )
            revision = revision or number_of(answer.get("header", {}), "revision")
            kvs = answer.get("kvs", ())
            for kv in kvs:
                item = self._keys.item(kv)
                if isinstance(item, Lease):
                    leases[item.id] = item
                elif isinstance(item, Record):
                    records[item.key] = item
            if not answer.get("more") or not kvs:
                break
            first = text_of(bytes_of(kvs[-1].get("key")) + b"\0")
        if not self._revision:
            self._compacted = revision
        self._apply_batch(self._difference(revision, records, leases))
        self._confirmed_at = began

    def _difference(self, revision: int, records: Mapping[Key, AnyRecord], leases: Mapping[str, Lease]) -> Batch:
        for lease in leases.values():
            if lease.id not in self._leases:
                self._restore_lease(lease)
        puts = sorted(
            (record for key, record in records.items() if self._records.get(key) != record),
            key=lambda record: record.revision,
        )
        gone = sorted(key for key in self._records if key not in records)
        return Batch(
            revision=revision,
            compacted=self._compacted,
            puts=puts,
            deletions=[Deletion(key, revision) for key in gone],
            revoked=[lease_id for lease_id in self._leases if lease_id not in leases],
        )

    async def _find_epoch(self) -> None:
        where = self._keys.epoch
        made = secrets.token_hex(4)
        answer = await self._etcd.call(
            "kv/txn",
            {
                "compare": [{"key": where, "target": "CREATE", "create_revision": "0"}],
                "success": [{"request_put": {"key": where, "value": text_of(made)}}],
                "failure": [{"request_range": {"key": where}}],
            },
        )
        if not answer.get("succeeded"):
            found = _response(answer, "response_range").get("kvs") or [{}]
            made = bytes_of(found[0].get("value")).decode(errors="replace")
        # Includes the cluster's id: a cluster that was restored from a backup has another id, and another history.
        cluster = number_of(answer.get("header", {}), "cluster_id")
        self._epoch = f"{made[:8]}{cluster & 0xFFFFFFFF:08x}"

    async def _reload(self) -> None:
        while True:
            try:
                await self._load()
            except EtcdError as error:
                log.warning("etcd cannot be read: %s", error)
                await asyncio.sleep(self._timing.retry_s)
            else:
                return

    async def _watch(self, url: URL) -> None:
        async with aclosing(self._etcd.watch(url, self._prefix, self._revision + 1)) as results:
            async for result in results:
                if result.get("canceled"):
                    compacted = number_of(result, "compact_revision")
                    reason = str(result.get("cancel_reason", "the watch was cancelled"))[:200]
                    raise EtcdError(reason, COMPACTED if compacted else None)
                self._apply_events(result.get("events", ()))

    def _apply_events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Apply events, those of one revision together."""
        by_revision: dict[int, Batch] = {}
        for event in events:
            kv = event.get("kv", {})
            revision = number_of(kv, "mod_revision")
            batch = by_revision.setdefault(revision, Batch(revision=revision, compacted=self._compacted))
            if event.get("type") == "DELETE":
                gone = self._keys.lease_or_record(kv)
                if isinstance(gone, str):
                    if gone in self._leases:
                        batch.revoked.append(gone)
                elif gone is not None:
                    batch.deletions.append(Deletion(gone, revision))
                continue
            item = self._keys.item(kv)
            if isinstance(item, Lease):
                batch.granted = item
            elif item is not None:
                batch.puts.append(item)
        for revision in sorted(by_revision):
            if revision > self._revision:
                by_revision[revision].compacted = self._compacted
                self._apply_batch(by_revision[revision])

    def _apply_batch(self, batch: Batch) -> None:
        self._forget(batch)
        self._apply(batch)
        self._applied.set()
        self._applied = asyncio.Event()

    async def _probe(self, url: URL) -> None:
        """Confirm regularly, by reads that need a majority, that the watched member is not behind."""
        request = {"key": self._keys.epoch, "keys_only": True}
        while True:
            began = self._clock()
            await self._etcd.call_at(url, "kv/range", request)
            self._confirmed_at = began
            if self._etcd.current != url:
                raise EtcdError(f"{url}: a call to this member has failed")
            await asyncio.sleep(self._timing.probe_s)

    async def _reach(self, revision: int, timeout_s: float | None = None) -> None:
        """Wait until the copy has a revision, but not for long: the write is done, and the copy will follow."""
        try:
            async with asyncio.timeout(self._timing.reach_s if timeout_s is None else timeout_s):
                while self._revision < revision:
                    await self._applied.wait()
        except TimeoutError:
            pass


def _response(answer: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return the result of a transaction's only operation, empty if there is none of that kind."""
    try:
        return msgspec.convert(answer["responses"][0][kind], dict[str, Any])
    except (KeyError, IndexError, TypeError, msgspec.MsgspecError):
        return {}
