"""Stores of records: memory, SQLite and etcd, behind one interface that one contract test checks."""

from discovery.store.base import (
    Change,
    Lease,
    PreconditionFailed,
    Snapshot,
    Store,
    StoreError,
    UnknownLease,
)
from discovery.store.etcd import EtcdStore
from discovery.store.etcdapi import EtcdAccess, EtcdTiming
from discovery.store.memory import MemoryStore
from discovery.store.sqlite import SqliteStore

__all__ = [
    "Change",
    "EtcdAccess",
    "EtcdStore",
    "EtcdTiming",
    "Lease",
    "MemoryStore",
    "PreconditionFailed",
    "Snapshot",
    "SqliteStore",
    "Store",
    "StoreError",
    "UnknownLease",
]
