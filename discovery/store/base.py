"""The interface of a store: records with revisions, leases that records are attached to, and a history for watchers.

Each write increases the revision and is reported to subscribers in order. Changes that are made together have one revision and
are reported together. A store forgets old deletions. If a watcher asks for changes from before that, `since` returns None and
the watcher reads everything again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from discovery.model.mesh import AnyRecord, Deletion, Key, Kind, Spec

Change: TypeAlias = AnyRecord | Deletion
Listener: TypeAlias = Callable[[Sequence[Change]], None]


class StoreError(Exception):
    """The store cannot be opened, read or written. The message is for an operator."""


class PreconditionFailed(Exception):
    """The record does not have the revision that the writer expects. `revision` is the actual one, None if there is no record."""

    def __init__(self, revision: int | None) -> None:
        super().__init__(f"the record is at revision {revision}" if revision else "there is no such record")
        self.revision = revision


class UnknownLease(Exception):
    """There is no such lease: it has ended or never existed."""

    def __init__(self, lease_id: str) -> None:
        super().__init__(f"there is no lease {lease_id!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A lease. Records attached to it are deleted when it has not been renewed for `ttl_s` seconds."""

    id: str
    ttl_s: int
    owner: str
    """Identifies the client that it was granted to. Stores do not check it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The records at one revision."""

    revision: int
    records: tuple[AnyRecord, ...]


class Store(Protocol):
    """A store of records. All methods raise StoreError if the store fails.

    A failed write has changed nothing, unless the store is on other machines and its answer was lost.
    """

    @property
    def epoch(self) -> str:
        """Identity of the store, generated when it is created. Revisions of different epochs cannot be compared."""

    @property
    def revision(self) -> int:
        """The revision of the last write, 0 before the first."""

    @property
    def stale_s(self) -> float:
        """Number of seconds for which reads have not been confirmed to be current; 0 while they are."""

    async def open(self) -> None:
        """Open files or connections and load the records. Stored leases get their full TTL again."""

    async def run(self) -> None:
        """Do background work between `open` and `close`, until cancelled."""

    async def close(self) -> None:
        """Close files and connections. Idempotent."""

    async def get(self, key: Key) -> AnyRecord | None:
        """Return one record, None if there is none."""

    async def snapshot(self, kind: Kind | None = None, network: str | None = None) -> Snapshot:
        """Return all records, or those of one kind or network."""

    async def count(self, network: str) -> int:
        """Count the records of a network."""

    async def put(
        self,
        key: Key,
        spec: Spec,
        *,
        lease: str | None = None,
        if_match: int | None = None,
        if_none_match: bool = False,
    ) -> AnyRecord:
        """Write a record. `if_match`: only if it has that revision; `if_none_match`: only if there is none.

        Without a lease the record stays until it is deleted, even if it was attached to a lease before. Raises
        PreconditionFailed, UnknownLease.
        """

    async def delete(self, key: Key, *, if_match: int | None = None) -> Deletion | None:
        """Delete a record. Returns None if there was none. Raises PreconditionFailed."""

    async def since(self, revision: int) -> Sequence[Change] | None:
        """Return the last change of each record after a revision, in order of revision; None if that history is not available."""

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each later write, in order, on the event loop. Returns a function that unsubscribes."""

    async def grant(self, ttl_s: int, owner: str) -> Lease:
        """Grant a lease."""

    async def lease(self, lease_id: str) -> Lease | None:
        """Return a lease, None if there is none."""

    async def leases(self, owner: str) -> Sequence[Lease]:
        """Return the leases of an owner."""

    async def renew(self, lease_id: str) -> Lease:
        """Reset a lease to its full TTL. Raises UnknownLease."""

    async def revoke(self, lease_id: str) -> Sequence[Deletion]:
        """End a lease and delete the records attached to it. Raises UnknownLease."""

    async def expire(self) -> Sequence[Deletion]:
        """End all leases that have expired, as `revoke` does. Call this at least once a second."""
