"""Where records live: memory and SQLite, behind one interface and one contract test."""

from discovery.store.base import (
    Change,
    Lease,
    PreconditionFailed,
    Snapshot,
    Store,
    StoreError,
    UnknownLease,
)
from discovery.store.memory import MemoryStore
from discovery.store.sqlite import SqliteStore

__all__ = [
    "Change",
    "Lease",
    "MemoryStore",
    "PreconditionFailed",
    "Snapshot",
    "SqliteStore",
    "Store",
    "StoreError",
    "UnknownLease",
]
