"""Desired state: the records that we want, what the server has acknowledged, and what to do next.

Sans-IO: the client carries out `next_work` and reports the result.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from discovery.model.mesh import AnyRecord, Deletion, Key, Kind, Spec

RETRY_REFUSED_S = 30.0
"""Pause after a refusal: an operator has to change something (a token, a limit) first."""

REASSERT_AFTER_S = 3.0
REASSERT_EVERY_S = 600.0
"""If another process has overwritten our record, it is written again once after REASSERT_AFTER_S, so that the other process
notices us, too. Then not for REASSERT_EVERY_S: otherwise two processes with the same id would overwrite each other forever."""

OWN_KINDS = frozenset({Kind.NETWORK, Kind.RELAY, Kind.TURN, Kind.ALLOCATION, Kind.GATEWAY})
"""Kinds of records that a role needs in order to work. Services and vips are data: no role depends on them."""

NOT_YET = "it is not written yet"


@dataclass(frozen=True, slots=True)
class Put:
    """Write this record."""

    key: Key
    spec: Spec
    leased: bool
    if_absent: bool = False
    """Only if there is none; another writer's record is not changed."""


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete this record."""

    key: Key
    if_match: int | None = None
    """Only at this revision, which is the one that we wrote."""


@dataclass(slots=True)
class _Wanted:
    put: Put
    acknowledged: bool = False
    ours: bool = False
    revision: int = 0
    gone_at: int = 0  # last deletion in the watch, which may arrive before the answer to a write
    retry_at: float = 0.0
    refused: str | None = None
    held_by: str | None = None
    """Description of another process that has overwritten the record."""

    rival_at: float | None = None
    reasserted_at: float | None = None

    @property
    def exclusive(self) -> bool:
        """Whether only this process may write it. It describes this process, unlike an `if_absent` record, where the first wins."""
        return self.put.leased and not self.put.if_absent


class DesiredState:
    """The records that we want, and which of them the server has acknowledged."""

    def __init__(self, reassert_after_s: float = REASSERT_AFTER_S) -> None:
        """Start without records."""
        self._reassert_after_s = reassert_after_s
        self._wanted: dict[Key, _Wanted] = {}
        self._unwanted: dict[Key, tuple[Delete, float]] = {}  # with the time before which it is not retried

    def publish(self, put: Put) -> bool:
        """Add a record. Returns whether that is a change."""
        self._unwanted.pop(put.key, None)
        known = self._wanted.get(put.key)
        if known is not None and known.put == put:
            return False
        self._wanted[put.key] = _Wanted(put)
        return True

    def withdraw(self, key: Key) -> bool:
        """Remove a record. Returns whether that is a change.

        An `if_absent` record is deleted at the server only if it is still as we wrote it.
        """
        wanted = self._wanted.pop(key, None)
        if wanted is None:
            return False
        if wanted.held_by is not None:
            return True  # the record there belongs to another process
        if not wanted.put.if_absent:
            as_written = wanted.acknowledged and wanted.exclusive  # a successor's record stays
            self._unwanted[key] = (Delete(key, wanted.revision if as_written else None), 0.0)
        elif wanted.ours:
            self._unwanted[key] = (Delete(key, wanted.revision), 0.0)
        return True

    @property
    def settled(self) -> bool:
        """Whether the server has acknowledged everything."""
        return not self._unwanted and all(wanted.acknowledged for wanted in self._wanted.values())

    def next_work(self, now: float) -> Put | Delete | None:
        """Return what to do next, None if there is nothing to do now."""
        for delete, retry_at in self._unwanted.values():
            if retry_at <= now:
                return delete
        for wanted in self._wanted.values():
            if not wanted.acknowledged and wanted.retry_at <= now:
                return wanted.put
        return None

    def next_retry(self) -> float | None:
        """Return the time at which a pending write is due, None if none is pending."""
        times = [wanted.retry_at for wanted in self._wanted.values() if not wanted.acknowledged]
        return min([*times, *(retry_at for _, retry_at in self._unwanted.values())], default=None)

    def acknowledge(self, work: Put | Delete, revision: int = 0, *, ours: bool = True) -> None:
        """Note that the server has done it or, if not `ours`, that another writer's record is there.

        The wanted record may have changed in the meantime, and the written one may already have been deleted again.
        """
        if isinstance(work, Delete):
            self._unwanted.pop(work.key, None)
            return
        wanted = self._wanted.get(work.key)
        if wanted is not None and wanted.put == work:
            wanted.acknowledged = revision > wanted.gone_at
            wanted.ours = ours and wanted.acknowledged
            wanted.refused = wanted.held_by = None
            wanted.revision = revision
            wanted.gone_at = 0  # used once: a revision of another epoch must not make us write forever

    def refuse(self, work: Put | Delete, now: float, why: str = "") -> bool:
        """Note that the server refused. It is retried after RETRY_REFUSED_S. Returns whether it was refused for another reason
        before, or not at all.
        """
        if isinstance(work, Delete):
            if work.key in self._unwanted:
                self._unwanted[work.key] = (work, now + RETRY_REFUSED_S)
            return True
        wanted = self._wanted.get(work.key)
        if wanted is None:
            return True
        is_new = wanted.refused != why
        wanted.retry_at = now + RETRY_REFUSED_S
        wanted.refused = why
        return is_new

    def retry(self) -> None:
        """Retry refused writes at once: the server or our token has changed."""
        for wanted in self._wanted.values():
            if wanted.refused is not None:
                wanted.retry_at = 0.0

    def write_again(self, keys: Iterable[Key]) -> bool:
        """Have records written again. Returns whether there are any."""
        found = [wanted for key in keys if (wanted := self._wanted.get(key)) is not None and wanted.acknowledged]
        for wanted in found:
            wanted.acknowledged = False
        return bool(found)

    def lacking(self) -> list[tuple[Key, str]]:
        """Return the records that a role needs and that are not as wanted, and why."""
        found = []
        for key, wanted in self._wanted.items():
            if key[0] not in OWN_KINDS or not wanted.exclusive:
                continue
            if wanted.held_by is not None:
                found.append((key, f"another process with this id has written it ({wanted.held_by})"))
            elif not wanted.acknowledged:
                found.append((key, wanted.refused or NOT_YET))
        return found

    def rivals(self, now: float) -> list[Key]:
        """Return the records that another process has overwritten in the last REASSERT_EVERY_S."""
        return [
            key
            for key, wanted in self._wanted.items()
            if wanted.rival_at is not None and now - wanted.rival_at < REASSERT_EVERY_S
        ]

    def keys(self) -> list[Key]:
        """Return the keys of the records that only this process may write."""
        return [key for key, wanted in self._wanted.items() if wanted.exclusive]

    def seen(self, record: AnyRecord, lease: str | None, now: float) -> bool:
        """Compare a record with the one that we wrote. Returns True, once, if another process has overwritten it."""
        wanted = self._wanted.get(record.key)
        if wanted is None or not wanted.exclusive or not wanted.acknowledged or wanted.held_by is not None:
            return False
        if record.revision <= wanted.revision or record.lease == lease:
            return False
        wanted.held_by = f"lease {record.lease}" if record.lease is not None else "without a lease"
        wanted.rival_at = now
        if wanted.reasserted_at is None or now - wanted.reasserted_at > REASSERT_EVERY_S:
            wanted.reasserted_at = now
            wanted.acknowledged = False
            wanted.retry_at = now + self._reassert_after_s
        return True

    def lease_lost(self) -> None:
        """Note that our lease has ended: all records on it have to be written again."""
        for wanted in self._wanted.values():
            if wanted.put.leased and wanted.held_by is None:
                wanted.acknowledged = False

    def epoch_changed(self) -> None:
        """Note that the store is a different one, without our records."""
        self._unwanted.clear()
        for wanted in self._wanted.values():
            wanted.acknowledged = wanted.ours = False
            wanted.revision = wanted.gone_at = 0
            wanted.retry_at = 0.0
            wanted.held_by = None

    def deleted(self, deletion: Deletion) -> bool:
        """Note that a record was deleted. Returns whether it has to be written again."""
        wanted = self._wanted.get(deletion.key)
        if wanted is None:
            return False
        wanted.gone_at = max(wanted.gone_at, deletion.revision)
        if wanted.held_by is not None:
            # The other process has ended: the record is ours again.
            wanted.acknowledged, wanted.held_by, wanted.retry_at = False, None, 0.0
            return True
        if not wanted.acknowledged or deletion.revision <= wanted.revision:
            return False
        wanted.acknowledged = wanted.ours = False
        return True
