"""What a store is: records under revisions, leases that records hang on, and a history that watchers resume from.

Every write raises the revision and is told to subscribers in order; changes that were made as one have one revision and
are told together. A store that kept no trace of something
deleted cannot tell what a watcher missed; it says so (`since` gives None) and the watcher reads everything anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from discovery.model.mesh import AnyRecord, Deletion, Key, Kind, Spec

Change: TypeAlias = AnyRecord | Deletion
Listener: TypeAlias = Callable[[Sequence[Change]], None]


class StoreError(Exception):
    """The store cannot be opened, read or written; the message is for an operator."""


class PreconditionFailed(Exception):
    """The record is not at the revision that the writer expects; `revision` is the actual one, None if there is no record."""

    def __init__(self, revision: int | None) -> None:
        super().__init__(f"the record is at revision {revision}" if revision else "there is no such record")
        self.revision = revision


class UnknownLease(Exception):
    """There is no such lease: it ended, or never was."""

    def __init__(self, lease_id: str) -> None:
        super().__init__(f"there is no lease {lease_id!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Records that hang on a lease are deleted when it has not been renewed for `ttl_s` seconds."""

    id: str
    ttl_s: int
    owner: str
    """Who made it, in the caller's terms. Stores do not check it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All records, at one revision."""

    revision: int
    records: tuple[AnyRecord, ...]


class Store(Protocol):
    """Where records live. All methods raise StoreError when the store fails.

    A failed write has changed nothing, unless the store is on other machines and its answer was lost on the way.
    """

    @property
    def epoch(self) -> str:
        """Identity of the store, made with it. Revisions of different epochs cannot be compared."""

    @property
    def revision(self) -> int:
        """The revision of the last write, 0 before the first."""

    @property
    def stale_s(self) -> float:
        """For how many seconds reads have not been confirmed to be current; 0 while they are."""

    async def open(self) -> None:
        """Make ready; stored leases get their whole TTL anew."""

    async def run(self) -> None:
        """Do background work between `open` and `close`, until cancelled."""

    async def close(self) -> None:
        """Close files and connections. Idempotent."""

    async def get(self, key: Key) -> AnyRecord | None:
        """Find one record."""

    async def snapshot(self, kind: Kind | None = None, network: str | None = None) -> Snapshot:
        """Find all records, of one kind or network where given."""

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
        """Write a record; with `if_match` only over that revision, with `if_none_match` only where there is none.

        Without a lease the record stays until deleted, also when it had one. Raises PreconditionFailed, UnknownLease.
        """

    async def delete(self, key: Key, *, if_match: int | None = None) -> Deletion | None:
        """Delete a record; None if there was none. Raises PreconditionFailed."""

    async def since(self, revision: int) -> Sequence[Change] | None:
        """Return the last change of each record after a revision, by revision; None if there is no history from there."""

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every later write, in order, on the loop. Call the result to unsubscribe."""

    async def grant(self, ttl_s: int, owner: str) -> Lease:
        """Make a lease."""

    async def lease(self, lease_id: str) -> Lease | None:
        """Find a lease."""

    async def leases(self, owner: str) -> Sequence[Lease]:
        """Return the leases of an owner."""

    async def renew(self, lease_id: str) -> Lease:
        """Reset a lease to its whole TTL. Raises UnknownLease."""

    async def revoke(self, lease_id: str) -> Sequence[Deletion]:
        """End a lease and delete the records that hang on it. Raises UnknownLease."""

    async def expire(self) -> Sequence[Deletion]:
        """End every lease whose time has run out, as `revoke` does; to be called once a second or more often."""
