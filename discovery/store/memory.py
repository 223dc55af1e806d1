"""The store in memory, and the base class of the stores that are backed by a file or by etcd."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from discovery.model.mesh import AnyRecord, Deletion, Key, Kind, Record, Spec
from discovery.store.base import (
    Change,
    Lease,
    Listener,
    PreconditionFailed,
    Snapshot,
    Store,
    StoreError,
    UnknownLease,
)

MAX_TOMBSTONES = 10_000
"""Deletions that are remembered: about an hour at three a second, some 2 MB."""

STALL_S = 2.0
"""After a longer gap between two calls of `expire` this process was stopped, and all leases are extended by the gap."""


@dataclass(slots=True)
class Batch:
    """One atomic write. A store with a file makes it durable before any reader sees it."""

    revision: int
    compacted: int
    puts: list[AnyRecord] = field(default_factory=list)
    deletions: list[Deletion] = field(default_factory=list)
    forgotten: list[Key] = field(default_factory=list)
    """Keys whose deletion is forgotten with this write."""

    granted: Lease | None = None
    revoked: list[str] = field(default_factory=list)


class MemoryStore(Store):
    """Records in dictionaries. Writes are sequential; each is made durable (by a subclass) and then applied."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, max_tombstones: int = MAX_TOMBSTONES) -> None:
        """Create an empty store with a new epoch. `clock` returns monotonic seconds."""
        self._clock = clock
        self._max_tombstones = max_tombstones
        self._epoch = secrets.token_hex(8)
        self._revision = 0
        self._compacted = 0  # deletions up to this revision may have been forgotten
        self._records: dict[Key, AnyRecord] = {}
        self._tombstones: dict[Key, int] = {}  # key to the revision of its deletion, in order of revision
        self._counts: Counter[str] = Counter()
        self._leases: dict[str, Lease] = {}
        self._deadlines: dict[str, float] = {}
        self._attached: dict[str, set[Key]] = {}  # lease to the keys of its records
        self._listeners: dict[object, Listener] = {}
        self._expired_at: float | None = None
        self._writing = asyncio.Lock()

    @property
    def epoch(self) -> str:
        """The store's identity."""
        return self._epoch

    @property
    def revision(self) -> int:
        """The revision of the last write."""
        return self._revision

    @property
    def stale_s(self) -> float:
        """Always 0: memory is the only copy."""
        return 0.0

    async def open(self) -> None:
        """Do nothing."""

    async def run(self) -> None:
        """Wait to be cancelled: there is no background work."""
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Do nothing."""

    async def get(self, key: Key) -> AnyRecord | None:
        """Return one record, None if there is none."""
        return self._records.get(key)

    async def snapshot(self, kind: Kind | None = None, network: str | None = None) -> Snapshot:
        """Return all records, or those of one kind or network."""
        records = tuple(
            record
            for record in self._records.values()
            if kind in (None, record.kind) and network in (None, record.network)
        )
        return Snapshot(self._revision, records)

    async def count(self, network: str) -> int:
        """Count the records of a network."""
        return self._counts[network]

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
        async with self._writing:
            old = self._records.get(key)
            if (if_none_match and old is not None) or (
                if_match is not None and (old is None or old.revision != if_match)
            ):
                raise PreconditionFailed(old.revision if old is not None else None)
            if lease is not None and lease not in self._leases:
                raise UnknownLease(lease)
            batch = self._batch(1)
            kind, network, record_id = key
            record: AnyRecord = Record(
                kind=kind, network=network, id=record_id, revision=batch.revision, lease=lease, spec=spec
            )
            batch.puts.append(record)
            await self._write(batch)
            return record

    async def delete(self, key: Key, *, if_match: int | None = None) -> Deletion | None:
        """Delete a record."""
        async with self._writing:
            old = self._records.get(key)
            if if_match is not None and (old is None or old.revision != if_match):
                raise PreconditionFailed(old.revision if old is not None else None)
            if old is None:
                return None
            batch = self._batch(1)
            deletion = Deletion(key, batch.revision)
            batch.deletions.append(deletion)
            await self._write(batch)
            return deletion

    async def since(self, revision: int) -> Sequence[Change] | None:
        """Return the changes after a revision; None if some of them may have been forgotten."""
        if not self._compacted <= revision <= self._revision:
            return None
        changes: list[Change] = [record for record in self._records.values() if record.revision > revision]
        changes.extend(Deletion(key, deleted) for key, deleted in self._tombstones.items() if deleted > revision)
        changes.sort(key=lambda change: change.revision)
        return changes

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each later write."""
        token = object()
        self._listeners[token] = listener

        def remove() -> None:
            self._listeners.pop(token, None)

        return remove

    async def grant(self, ttl_s: int, owner: str) -> Lease:
        """Grant a lease."""
        async with self._writing:
            lease = Lease(id=secrets.token_hex(8), ttl_s=ttl_s, owner=owner)
            batch = self._batch(0)
            batch.granted = lease
            await self._write(batch)
            return lease

    async def lease(self, lease_id: str) -> Lease | None:
        """Return a lease, None if there is none."""
        return self._leases.get(lease_id)

    async def leases(self, owner: str) -> Sequence[Lease]:
        """Return the leases of an owner."""
        return [lease for lease in self._leases.values() if lease.owner == owner]

    async def renew(self, lease_id: str) -> Lease:
        """Reset a lease to its full TTL."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise UnknownLease(lease_id)
        self._deadlines[lease_id] = self._clock() + lease.ttl_s
        return lease

    async def revoke(self, lease_id: str) -> Sequence[Deletion]:
        """End a lease and delete the records attached to it."""
        async with self._writing:
            if lease_id not in self._leases:
                raise UnknownLease(lease_id)
            return await self._revoke([lease_id])

    async def expire(self) -> Sequence[Deletion]:
        """End all leases that have expired."""
        now = self._clock()
        if self._expired_at is not None and now - self._expired_at > STALL_S:
            # This process did not run for a while (it was stopped, or the machine was overloaded), so renewals could not arrive.
            for lease_id in self._deadlines:
                self._deadlines[lease_id] += now - self._expired_at
        self._expired_at = now
        if all(deadline > now for deadline in self._deadlines.values()):
            return ()
        async with self._writing:
            # Checked again under the lock: a lease may have been renewed or revoked in the meantime.
            ended = [lease_id for lease_id, deadline in self._deadlines.items() if deadline <= now]
            return await self._revoke(ended) if ended else ()

    async def _revoke(self, lease_ids: Sequence[str]) -> Sequence[Deletion]:
        keys = sorted(key for lease_id in lease_ids for key in self._attached.get(lease_id, ()))
        batch = self._batch(len(keys))
        first = self._revision + 1
        batch.deletions.extend(Deletion(key, first + index) for index, key in enumerate(keys))
        batch.revoked.extend(lease_ids)
        await self._write(batch)
        return batch.deletions

    def _batch(self, changes: int) -> Batch:
        return Batch(revision=self._revision + changes, compacted=self._compacted)

    async def _write(self, batch: Batch) -> None:
        """Make a batch durable, then apply it. Once started it completes, even if the caller is cancelled in the meantime."""
        self._forget(batch)
        cancelled: asyncio.CancelledError | None = None
        durable = self._persist(batch)
        while durable is not None and not durable.done():
            try:
                await asyncio.shield(durable)
            except asyncio.CancelledError as error:
                cancelled = error
            except Exception:  # noqa: BLE001 - raised below, as for a future that was already done
                break
        failure = durable.exception() if durable is not None else None
        if failure is not None:
            raise failure if isinstance(failure, StoreError) else StoreError(f"the store cannot be written: {failure}")
        self._apply(batch)
        if cancelled is not None:
            raise cancelled

    def _forget(self, batch: Batch) -> None:
        """Add the oldest deletions to the batch's `forgotten`, as many as exceed the limit with this batch."""
        excess = len(self._tombstones) + len(batch.deletions) - self._max_tombstones
        for key, revision in islice(self._tombstones.items(), max(excess, 0)):
            batch.forgotten.append(key)
            batch.compacted = revision

    def _persist(self, batch: Batch) -> asyncio.Future[None] | None:  # noqa: ARG002 - for stores with a file
        """Start to make a batch durable. Returns None if there is nothing to wait for."""
        return None

    def _apply(self, batch: Batch) -> None:
        self._revision = batch.revision
        self._compacted = batch.compacted
        for key in batch.forgotten:
            del self._tombstones[key]
        if batch.granted is not None:
            self._restore_lease(batch.granted)
        for record in batch.puts:
            self._remove(record.key)
            self._tombstones.pop(record.key, None)
            self._restore_record(record)
        for deletion in batch.deletions:
            self._remove(deletion.key)
            self._tombstones[deletion.key] = deletion.revision
        for lease_id in batch.revoked:
            del self._leases[lease_id], self._deadlines[lease_id]
            self._attached.pop(lease_id, None)
        changes: Sequence[Change] = (*batch.puts, *batch.deletions)
        if changes:
            for listener in tuple(self._listeners.values()):
                listener(changes)

    def _restore_lease(self, lease: Lease) -> None:
        self._leases[lease.id] = lease
        self._deadlines[lease.id] = self._clock() + lease.ttl_s

    def _restore_record(self, record: AnyRecord) -> None:
        self._records[record.key] = record
        self._counts[record.network] += 1
        if record.lease is not None:
            self._attached.setdefault(record.lease, set()).add(record.key)

    def _remove(self, key: Key) -> None:
        record = self._records.pop(key, None)
        if record is None:
            return
        self._counts[record.network] -= 1
        if not self._counts[record.network]:
            del self._counts[record.network]
        if record.lease is not None:
            self._attached.get(record.lease, set()).discard(key)
