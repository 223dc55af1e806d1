"""The layout of a mesh in etcd: which keys there are, and how records and leases are encoded below them.

PREFIX epoch                          the store's identity, written once
PREFIX records/KIND/NETWORK/ID        a spec, attached to an etcd lease if the record has one
PREFIX leases/ID                      owner and TTL of a lease, attached to that lease itself
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from discovery.model.mesh import AnyRecord, BadRecord, Key, Kind, Record, Spec, check_key, decode_spec
from discovery.store.base import Lease, UnknownLease
from discovery.store.etcdapi import bytes_of, number_of, text_of

log = logging.getLogger(__name__)


class _LeaseValue(msgspec.Struct):
    owner: str
    ttl_s: int


class EtcdKeys:
    """The keys below one prefix. Keys and values are in base64, as in etcd's JSON gateway."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.epoch = text_of(f"{prefix}epoch")

    def record(self, key: Key) -> str:
        """Return the key of a record."""
        return text_of(self._prefix + "records/" + "/".join(key))

    def lease(self, lease_id: str) -> str:
        """Return the key of a lease."""
        return text_of(f"{self._prefix}leases/{lease_id}")

    def lease_or_record(self, kv: Mapping[str, Any]) -> str | Key | None:
        """Return the lease id (str) or record key (tuple) that an etcd key belongs to, None if neither."""
        parts = self._parts(kv)
        if parts[0] == "leases" and len(parts) == 2:
            return parts[1]
        return _record_key(parts)

    def item(self, kv: Mapping[str, Any]) -> AnyRecord | Lease | None:
        """Decode the lease or record under a key. Returns None for the epoch, and for invalid or foreign keys, which are logged."""
        parts = self._parts(kv)
        if parts == ["epoch"]:
            return None
        found = self.lease_or_record(kv)
        try:
            if isinstance(found, str):
                return lease_of(found, kv)
            if found is not None:
                return _record(found, kv)
        except (BadRecord, msgspec.MsgspecError) as error:
            log.warning("etcd has a key that cannot be read", extra={"event": {"key": parts, "why": str(error)[:200]}})
            return None
        log.warning("etcd has a key that is not ours", extra={"event": {"key": "/".join(parts)[:200]}})
        return None

    def _parts(self, kv: Mapping[str, Any]) -> list[str]:
        return bytes_of(kv.get("key")).decode(errors="replace").removeprefix(self._prefix).split("/")


def encode_spec(spec: Spec) -> str:
    """Encode the value of a record."""
    return text_of(msgspec.json.encode(spec))


def encode_lease(lease: Lease) -> str:
    """Encode the value of a lease."""
    return text_of(msgspec.json.encode(_LeaseValue(lease.owner, lease.ttl_s)))


def lease_of(lease_id: str, kv: Mapping[str, Any]) -> Lease:
    """Decode a lease. Raises msgspec.MsgspecError, EtcdError."""
    value = msgspec.json.decode(bytes_of(kv.get("value")), type=_LeaseValue)
    return Lease(id=lease_id, ttl_s=value.ttl_s, owner=value.owner)


def lease_id_of(number: int) -> str:
    """Return our id of an etcd lease: its number in hexadecimal."""
    return f"{number:x}"


def lease_number(lease_id: str) -> int:
    """Return etcd's number of a lease. Raises UnknownLease for an id that etcd cannot have made."""
    try:
        number = int(lease_id, 16)
    except ValueError:
        raise UnknownLease(lease_id) from None
    if not 0 < number < 1 << 63:
        raise UnknownLease(lease_id)
    return number


def _record_key(parts: Sequence[str]) -> Key | None:
    if len(parts) != 4 or parts[0] != "records":
        return None
    try:
        kind = Kind(parts[1])
        check_key(kind, parts[2], parts[3])
    except ValueError:
        return None
    return (kind, parts[2], parts[3])


def _record(key: Key, kv: Mapping[str, Any]) -> AnyRecord:
    kind, network, record_id = key
    attached_to = number_of(kv, "lease")
    return Record(
        kind=kind,
        network=network,
        id=record_id,
        revision=number_of(kv, "mod_revision"),
        lease=lease_id_of(attached_to) if attached_to else None,
        spec=decode_spec(kind, bytes_of(kv.get("value"))),
    )
