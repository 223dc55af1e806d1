"""Records, and the mesh of all records.

A Mesh is an immutable view of all records. Applying changes returns a new one that shares all unchanged parts with the old one,
so readers need no locks and never see half a change. Sans-IO.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, cast

import msgspec

from discovery.model.spec import (
    SPEC_TYPES,
    AllocationSpec,
    BadRecord,
    GatewaySpec,
    Kind,
    NetworkSpec,
    RelaySpec,
    ServiceSpec,
    Spec,
    TurnSpec,
    VipSpec,
    check_key,
    check_spec,
    decode_spec,
    service_id,
)

__all__ = [
    "SPEC_TYPES",
    "AllocationSpec",
    "AnyRecord",
    "BadRecord",
    "Deletion",
    "GatewaySpec",
    "Key",
    "Kind",
    "Mesh",
    "NetworkSpec",
    "Record",
    "RelaySpec",
    "ServiceSpec",
    "Spec",
    "TurnSpec",
    "VipSpec",
    "check_key",
    "check_spec",
    "decode_record",
    "decode_spec",
    "service_id",
]

Key: TypeAlias = tuple[Kind, str, str]
"""Kind, network and id, which identify a record."""

SpecT = TypeVar("SpecT")
SpecT_co = TypeVar("SpecT_co", covariant=True)


class Record(msgspec.Struct, Generic[SpecT_co], frozen=True, kw_only=True):
    """One record. `revision` is the store's revision of its last write. Without a lease it stays until it is deleted."""

    kind: Kind
    network: str
    id: str
    revision: int
    lease: str | None = None
    spec: SpecT_co

    @property
    def key(self) -> Key:
        """Kind, network and id."""
        return (self.kind, self.network, self.id)


AnyRecord: TypeAlias = Record[Any]


@dataclass(frozen=True, slots=True)
class Deletion:
    """The deletion of a record, as a change."""

    key: Key
    revision: int


class _Undecoded(msgspec.Struct, frozen=True):
    kind: Kind
    network: str
    id: str
    revision: int
    spec: msgspec.Raw
    lease: str | None = None


