"""A mesh.yaml instead of a discovery server.

    networks: [{id: a}, {id: b}]
    services: [{name: orders.shop.example, network: b, ports: {8443: ["10.1.0.5:8443"]}}]
    gateways: [{network: b, id: gw-1, address: "10.9.0.1:7443"}]
    relays:   [{network: a, id: relay-1, addresses: ["10.0.0.9"], ports: [443]}]
    vips:     [{network: a, id: v1, name: orders.shop.example, address: 10.200.0.1}]

Local and direct routes work with it. Allocations change all the time, so they need a server. Records that roles of this
process publish are merged in, so that one process with a relay and a resolver needs no records of itself in the file.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from discovery.client.contract import Discovery, DiscoveryError, IssuedCredentials, Subscribers
from discovery.files.fingerprint import FileFingerprint
from discovery.files.yaml_file import BadFile, read_records
from discovery.model.addresses import TargetList
from discovery.model.mesh import SPEC_TYPES, AnyRecord, Deletion, Key, Kind, Mesh, Record, Spec, service_id
from discovery.model.spec import key_faults, spec_faults
from discovery.model.validation import Fault, child, shape_faults, shown

__all__ = ["BadFile", "StaticDiscovery", "format_mesh", "load_mesh"]

log = logging.getLogger(__name__)

RELOAD_S = 2.0
"""How often the file is checked for changes."""

_SECTIONS = {
    "networks": Kind.NETWORK,
    "services": Kind.SERVICE,
    "gateways": Kind.GATEWAY,
    "relays": Kind.RELAY,
    "vips": Kind.VIP,
}


def load_mesh(path: Path, allowed: TargetList | None = None) -> Mesh:
    """Read a mesh.yaml. Raises BadFile with all errors in it.

    A CIDR of `allowed` that lies completely inside a refused range (such as loopback) permits its addresses.
    """
    records, faults = _parse(read_records(path), allowed)
    if faults:
        raise BadFile(str(path), faults)
    return Mesh.of(records, 1)


def format_mesh(records: Iterable[AnyRecord]) -> str:
    """Format records as a mesh.yaml. Kinds that a file cannot have are left out."""
    lines: dict[Kind, list[str]] = {kind: [] for kind in _SECTIONS.values()}
    networks = set()
    for record in sorted(records, key=lambda record: record.key):
        if record.kind not in lines:
            continue
        networks.add(record.network)
        place = {} if record.kind is Kind.NETWORK else {"network": record.network}
        item = {"id": record.id, **place, **msgspec.to_builtins(record.spec)}
        lines[record.kind].append(msgspec.json.encode(item).decode())
    declared = {f'{{"id":"{network}"}}' for network in networks}
    lines[Kind.NETWORK] = sorted(declared.union(lines[Kind.NETWORK]))
    text = ""
    for section, kind in _SECTIONS.items():
        if lines[kind] or kind is Kind.NETWORK:  # JSON is YAML; one record on each line gives readable diffs
            text += f"{section}:{'' if lines[kind] else ' []'}\n" + "".join(f"  - {line}\n" for line in lines[kind])
    return text


class StaticDiscovery(Discovery):
    """Discovery by a file, which is read again when it changes."""

    def __init__(
        self,
        path: Path,
        *,
        network: str | None = None,
        allowed: TargetList | None = None,
        reload_s: float = RELOAD_S,
    ) -> None:
        """Read the file. Roles publish in `network` by default. Raises BadFile with all errors in it."""
        self._path = path
        self._network = network
        self._allowed = allowed
        self._reload_s = reload_s
        self._stamp = FileFingerprint([path])
        self._file = load_mesh(path, allowed)
        self._own: dict[Key, AnyRecord] = {}
        self._mesh = self._file
        self._subscribers = Subscribers()

    @property
    def mesh(self) -> Mesh:
        """The records of the file, and those published in this process."""
        return self._mesh

    @property
    def synced(self) -> bool:
        """Always True: the file was read at the start."""
        return True

    def _replace(self, file: Mesh) -> None:
        self._file = file
        # The file takes precedence over published records: somebody wrote it on purpose.
        own = (record for key, record in self._own.items() if self._file.record(*key) is None)
        self._swap(self._file.apply(own).at(self._mesh.revision + 1))

    def subscribe(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Call `callback` when a role of this process publishes or withdraws something, or when the file changes."""
        return self._subscribers.add(callback)

    def publish(
        self,
        kind: Kind,
        id: str,  # noqa: A002
        spec: Spec,
        *,
        network: str | None = None,
        leased: bool = True,  # noqa: ARG002 - nothing here outlives the process
        if_absent: bool = False,
    ) -> None:
        """Merge a record into the mesh, unless the file has one with its key."""
        key = self._key(kind, id, network)
        known = self._own.get(key)
        if known is not None and (if_absent or known.spec == spec):
            return
        revision = self._mesh.revision + 1
        record: AnyRecord = Record(kind=kind, network=key[1], id=id, revision=revision, spec=spec)
        self._own[key] = record
        if self._file.record(*key) is None:
            self._swap(self._mesh.apply([record]))

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        """Remove a record that `publish` merged in."""
        key = self._key(kind, id, network)
        if self._own.pop(key, None) is not None and self._file.record(*key) is None:
            self._swap(self._mesh.apply([Deletion(key, self._mesh.revision + 1)]))

    async def settled(self, timeout_s: float) -> bool:  # noqa: ARG002
        """Return True at once: records are published immediately."""
        return True

    async def run(self) -> None:
        """Read the file again when it changes, until cancelled. A file with errors is logged and not used."""
        while True:
            await asyncio.sleep(self._reload_s)
            if not self._stamp.has_settled():
                continue
            try:
                file = await asyncio.to_thread(load_mesh, self._path, self._allowed)
            except BadFile as error:
                log.error("the mesh file cannot be used, the previous one stays in force: %s", error)
            else:
                self._replace(file)
                log.info("the mesh file was reloaded", extra={"event": {"file": self._path, "records": len(file)}})

    async def close(self) -> None:
        """Remove the published records."""
        self._own.clear()
        self._mesh = self._file

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        """Raise DiscoveryError: a file cannot issue credentials."""
        raise DiscoveryError("static", f"{self._path} cannot issue TURN credentials for {network!r}: only a server can")

    def _key(self, kind: Kind, record_id: str, network: str | None) -> Key:
        network = network or self._network
        if network is None:
            raise ValueError("expected a network to publish in")
        return (kind, network, record_id)

    def _swap(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._subscribers.notify(mesh)


def _parse(data: Any, allowed: TargetList | None) -> tuple[list[AnyRecord], list[Fault]]:
    if not isinstance(data, dict):
        return [], [Fault("$", f"a mapping of {', '.join(_SECTIONS)}", shown(data))]
    faults: list[Fault] = []
    found: dict[Key, tuple[str, AnyRecord]] = {}
    declared: set[str] | None = None
    for name, items in sorted(data.items(), key=lambda item: item[0] != "networks"):
        path = child("$", name)
        kind = _SECTIONS.get(name) if isinstance(name, str) else None
        if name in ("allocations", "turns"):
            faults.append(Fault(path, "no TURN servers in a file", "a section that needs a discovery server"))
        elif kind is None:
            faults.append(Fault(path, f"one of {', '.join(_SECTIONS)}", "an unknown key"))
        elif not isinstance(items, list):
            faults.append(Fault(path, "a list", shown(items)))
        else:
            for index, item in enumerate(items):
                place = f"{path}[{index}]"
                record, wrong = _record(kind, item, place, declared, allowed)
                faults.extend(wrong)
                if record is not None:
                    first = found.setdefault(record.key, (place, record))[0]
                    if first != place:
                        faults.append(Fault(place, f"each {kind} of a network once", f"that of {first} again"))
        if name == "networks" and not faults:
            declared = {network for _, network, _ in found}
    if "networks" not in data:
        faults.append(Fault("$.networks", "a list", "nothing"))
    return [record for _, record in found.values()], faults


def _record(
    kind: Kind, item: Any, path: str, declared: set[str] | None, allowed: TargetList | None
) -> tuple[AnyRecord | None, list[Fault]]:
    if not isinstance(item, dict):
        return None, [Fault(path, "a mapping", shown(item))]
    fields = dict(item)
    faults: list[Fault] = []
    record_id = _pop_text(fields, "id", path, faults, optional=kind is Kind.SERVICE)
    network = record_id if kind is Kind.NETWORK else _pop_text(fields, "network", path, faults)
    if network is not None and declared is not None and network not in declared:
        faults.append(Fault(f"{path}.network", "one of the networks listed under $.networks", shown(network)))
    wrong = list(shape_faults(fields, SPEC_TYPES[kind], path))
    if wrong:
        return None, [*faults, *wrong]
    spec = msgspec.convert(fields, SPEC_TYPES[kind])
    faults.extend(spec_faults(kind, network or "", spec, allowed, path))
    if network is not None and record_id is not None:
        faults.extend(key_faults(kind, network, record_id, path))
    elif network is not None and kind is Kind.SERVICE and not faults:
        record_id = service_id(fields["name"])
        faults.extend(key_faults(kind, network, record_id, path))
    if faults or record_id is None or network is None:
        return None, faults
    return Record(kind=kind, network=network, id=record_id, revision=1, spec=spec), []


def _pop_text(
    fields: dict[Any, Any], name: str, path: str, faults: list[Fault], *, optional: bool = False
) -> str | None:
    if name not in fields:
        if not optional:
            faults.append(Fault(f"{path}.{name}", "a value", "nothing"))
        return None
    value = fields.pop(name)
    if not isinstance(value, str):
        faults.append(Fault(f"{path}.{name}", "a string", shown(value)))
        return None
    return value
