"""Desired state: what we want to stand in discovery, what the server has acknowledged, and what to do next.

Sans-IO: the client carries out `next_work` and says how it went.
"""

from dataclasses import dataclass

from discovery.model import Deletion, Key, Spec

RETRY_REFUSED_S = 30.0  # a refusal (a token, a limit) is an operator's to mend: not asked again at once


@dataclass(frozen=True, slots=True)
class Put:
    """Write this record."""

    key: Key
    spec: Spec
    leased: bool
    if_absent: bool = False
    """Only where there is none: what somebody else wrote is as good, and is left alone."""


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


class DesiredState:
    """What we want, and how far it is true."""

    def __init__(self) -> None:
        """Begin wanting nothing."""
        self._wanted: dict[Key, _Wanted] = {}
        self._unwanted: dict[Key, tuple[Delete, float]] = {}  # with the time before which it is not tried

    def publish(self, put: Put) -> bool:
        """Want a record; tells whether that is news."""
        self._unwanted.pop(put.key, None)
        known = self._wanted.get(put.key)
        if known is not None and known.put == put:
            return False
        self._wanted[put.key] = _Wanted(put)
        return True

    def withdraw(self, key: Key) -> bool:
        """No longer want a record; tells whether that is news.

        One that was wanted only where there was none is deleted only if it is as we wrote it.
        """
        wanted = self._wanted.pop(key, None)
        if wanted is None:
            return False
        if not wanted.put.if_absent:
            self._unwanted[key] = (Delete(key), 0.0)
        elif wanted.ours:
            self._unwanted[key] = (Delete(key, wanted.revision), 0.0)
        return True

    @property
    def wants_lease(self) -> bool:
        """Whether anything that is wanted needs a lease."""
        return any(wanted.put.leased for wanted in self._wanted.values())

    @property
    def settled(self) -> bool:
        """Whether the server has acknowledged everything."""
        return not self._unwanted and all(wanted.acknowledged for wanted in self._wanted.values())

    def next_work(self, now: float) -> Put | Delete | None:
        """Tell what to do next; None while there is nothing, or nothing that is not to be retried later."""
        for delete, retry_at in self._unwanted.values():
            if retry_at <= now:
                return delete
        for wanted in self._wanted.values():
            if not wanted.acknowledged and wanted.retry_at <= now:
                return wanted.put
        return None

    def next_retry(self) -> float | None:
        """Tell when the first of what was refused is to be tried again."""
        times = [wanted.retry_at for wanted in self._wanted.values() if not wanted.acknowledged]
        return min([*times, *(retry_at for _, retry_at in self._unwanted.values())], default=None)

    def acknowledge(self, work: Put | Delete, revision: int = 0, *, ours: bool = True) -> None:
        """Take note that the server did it, or (not `ours`) that the record of somebody else stands there.

        What is wanted may have changed meanwhile, and the record may be gone again already.
        """
        if isinstance(work, Delete):
            self._unwanted.pop(work.key, None)
            return
        wanted = self._wanted.get(work.key)
        if wanted is not None and wanted.put == work:
            wanted.acknowledged = revision > wanted.gone_at
            wanted.ours = ours and wanted.acknowledged
            wanted.revision = revision
            wanted.gone_at = 0  # counts once: a number of another epoch must not have us write for ever

    def refuse(self, work: Put | Delete, now: float) -> None:
        """Take note that the server will not do it; it is tried again later."""
        if isinstance(work, Delete):
            if work.key in self._unwanted:
                self._unwanted[work.key] = (work, now + RETRY_REFUSED_S)
            return
        wanted = self._wanted.get(work.key)
        if wanted is not None:
            wanted.retry_at = now + RETRY_REFUSED_S

    def lease_lost(self) -> None:
        """Take note that our lease has ended: everything that hung on it is to be written again."""
        for wanted in self._wanted.values():
            if wanted.put.leased:
                wanted.acknowledged = False

    def epoch_changed(self) -> None:
        """Take note that the store is another one: it has nothing of ours."""
        self._unwanted.clear()
        for wanted in self._wanted.values():
            wanted.acknowledged = wanted.ours = False
            wanted.revision = wanted.gone_at = 0
            wanted.retry_at = 0.0

    def deleted(self, deletion: Deletion) -> bool:
        """Take note that the store says that a record is gone; tells whether it was wanted and is to be written again."""
        wanted = self._wanted.get(deletion.key)
        if wanted is None:
            return False
        wanted.gone_at = max(wanted.gone_at, deletion.revision)
        if not wanted.acknowledged or deletion.revision <= wanted.revision:
            return False
        wanted.acknowledged = wanted.ours = False
        return True
