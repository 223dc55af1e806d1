"""Watchers: send each change of the store to all readers, as each of them may see it.

A watcher's queue is bounded. A reader that does not keep up gets `reset` and is cut off; it then reads everything again, and
the others are not affected. A line is encoded once for all readers that may see the same of it and know the same fields.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from discovery.api.tokens import OPEN, SEEN_BY_ALL, Principal, redacted
from discovery.model.mesh import AnyRecord, Deletion, Kind, Record
from discovery.model.spec import with_fields
from discovery.store import Change, Snapshot, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchLimits:
    """Limits of one watcher's queue."""

    queued_lines: int = 10_000
    queued_bytes: int = 8 * 1024 * 1024
    batch_bytes: int = 64 * 1024
    """Size of one write, exceeded by one line at most. A slow reader holds up this much."""


LIMITS = WatchLimits()


class NoRoom(Exception):
    """The limit of open watches is reached."""


class _Name(msgspec.Struct, frozen=True):
    kind: Kind
    network: str
    id: str


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    revision: int
    type: Literal["put", "delete", "sync", "reset", "stale"]
    record: AnyRecord | _Name | None = None
    epoch: str | None = None
    more: bool = False
    """More lines of the same revision follow. A reader that resumed from this revision would miss them."""

    age_s: float | None = None


def mark_stale(revision: int, age_s: float) -> bytes:
    """Encode the heartbeat of a server whose store has not been confirmed to be current for `age_s` seconds."""
    return msgspec.json.encode(_Line(revision=revision, type="stale", age_s=round(age_s, 1))) + b"\n"


def mark(kind: Literal["sync", "reset"], revision: int, epoch: str) -> bytes:
    """Encode the line that ends a backlog (`sync`), or that announces that everything is sent again (`reset`)."""
    return msgspec.json.encode(_Line(revision=revision, type=kind, epoch=epoch)) + b"\n"


class _Lines:
    """The encodings of one change: for readers who see all of its network and for others, each by the fields that they know."""

    __slots__ = ("_change", "_encoded", "_more", "network", "revision")

    def __init__(self, change: Change, more: bool) -> None:
        self._change = change
        self._more = more
        self._encoded: dict[tuple[bool, frozenset[str]], bytes] = {}
        self.network = change.key[1]
        self.revision = change.revision

    def for_reader(self, principal: Principal, fields: frozenset[str]) -> bytes:
        """Return the line as a reader may see it; empty if the reader may not see the change."""
        whole = principal.sees_all_of(self.network)
        line = self._encoded.get((whole, fields))
        if line is None:
            line = self._encoded[whole, fields] = self._encode(whole, fields)
        return line

    def _encode(self, whole: bool, fields: frozenset[str]) -> bytes:
        visible: Change | None = self._change
        if not whole:
            if isinstance(visible, Record):
                visible = redacted(visible)
            elif self._change.key[0] not in SEEN_BY_ALL:
                visible = None
        if isinstance(visible, Record) and (spec := with_fields(visible.spec, fields)) is not visible.spec:
            visible = msgspec.structs.replace(visible, spec=spec)
        return _encode(visible, self._more) if visible is not None else b""


def _encode(change: Change, more: bool) -> bytes:
    if isinstance(change, Deletion):
        line = _Line(revision=change.revision, type="delete", record=_Name(*change.key), more=more)
    else:
        line = _Line(revision=change.revision, type="put", record=change, more=more)
    return msgspec.json.encode(line) + b"\n"


def _lines(changes: Sequence[Change]) -> Iterator[_Lines]:
    for index, change in enumerate(changes):
        more = index + 1 < len(changes) and changes[index + 1].revision == change.revision
        yield _Lines(change, more)


class Watcher:
    """The bounded queue of one reader."""

    __slots__ = ("_bytes", "_limits", "_lines", "_wake", "closed", "fields", "overrun", "principal")

    def __init__(self, principal: Principal, fields: frozenset[str], limits: WatchLimits) -> None:
        self.principal = principal
        self.fields = fields
        self._limits = limits
        self.overrun = False
        self.closed = False
        self._lines: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()

    def offer(self, revision: int, line: bytes) -> None:
        """Queue a line. If the reader is too far behind, drop its queue and mark it as overrun."""
        if self.overrun:
            return
        self._lines.append((revision, line))
        self._bytes += len(line)
        if len(self._lines) > self._limits.queued_lines or self._bytes > self._limits.queued_bytes:
            self.overrun = True
            self._lines.clear()
        self._wake.set()

    def close(self) -> None:
        """End the watch once the queue has been sent."""
        self.closed = True
        self._wake.set()

    def next_batch(self, after: int) -> bytes:
        """Remove and return the next lines, up to `batch_bytes`, without those up to revision `after`, which the reader has."""
        taken: list[bytes] = []
        size = 0
        while self._lines and size < self._limits.batch_bytes:
            revision, line = self._lines.popleft()
            self._bytes -= len(line)
            if revision > after:
                taken.append(line)
                size += len(line)
        if not self._lines and not (self.closed or self.overrun):
            self._wake.clear()
        return b"".join(taken)

    async def wait(self) -> None:
        """Wait until lines are queued or the watch ends."""
        await self._wake.wait()


