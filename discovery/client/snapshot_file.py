"""The copy of the mesh on disk, from which a client starts while discovery is down.

The first line is the SHA-256 of the rest: a header in JSON, then one record on each line. A truncated or modified file is
renamed and not used at all.
"""

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from discovery.client.view import View
from discovery.model.mesh import AnyRecord, BadRecord, Mesh, decode_record

log = logging.getLogger(__name__)

FORMAT = 1
SAVE_EVERY_S = 5.0
MAX_SNAPSHOT = 256 * 1024 * 1024


class _Header(msgspec.Struct, kw_only=True):
    format: int
    network: str
    epoch: str
    revision: int
    saved_at: float
    fields: list[str] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCopy:
    """A mesh as it was saved."""

    network: str
    """Network of the process that saved it. Each network sees others differently than they see themselves."""

    epoch: str
    revision: int
    saved_at: float
    """Unix time in seconds."""

    records: tuple[AnyRecord, ...]
    fields: frozenset[str] = frozenset()
    """The negotiated fields that the records have."""

    def mesh(self) -> Mesh:
        """Return the mesh that was saved."""
        return Mesh.of(self.records)


def save(
    path: Path,
    network: str,
    epoch: str,
    mesh: Iterable[AnyRecord],
    revision: int,
    now: float,
    fields: frozenset[str] = frozenset(),
) -> None:
    """Replace the copy atomically. `now` is Unix time. Raises OSError. Blocks: run it in a thread."""
    encode = msgspec.json.Encoder().encode
    header = _Header(
        format=FORMAT, network=network, epoch=epoch, revision=revision, saved_at=now, fields=sorted(fields)
    )
    body = b"".join([encode(header), b"\n", *(encode(record) + b"\n" for record in mesh)])
    unfinished = path.with_name(f"{path.name}.new")
    with _saving:
        _replace(path, unfinished, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


# A save that was cancelled may still be running in its thread when the next one starts.
_saving = threading.Lock()


def _replace(path: Path, unfinished: Path, data: bytes) -> None:
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def load(path: Path, network: str, *, set_aside: bool = True) -> DiskCopy | None:
    """Load the copy. Returns None if there is none, or, with a line in the log, if it is unusable or of another network.

    A damaged file gets the suffix `.bad`, so that the next save does not overwrite the evidence; without `set_aside` it stays.
    """
    try:
        if path.stat().st_size > MAX_SNAPSHOT:
            raise _Damaged(f"has more than {MAX_SNAPSHOT} bytes")
        data = path.read_bytes()
        copy = _parse(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("the snapshot %s cannot be read: %s", path, error.strerror or error)
        return None
    except _Damaged as error:
        if not set_aside:
            log.warning("the snapshot %s %s", path, error)
            return None
        aside = path.with_name(path.name + ".bad")
        try:
            path.replace(aside)
        except OSError as failure:
            log.warning("the snapshot %s %s, and cannot be set aside: %s", path, error, failure)
        else:
            log.warning("the snapshot %s %s: set aside as %s", path, error, aside)
        return None
    if copy.network != network:
        log.warning("the snapshot %s is of network %s, not of %s: not used", path, copy.network, network)
        return None
    return copy


class SnapshotKeeper:
    """Saves a view to disk while `run` runs. Without a path it does nothing."""

    def __init__(
        self, path: Path | None, network: str, view: View, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._network = network
        self._view = view
        self._wall_clock = wall_clock
        self._changed = asyncio.Event()

    async def restore(self) -> bool:
        """Restore the view from the copy, if there is one and no server was faster. Returns whether it was restored."""
        copy = await asyncio.to_thread(load, self._path, self._network) if self._path is not None else None
        if copy is None or self._view.synced:
            return False
        self._view.restore(copy.mesh(), copy.epoch, copy.revision, copy.fields)
        self._view.known_at = copy.saved_at
        event = {"records": len(copy.records), "age_s": round(self._wall_clock() - copy.saved_at)}
        log.info("the mesh was restored from its snapshot", extra={"event": event})
        return True

    def changed(self) -> None:
        """Note that the copy is out of date."""
        self._changed.set()

    async def run(self) -> None:
        """Save after changes, at most once every SAVE_EVERY_S, until cancelled."""
        while self._path is not None:
            await self._changed.wait()
            await self._save(self._path)
            await asyncio.sleep(SAVE_EVERY_S)

    async def save_if_needed(self) -> None:
        """Save now if the copy is out of date."""
        if self._path is not None and self._changed.is_set():
            await self._save(self._path)

    async def _save(self, path: Path) -> None:
        view = self._view
        if view.epoch is None or view.revision is None:
            return
        self._changed.clear()
        records = tuple(view.confirmed())
        try:
            await asyncio.to_thread(
                save, path, self._network, view.epoch, records, view.revision, view.known_at, view.fields
            )
        except OSError as error:
            log.warning("the mesh cannot be saved in %s: %s", path, error.strerror or error)


class _Damaged(Exception):
    """A file that `save` has not written in this form."""


def _parse(data: bytes) -> DiskCopy:
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise _Damaged("is damaged: its checksum is wrong")
    first, _, lines = body.partition(b"\n")
    try:
        header = msgspec.json.decode(first, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _Damaged("has no header") from None
    if header.format != FORMAT:
        raise _Damaged(f"has format {header.format}, this version reads {FORMAT}")
    try:
        records = tuple(decode_record(line) for line in lines.splitlines())
    except BadRecord as error:
        raise _Damaged(f"has content that this version cannot read: {error}") from None
    return DiskCopy(
        network=header.network,
        epoch=header.epoch,
        revision=header.revision,
        saved_at=header.saved_at,
        records=records,
        fields=frozenset(header.fields),
    )
