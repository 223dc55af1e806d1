"""The store in one SQLite file. All records are also in memory, and each write is on disk before any reader sees it.

The file is locked while the store is open, since two servers with one file would not see each other's writes. It is in WAL
mode with synchronous=FULL: a commit survives kill -9 and a power cut. Renewals of leases are not written; after a start all
leases have their full TTL.
"""

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from discovery.model.mesh import AnyRecord, BadRecord, Kind, Record, decode_spec
from discovery.store.base import Lease, StoreError
from discovery.store.memory import MAX_TOMBSTONES, Batch, MemoryStore

log = logging.getLogger(__name__)

APPLICATION_ID = 0x63_6E_65_74  # "cnet": identifies the file among SQLite databases
SCHEMA_VERSION = 1

_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE records (
        kind TEXT NOT NULL, network TEXT NOT NULL, id TEXT NOT NULL,
        revision INTEGER NOT NULL, lease TEXT, spec BLOB NOT NULL, PRIMARY KEY (kind, network, id)
    ) WITHOUT ROWID""",
    """CREATE TABLE tombstones (
        kind TEXT NOT NULL, network TEXT NOT NULL, id TEXT NOT NULL,
        revision INTEGER NOT NULL, PRIMARY KEY (kind, network, id)
    ) WITHOUT ROWID""",
    "CREATE TABLE leases (id TEXT PRIMARY KEY, ttl_s INTEGER NOT NULL, owner TEXT NOT NULL) WITHOUT ROWID",
)


class SqliteStore(MemoryStore):
    """Records in one SQLite file."""

    def __init__(
        self, path: Path, *, clock: Callable[[], float] = time.monotonic, max_tombstones: int = MAX_TOMBSTONES
    ) -> None:
        """`open` creates the file if it does not exist."""
        super().__init__(clock=clock, max_tombstones=max_tombstones)
        self._path = path
        self._database: sqlite3.Connection | None = None
        # One thread: a connection may be used by only one at a time. Not the loop's, which a slow disk must not block.
        self._thread: ThreadPoolExecutor | None = None

    async def open(self) -> None:
        """Open or create the file and load it. Raises StoreError."""
        self._thread = ThreadPoolExecutor(1, "discovery-store")
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the file. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        async with self._writing:  # wait for a write in progress
            await asyncio.get_running_loop().run_in_executor(thread, self._close)
        thread.shutdown(wait=False)

    def _persist(self, batch: Batch) -> asyncio.Future[None]:
        if self._thread is None:
            raise StoreError(f"{self._path} is closed")
        return asyncio.get_running_loop().run_in_executor(self._thread, self._commit, batch)

    # The methods below run in the thread.

    def _load(self) -> None:
        try:
            database = self._connect()
            meta = dict(database.execute("SELECT name, value FROM meta"))
            self._epoch = meta["epoch"]
            self._revision, self._compacted = int(meta["revision"]), int(meta["compacted"])
            for lease_id, ttl_s, owner in database.execute("SELECT id, ttl_s, owner FROM leases"):
                self._restore_lease(Lease(id=lease_id, ttl_s=ttl_s, owner=owner))
            rows = database.execute("SELECT kind, network, id, revision, lease, spec FROM records")
            for kind, network, record_id, revision, lease, spec in rows:
                record: AnyRecord = Record(
                    kind=Kind(kind),
                    network=network,
                    id=record_id,
                    revision=revision,
                    lease=lease,
                    spec=decode_spec(Kind(kind), spec),
                )
                self._restore_record(record)
            rows = database.execute("SELECT kind, network, id, revision FROM tombstones ORDER BY revision")
            for kind, network, record_id, revision in rows:
                self._tombstones[Kind(kind), network, record_id] = revision
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {_explained(error)}") from error
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be opened: {error.strerror or error}") from error
        except (BadRecord, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self._path}: has content that this version cannot read: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        # Created here and not by SQLite, so that other users can never read the file, nor SQLite's log next to it.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(self._path, timeout=0.2, isolation_level=None, check_same_thread=False)
        self._database = database
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        application = database.execute("PRAGMA application_id").fetchone()[0]
        version = database.execute("PRAGMA user_version").fetchone()[0]
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables == 0:
            # All in one transaction: if the process is killed in between, the file stays empty.
            database.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                database.execute(statement)
            values = [("epoch", self._epoch), ("revision", "0"), ("compacted", "0")]
            database.executemany("INSERT INTO meta VALUES (?, ?)", values)
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            database.execute("COMMIT")
        elif application != APPLICATION_ID:
            raise StoreError(f"{self._path}: is an SQLite database, but not one of a discovery server")
        elif version != SCHEMA_VERSION:
            raise StoreError(f"{self._path}: has schema {version}, this version reads {SCHEMA_VERSION}")
        return database

    def _commit(self, batch: Batch) -> None:
        database = self._database
        if database is None:
            raise StoreError(f"{self._path} is closed")
        try:
            database.execute("BEGIN IMMEDIATE")
            self._execute(database, batch)
            database.execute("COMMIT")
        except sqlite3.Error as error:
            log.error("the store cannot be written: %s", error)
            raise StoreError(f"{self._path}: {_explained(error)}") from error
        finally:
            if database.in_transaction:  # SQLite has already rolled back if the disk is full
                database.execute("ROLLBACK")

    def _execute(self, database: sqlite3.Connection, batch: Batch) -> None:
        database.executemany(
            "UPDATE meta SET value = ? WHERE name = ?",
            [(str(batch.revision), "revision"), (str(batch.compacted), "compacted")],
        )
        database.executemany("DELETE FROM tombstones WHERE kind = ? AND network = ? AND id = ?", batch.forgotten)
        if batch.granted is not None:
            lease = batch.granted
            database.execute("INSERT INTO leases VALUES (?, ?, ?)", (lease.id, lease.ttl_s, lease.owner))
        for record in batch.puts:
            spec = msgspec.json.encode(record.spec)
            database.execute("DELETE FROM tombstones WHERE kind = ? AND network = ? AND id = ?", record.key)
            database.execute(
                "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?)",
                (*record.key, record.revision, record.lease, spec),
            )
        keys = [deletion.key for deletion in batch.deletions]
        database.executemany("DELETE FROM records WHERE kind = ? AND network = ? AND id = ?", keys)
        database.executemany(
            "INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?, ?)",
            [(*deletion.key, deletion.revision) for deletion in batch.deletions],
        )
        database.executemany("DELETE FROM leases WHERE id = ?", [(lease_id,) for lease_id in batch.revoked])

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


def _explained(error: sqlite3.Error) -> str:
    """Describe an error of SQLite for an operator."""
    text = str(error)
    if "locked" in text:
        return "is in use by another process"
    if "not a database" in text or "malformed" in text:
        return (
            f"is damaged or not an SQLite database ({text}): restore it, or move it away to start with an empty store"
        )
    return text
