"""Desired state: what we want to stand in discovery, what the server has acknowledged, and what to do next.

Sans-IO: the client carries out `next_work` and says how it went.
"""

from dataclasses import dataclass

from discovery.model.mesh import AnyRecord, Deletion, Key, Kind, Spec

RETRY_REFUSED_S = 30.0  # a refusal (a token, a limit) is an operator's to mend: not asked again at once

REASSERT_AFTER_S = 3.0
REASSERT_EVERY_S = 600.0
"""A record of ours that another process has written is written again once, so that the other one notices us as well; then not
for so long, or two processes with one id would take turns all day."""

OWN_KINDS = frozenset({Kind.NETWORK, Kind.RELAY, Kind.TURN, Kind.ALLOCATION, Kind.GATEWAY})
"""Kinds that a role needs in order to work. Services and vips are data: no role depends on one."""


NOT_YET = "it is not written yet"


@dataclass(frozen=True, slots=True)
class Put:
    """Write this record."""

    key: Key
    spec: Spec
    leased: bool
    if_absent: bool = False
    """Only if there is none; another writer's record is left alone."""


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete this record."""

    key: Key
    if_match: int | None = None
    """Only at this revision, which is what we wrote."""


@dataclass(slots=True)
class _Wanted:
    put: Put
    acknowledged: bool = False
    ours: bool = False
    revision: int = 0
    gone_at: int = 0  # the last deletion that the watch told of, which may come before the answer to a write
    retry_at: float = 0.0
    refused: str | None = None
    held_by: str | None = None
    """Description of another process that has written the record last."""

    rival_at: float | None = None
    reasserted_at: float | None = None

    @property
    def exclusive(self) -> bool:
        """Whether only we may write it: it describes our process, and is no claim that the first writer wins."""
        return self.put.leased and not self.put.if_absent


class DesiredState:
    """The records that we want, and which of them the server has acknowledged."""

    def __init__(self, reassert_after_s: float = REASSERT_AFTER_S) -> None:
        """Begin wanting nothing."""
        self._reassert_after_s = reassert_after_s
        self._wanted: dict[Key, _Wanted] = {}
        self._unwanted: dict[Key, tuple[Delete, float]] = {}  # with the time before which it is not tried

    def publish(self, put: Put) -> bool:
        """Want a record. Returns whether that is a change."""
        self._unwanted.pop(put.key, None)
        known = self._wanted.get(put.key)
        if known is not None and known.put == put:
            return False
        self._wanted[put.key] = _Wanted(put)
        return True

    def withdraw(self, key: Key) -> bool:
        """No longer want a record. Returns whether that is a change.

        One that was wanted only where there was none is deleted only if it is as we wrote it.
        """
        wanted = self._wanted.pop(key, None)
        if wanted is None:
            return False
        if wanted.held_by is not None:
            return True  # what stands there is another process's
        if not wanted.put.if_absent:
            as_written = wanted.acknowledged and wanted.exclusive  # not what a successor has written in its place
            self._unwanted[key] = (Delete(key, wanted.revision if as_written else None), 0.0)
        elif wanted.ours:
            self._unwanted[key] = (Delete(key, wanted.revision), 0.0)
        return True

    @property
    def settled(self) -> bool:
        """Whether the server has acknowledged everything."""
        return not self._unwanted and all(wanted.acknowledged for wanted in self._wanted.values())

    def next_work(self, now: float) -> Put | Delete | None:
        """Return what to do next, None while there is nothing to do yet."""
        for delete, retry_at in self._unwanted.values():
            if retry_at <= now:
                return delete
        for wanted in self._wanted.values():
            if not wanted.acknowledged and wanted.retry_at <= now:
                return wanted.put
        return None

    def next_retry(self) -> float | None:
        """Return when the next refused write is due again."""
        times = [wanted.retry_at for wanted in self._wanted.values() if not wanted.acknowledged]
        return min([*times, *(retry_at for _, retry_at in self._unwanted.values())], default=None)

    def acknowledge(self, work: Put | Delete, revision: int = 0, *, ours: bool = True) -> None:
        """Note that the server did it or, if not `ours`, that another writer's record is there.

        What is wanted may have changed meanwhile, and the record may be gone again already.
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
            wanted.gone_at = 0  # counts once: a number of another epoch must not have us write for ever

    def refuse(self, work: Put | Delete, now: float, why: str = "") -> None:
        """Note that the server refused; it is tried again later."""
        if isinstance(work, Delete):
            if work.key in self._unwanted:
                self._unwanted[work.key] = (work, now + RETRY_REFUSED_S)
            return
        wanted = self._wanted.get(work.key)
        if wanted is not None:
            wanted.retry_at = now + RETRY_REFUSED_S
            wanted.refused = why

    def retry(self) -> None:
        """Try refused writes at once: the server or our token has changed."""
        for wanted in self._wanted.values():
            if wanted.refused is not None:
                wanted.retry_at = 0.0

    def lacking(self) -> list[tuple[Key, str]]:
        """Return the records that a role needs and that are not there as we want them, and why."""
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
        """Return the records that another process has written lately."""
        return [
            key
            for key, wanted in self._wanted.items()
            if wanted.rival_at is not None and now - wanted.rival_at < REASSERT_EVERY_S
        ]

    def keys(self) -> list[Key]:
        """Return the keys of the records that only we may write."""
        return [key for key, wanted in self._wanted.items() if wanted.exclusive]

    def seen(self, record: AnyRecord, lease: str | None, now: float) -> bool:
        """Compare a record with what we wrote. Returns whether another process has overwritten it, which is reported once."""
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
        """Note that our lease has ended: everything on it has to be written again."""
        for wanted in self._wanted.values():
            if wanted.put.leased and wanted.held_by is None:
                wanted.acknowledged = False

    def epoch_changed(self) -> None:
        """Note that the store is another one and has nothing of ours."""
        self._unwanted.clear()
        for wanted in self._wanted.values():
            wanted.acknowledged = wanted.ours = False
            wanted.revision = wanted.gone_at = 0
            wanted.retry_at = 0.0
            wanted.held_by = None

    def deleted(self, deletion: Deletion) -> bool:
        """Note that a record was deleted. Returns whether we want it and write it again."""
        wanted = self._wanted.get(deletion.key)
        if wanted is None:
            return False
        wanted.gone_at = max(wanted.gone_at, deletion.revision)
        if wanted.held_by is not None:
            # The other process is gone: the record is ours again.
            wanted.acknowledged, wanted.held_by, wanted.retry_at = False, None, 0.0
            return True
        if not wanted.acknowledged or deletion.revision <= wanted.revision:
            return False
        wanted.acknowledged = wanted.ours = False
        return True