def decode_record(data: bytes | msgspec.Raw) -> AnyRecord:
    """Decode a record from JSON, with the spec type of its kind. Raises BadRecord.

    Unknown fields of the record itself are ignored, so that newer servers can add some. The key is checked. The values of the
    spec are not: the server has checked them, with the addresses that it was configured to allow.
    """
    try:
        raw = msgspec.json.decode(data, type=_Undecoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRecord("$", f"expected a record: {str(error)[:200]}") from None
    check_key(raw.kind, raw.network, raw.id)
    return Record(
        kind=raw.kind,
        network=raw.network,
        id=raw.id,
        revision=raw.revision,
        lease=raw.lease,
        spec=decode_spec(raw.kind, raw.spec),
    )


class _Bucket:
    """The records of one kind and network, with indexes that are built on first use."""

    def __init__(self, records: dict[str, AnyRecord]) -> None:
        self.records = records

    @cached_property
    def ordered(self) -> tuple[AnyRecord, ...]:
        return tuple(self.records[record_id] for record_id in sorted(self.records))

    @cached_property
    def by_name(self) -> dict[str, Record[ServiceSpec]]:
        names: dict[str, Record[ServiceSpec]] = {}
        for record in self.ordered:  # of two records with the same name the first by id is used, by all processes
            names.setdefault(record.spec.name, record)
        return names

    @cached_property
    def members(self) -> dict[str, tuple[Record[ServiceSpec], ...]]:
        members: dict[str, list[Record[ServiceSpec]]] = {}
        for record in self.by_name.values():
            if record.spec.member_of:
                members.setdefault(record.spec.member_of, []).append(record)
        return {of: tuple(sorted(found, key=lambda record: record.spec.name)) for of, found in members.items()}

    @cached_property
    def names(self) -> list[str]:
        return sorted(self.by_name)


_NONE = _Bucket({})


class Mesh:
    """All records at one revision, with indexes. Immutable: `apply` returns the next one."""

    EMPTY: ClassVar["Mesh"]

    __slots__ = ("_buckets", "_networks", "revision")

    def __init__(self, buckets: dict[tuple[Kind, str], _Bucket], revision: int) -> None:
        """Use `Mesh.of` or `apply` to make a mesh."""
        self._buckets = buckets
        self._networks: frozenset[str] | None = None
        self.revision = revision

    @classmethod
    def of(cls, records: Iterable[AnyRecord], revision: int = 0) -> "Mesh":
        """Return a mesh of these records. Its revision is the highest of theirs and `revision`."""
        return cls.EMPTY.apply(records, revision)

    def apply(self, changes: Iterable[AnyRecord | Deletion], revision: int = 0) -> "Mesh":
        """Return the mesh after these changes. The cost depends on the size of the changed kinds and networks, not of the mesh."""
        touched: dict[tuple[Kind, str], dict[str, AnyRecord]] = {}
        highest = max(self.revision, revision)
        for change in changes:
            kind, network, record_id = change.key
            place = (kind, network)
            records = touched.get(place)
            if records is None:
                records = touched[place] = dict(self._buckets.get(place, _NONE).records)
            if isinstance(change, Deletion):
                records.pop(record_id, None)
            else:
                records[record_id] = change
            highest = max(highest, change.revision)
        if not touched and highest == self.revision:
            return self
        buckets = dict(self._buckets)
        for place, records in touched.items():
            if records:
                buckets[place] = _Bucket(records)
            else:
                buckets.pop(place, None)
        return Mesh(buckets, highest)

    def at(self, revision: int) -> "Mesh":
        """Return the same records with another revision, which may be lower after a change of epoch."""
        return self if revision == self.revision else Mesh(self._buckets, revision)

    @property
    def networks(self) -> frozenset[str]:
        """All networks that have a record, or whose TURN servers have an allocation."""
        if self._networks is None:
            found = {network for _, network in self._buckets}
            for (kind, _), bucket in self._buckets.items():
                if kind is Kind.ALLOCATION:
                    found.update(record.spec.via for record in bucket.records.values())
            self._networks = frozenset(found)
        return self._networks

    def relays(self, network: str) -> tuple[Record[RelaySpec], ...]:
        """The relays of a network, in order of id, as in the methods below."""
        return self._all(Kind.RELAY, network)

    def turns(self, network: str) -> tuple[Record[TurnSpec], ...]:
        """The TURN servers in a network."""
        return self._all(Kind.TURN, network)

    def allocations(self, network: str) -> tuple[Record[AllocationSpec], ...]:
        """The allocations through which a network can be reached."""
        return self._all(Kind.ALLOCATION, network)

    def gateways(self, network: str) -> tuple[Record[GatewaySpec], ...]:
        """The gateways of a network that can be reached directly."""
        return self._all(Kind.GATEWAY, network)

    def vips(self, network: str) -> tuple[Record[VipSpec], ...]:
        """The stable addresses of services in a network."""
        return self._all(Kind.VIP, network)

    def services(self, network: str) -> tuple[Record[ServiceSpec], ...]:
        """The services of a network."""
        return self._all(Kind.SERVICE, network)

    def record(self, kind: Kind, network: str, id: str) -> AnyRecord | None:  # noqa: A002 - the API's word
        """Return one record, None if there is none."""
        return self._buckets.get((kind, network), _NONE).records.get(id)

    def service(self, network: str, name: str) -> Record[ServiceSpec] | None:
        """Return the service of a network with exactly this name, None if there is none."""
        return self._buckets.get((Kind.SERVICE, network), _NONE).by_name.get(name)

    def members(self, network: str, name: str) -> tuple[Record[ServiceSpec], ...]:
        """Return the members of a service of a network, such as the pods of a StatefulSet, in order of name."""
        return self._buckets.get((Kind.SERVICE, network), _NONE).members.get(name, ())

    def services_beginning(self, network: str, prefix: str) -> tuple[Record[ServiceSpec], ...]:
        """Return the services of a network whose name is `prefix` or starts with `prefix` and a dot, in order of name.

        A service that is only another name of one of them is left out.
        """
        bucket = self._buckets.get((Kind.SERVICE, network), _NONE)
        names = bucket.names
        exact = bucket.by_name.get(prefix)
        # In the sorted list the names that start with "prefix." end before "prefix/", since '/' follows '.' in ASCII.
        begin, end = bisect_left(names, prefix + "."), bisect_left(names, prefix + "/")
        beginning = tuple(bucket.by_name[name] for name in names[begin:end])
        found = beginning if exact is None else (exact, *beginning)
        if len(found) > 1 and any(record.spec.alias_of for record in found):
            theirs = {record.spec.name for record in found}
            return tuple(record for record in found if record.spec.alias_of not in theirs)
        return found

    def __iter__(self) -> Iterator[AnyRecord]:
        for place in sorted(self._buckets):
            yield from self._buckets[place].ordered

    def __len__(self) -> int:
        return sum(len(bucket.records) for bucket in self._buckets.values())

    def __repr__(self) -> str:
        return f"<Mesh revision {self.revision}, {len(self)} records>"

    def _all(self, kind: Kind, network: str) -> tuple[Record[SpecT], ...]:
        return cast("tuple[Record[SpecT], ...]", self._buckets.get((kind, network), _NONE).ordered)


Mesh.EMPTY = Mesh({}, 0)
