"""The mesh as built from the lines of a watch.

After `reset` all records are sent again, and at `sync` they replace the old view at once. If the epoch has changed (the store
was lost or replaced), records that the new store lacks stay for a grace period: most likely their writers are about to write
them again. The same holds, for a shorter time, for records that were deleted during an outage that was about as long as a lease
or longer: their writers may have been cut off, too. Sans-IO: the caller passes the time.
"""

from collections.abc import Iterable

import msgspec

from discovery.model.mesh import AnyRecord, BadRecord, Deletion, Key, Kind, Mesh, decode_record

GRACE_S = 60.0
"""Six leases: enough time for every writer to find the new store."""

OUTAGE_S = 8.0
"""Shorter than a lease: after a longer outage writers may have lost theirs."""

OUTAGE_GRACE_S = 10.0
"""Writers look for a server at least every 3 s, and then write again at once."""

MAX_LINE = 4 * 1024 * 1024
"""A service with the maximum of ports and endpoints has 2 MB."""

MAX_RECORDS = 500_000

_KINDS = frozenset(map(str, Kind))


class BadWatch(ValueError):
    """A server sent data that is not a valid watch."""


class _Name(msgspec.Struct, frozen=True):
    kind: str
    network: str
    id: str


class _Line(msgspec.Struct, frozen=True):
    revision: int
    type: str
    record: msgspec.Raw = msgspec.Raw()
    epoch: str | None = None
    more: bool = False
    age_s: float = 0.0


class View:
    """The client's view of the mesh, and the revision from which it resumes."""

    def __init__(
        self, grace_s: float = GRACE_S, outage_grace_s: float = OUTAGE_GRACE_S, max_records: int = MAX_RECORDS
    ) -> None:
        """Start with an empty mesh, not synced."""
        self._max_records = max_records
        self._outage_grace_s = outage_grace_s
        self._lost_at: float | None = None
        self._after_outage = False  # from the first line after an outage until `sync`
        self.mesh = Mesh.EMPTY
        self.synced = False
        self.epoch: str | None = None
        self.revision: int | None = None
        """Revision to resume from; None to get all records."""

        self.fields: frozenset[str] = frozenset()
        """The negotiated fields that the records have: those that both we and the server know, which sent them."""

        self.live = False
        """Whether the watch has sent everything up to now."""

        self.known_at = 0.0
        """Unix time at which a server last confirmed the mesh; the owner sets it."""

        self.stale_s = 0.0
        """Seconds for which the server's store has not been confirmed to be current."""

        self.skipped = 0
        """Records that this version could not read."""

        self._grace_s = grace_s
        self._rest = b""
        self._pending: list[AnyRecord | Deletion] = []
        self._fresh: dict[Key, AnyRecord] | None = None
        self._unconfirmed: dict[Key, float] = {}

    def restore(self, mesh: Mesh, epoch: str, revision: int, fields: frozenset[str] = frozenset()) -> None:
        """Start with a saved mesh, whose records have these negotiated fields."""
        self.fields = fields
        self.mesh = mesh.at(revision)
        self.epoch, self.revision = epoch, revision
        self.synced = True

    def feed(self, data: bytes, now: float) -> list[Deletion]:
        """Apply a chunk of the stream. Returns the deletions in it. Raises BadWatch.

        The mesh is rebuilt once for the whole chunk.
        """
        deletions: list[Deletion] = []
        self._after_outage = not self.live and self._lost_at is not None and now - self._lost_at > OUTAGE_S
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(len(self._rest), *map(len, lines), 0) > MAX_LINE:
            raise BadWatch(f"a line has more than {MAX_LINE} bytes")
        for line in lines:
            if line:
                self._line(line, now, deletions)
            else:
                self.stale_s = 0.0
        self._flush()
        return deletions

    def want_all(self) -> None:
        """Do not resume: the next watch sends all records."""
        self.revision = None

    def ended(self, now: float = 0.0) -> None:
        """Note that the watch has ended. An incomplete `reset` is dropped."""
        if self.live:
            self._lost_at = now
        self.live = False
        self.stale_s = 0.0
        self._rest = b""
        self._fresh = None

    def confirmed(self) -> Iterable[AnyRecord]:
        """Return the records that the current store has, without those in a grace period."""
        return (record for record in self.mesh if record.key not in self._unconfirmed)

    def next_expiry(self) -> float | None:
        """Return when the first grace period ends, None if there is none."""
        return min(self._unconfirmed.values(), default=None)

    def expire(self, now: float) -> None:
        """Drop records whose grace period has ended."""
        gone = [key for key, deadline in self._unconfirmed.items() if deadline <= now]
        for key in gone:
            del self._unconfirmed[key]
        self._pending.extend(Deletion(key, self.mesh.revision) for key in gone)
        self._flush()

    def _line(self, data: bytes, now: float, deletions: list[Deletion]) -> None:
        try:
            line = msgspec.json.decode(data, type=_Line)
            if line.type == "put":
                self._put(decode_record(line.record))
            elif line.type == "delete":
                name = msgspec.json.decode(line.record, type=_Name)
                if name.kind in _KINDS:
                    deletion = Deletion((Kind(name.kind), name.network, name.id), line.revision)
                    self._delete(deletion, now)
                    deletions.append(deletion)
            elif line.type == "reset":
                self.live = False
                self._fresh = {}
                return
            elif line.type == "sync" and line.epoch is not None:
                self._sync(line.revision, line.epoch, now)
            elif line.type == "stale":
                self.stale_s = max(0.0, line.age_s)
                return
        except BadRecord:
            # A kind or field of a newer server. The other lines are valid all the same.
            self.skipped += 1
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadWatch(f"a line is not a valid change: {str(error)[:200]}") from None
        if self._fresh is None and self.revision is not None and not line.more:
            self.revision = max(self.revision, line.revision)

    def _put(self, record: AnyRecord) -> None:
        if self._fresh is not None:
            self._fresh[record.key] = record
            if len(self._fresh) > self._max_records:
                raise BadWatch(f"there are more than {self._max_records} records")
            return
        self._unconfirmed.pop(record.key, None)
        self._pending.append(record)

    def _delete(self, deletion: Deletion, now: float) -> None:
        if self._fresh is not None:
            self._fresh.pop(deletion.key, None)
            return
        if self._after_outage and self.mesh.record(*deletion.key) is not None:
            self._unconfirmed.setdefault(deletion.key, now + self._outage_grace_s)
            return
        self._unconfirmed.pop(deletion.key, None)
        self._pending.append(deletion)

    def _sync(self, revision: int, epoch: str, now: float) -> None:
        fresh, self._fresh = self._fresh, None
        if fresh is not None:
            other_epoch = self.epoch is not None and epoch != self.epoch
            self._flush()
            for record in self.mesh:
                key = record.key
                if key in fresh:
                    self._unconfirmed.pop(key, None)
                elif other_epoch:
                    self._unconfirmed.setdefault(key, now + self._grace_s)
                elif self._after_outage:
                    self._unconfirmed.setdefault(key, now + self._outage_grace_s)
                elif key not in self._unconfirmed:
                    self._pending.append(Deletion(key, revision))
            self._pending.extend(record for key, record in fresh.items() if self.mesh.record(*key) != record)
        self._flush()
        self.mesh = self.mesh.at(revision)
        self.epoch, self.revision = epoch, revision
        self.synced = self.live = True
        self._after_outage = False

    def _flush(self) -> None:
        if self._pending:
            self.mesh = self.mesh.apply(self._pending)
            self._pending.clear()