class WatchHub:
    """All watchers of a store."""

    def __init__(
        self, store: Store, *, most: int = 2000, most_per_network: int = 1000, limits: WatchLimits = LIMITS
    ) -> None:
        """Subscribe to the store. `most` and `most_per_network` limit the number of readers."""
        self.most, self.most_per_network = most, most_per_network
        """May be changed at any time; open watches stay."""
        self._limits = limits
        self._store = store
        self._watchers: dict[Watcher, None] = {}  # in order of arrival
        self.on_displaced: Callable[[], None] = lambda: None
        # Cache of what new readers get, by network: after a restart all readers connect at once.
        self._groups: dict[str, list[AnyRecord]] | None = None
        self._encoded: dict[tuple[str, bool, frozenset[str]], bytes] = {}
        self._stop = store.subscribe(self._on_changes)

    def __len__(self) -> int:
        return len(self._watchers)

    def add(self, principal: Principal, fields: frozenset[str] = frozenset()) -> Watcher:
        """Start to queue changes for a reader, who knows these negotiated fields. Raises NoRoom.

        If a limit is reached, a newcomer that has fewer watches replaces the latest watch of the token (within its network) or
        network (in total) that has the most. So no client can keep others out.
        """
        self._make_room(principal, [each for each in self._watchers if not each.closed])
        watcher = Watcher(principal, fields, self._limits)
        self._watchers[watcher] = None
        return watcher

    def _make_room(self, principal: Principal, open_now: list[Watcher]) -> None:
        of_network = [each for each in open_now if each.principal.network == principal.network]
        most = self.most if principal is OPEN else self.most_per_network
        if len(of_network) >= most:
            what = f"{most} watches of network {principal.network!r}"
            self._displace(of_network, principal.owner, lambda each: each.owner, what)
        elif len(open_now) >= self.most:
            self._displace(open_now, principal.network, lambda each: each.network, f"{self.most} watches")

    def _displace(
        self, among: list[Watcher], newcomer: str | None, group: Callable[[Principal], str | None], what: str
    ) -> None:
        counts = Counter(group(watcher.principal) for watcher in among)
        largest, count = counts.most_common(1)[0]
        if counts[newcomer] + 1 >= count:
            raise NoRoom(f"{what} are open, which is the limit")
        latest = next(each for each in reversed(among) if group(each.principal) == largest)
        latest.close()
        self.on_displaced()

    def remove(self, watcher: Watcher) -> None:
        """Stop queueing changes for a reader."""
        self._watchers.pop(watcher, None)

    def keep(self, wanted: Callable[[Principal], bool]) -> int:
        """End the watches of all readers for which `wanted` returns False. Returns their number."""
        ended = [watcher for watcher in self._watchers if not wanted(watcher.principal)]
        for watcher in ended:
            watcher.close()
        return len(ended)

    def close(self) -> None:
        """Unsubscribe from the store, and end all watches."""
        self._stop()
        for watcher in self._watchers:
            watcher.close()

    async def backlog(
        self, principal: Principal, revision: int | None, epoch: str | None, fields: frozenset[str] = frozenset()
    ) -> tuple[int, Iterator[bytes]]:
        """Return the revision that the reader will have, and the lines that it has missed, in batches that end with `sync`.

        A reader without a revision, with another epoch, or with a revision for which the store has no history gets
        `reset` and then all records.
        """
        changes: Sequence[Change] | None = None
        if revision is not None and epoch in (None, self._store.epoch):
            changes = await self._store.since(revision)
        if changes is not None:
            current = max([revision or 0, *(change.revision for change in changes)])
            return current, self._batches((lines.for_reader(principal, fields) for lines in _lines(changes)), current)
        snapshot = await self._store.snapshot()
        pieces = self._everything(principal, fields, snapshot)
        return snapshot.revision, self._batches(
            [mark("reset", snapshot.revision, self._store.epoch), *pieces], snapshot.revision
        )

    def _everything(self, principal: Principal, fields: frozenset[str], snapshot: Snapshot) -> list[bytes]:
        """Return all lines, in one piece for each network. Never awaits, so that cached pieces stay current."""
        if self._groups is None:
            self._groups = {}
            for record in snapshot.records:
                self._groups.setdefault(record.network, []).append(record)
        pieces = []
        for network, records in self._groups.items():
            place = (network, principal.sees_all_of(network), fields)
            encoded = self._encoded.get(place)
            if encoded is None:
                encoded = self._encoded[place] = b"".join(
                    _Lines(record, False).for_reader(principal, fields) for record in records
                )
            pieces.append(encoded)
        return pieces

    def _batches(self, pieces: Iterable[bytes], revision: int) -> Iterator[bytes]:
        batch: list[bytes] = []
        size = 0
        for piece in pieces:
            batch.append(piece)
            size += len(piece)
            if size >= self._limits.batch_bytes:
                yield b"".join(batch)
                batch.clear()
                size = 0
        yield b"".join(batch) + mark("sync", revision, self._store.epoch)

    def _on_changes(self, changes: Sequence[Change]) -> None:
        self._groups = None
        changed = {change.key[1] for change in changes}
        for place in [place for place in self._encoded if place[0] in changed]:
            del self._encoded[place]
        for lines in _lines(changes):
            for watcher in self._watchers:
                line = lines.for_reader(watcher.principal, watcher.fields)
                if line:
                    watcher.offer(lines.revision, line)
