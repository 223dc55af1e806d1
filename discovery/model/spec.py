"""The specs of records: seven kinds, and the rules for each.

Decoding checks the structure. `spec_faults` checks the values: addresses that may be dialled, ports, ids, lengths and counts.
Sans-IO. The only error is BadRecord.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import msgspec

from discovery.model.addresses import (
    BadAddress,
    TargetList,
    parse_address,
    parse_endpoint,
    parse_port,
    parse_turn_url,
    refusal,
)
from discovery.model.names import MAX_PORT, is_ldh_label, is_service_name
from discovery.model.validation import Fault, child, shown

MAX_ID = 63
MAX_ADDRESSES = 64  # of one relay or TURN server; hosts have only a few
MAX_PORTS = 64  # of one relay or service
MAX_PORT_NAMES = 2 * MAX_PORTS
MAX_TURN_SERVERS = 256  # for which one relay publishes its sources
MAX_ENDPOINTS = 1000  # of one port; a Kubernetes EndpointSlice holds 100 by default and 1000 at most
MAX_PROTO = 16
MAX_WEIGHT = 1000  # from the smallest gateway to the largest machine
MAX_CHECK_INTERVAL_S = 3600
MAX_ASKED = 1000  # networks that one relay imports from
FRAMED = "framed/1"
"""Capsules after a signed preamble: the only stream protocol that loses no data."""

_ID = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_PROTO = re.compile(r"[a-z0-9-]{1,32}/[0-9]{1,3}")


class Kind(StrEnum):
    """The kind of a record."""

    NETWORK = "network"
    RELAY = "relay"
    TURN = "turn"
    ALLOCATION = "allocation"
    GATEWAY = "gateway"
    SERVICE = "service"
    VIP = "vip"


class BadRecord(ValueError):
    """An invalid record. `path` is the place of the error."""

    def __init__(self, path: str, expected: str) -> None:
        """`expected` is a sentence that says what was expected at `path`."""
        super().__init__(f"{path}: {expected}")
        self.path = path
        self.expected = expected


# A field with its default value is not written, so that versions that do not know the field can read the record. Therefore a
# default must never change.


class NetworkSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Declares a network. The record's id is the network's."""


class RelaySpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A relay of the network."""

    addresses: list[str]
    """IP addresses under which clients reach it. DNS answers with them."""
    ports: list[int]
    """Ports that it listens on."""
    sources: dict[str, list[str]] = {}
    """For each TURN server of this network (by id), the source addresses that the server sees for connections of this relay."""
    asks: list[str] = []
    """Networks that this relay imports names from. This is a hint for gateways that register only with networks that import
    from them; a relay may use other networks, too."""


class TurnSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A TURN server in this network."""

    url: str
    """URL under which gateways of other networks reach it: turn:HOST:PORT?transport=tcp, or turns:."""
    relay_addresses: list[str]
    """Addresses of allocations, as reached by this network's relays."""
    port_min: int
    port_max: int
    """Ports of allocations, from `port_min` to `port_max` inclusive."""
    zone: str = ""
    """Zone of the server. Relays in the same zone prefer its allocations."""


class AllocationSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A route into the record's network: an allocation of its gateway on a TURN server of another network."""

    via: str
    """Network of the TURN server, whose relays may use the allocation."""
    turn: str
    """Id of the TURN server's record."""
    port: int
    """Port of the relayed address."""
    gateway: str
    """Id of the gateway."""
    proto: list[str] = msgspec.field(default_factory=lambda: [FRAMED])
    weight: int = 1
    """Relative share of streams."""


class GatewaySpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A gateway of the network that can be reached directly, without a TURN server."""

    address: str
    """ip:port under which relays of other networks reach it."""

    proto: list[str] = msgspec.field(default_factory=lambda: [FRAMED])
    weight: int = 1
    """Relative share of streams."""
    zone: str = ""
    """Zone of the gateway. Relays in the same zone prefer it."""


class HealthCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How relays and gateways of the network check the endpoints of a service."""

    check: Literal["tcp", "tls"]
    """`tcp`: the endpoint accepts a connection. `tls`: it answers a ClientHello for the service's name with a handshake."""

    interval_s: int = 10


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A service of the network. Other networks see its ports with empty lists of endpoints."""

    name: str
    ports: dict[str, list[str]]
    """For each port, as a decimal string, its endpoints (ip:port)."""

    proxy_protocol: bool | Literal["v1", "v2"] = False
    """The PROXY protocol header that the service expects; `true` means v2."""

    health: HealthCheck | None = None
    """None: endpoints are only left out after a stream found them dead. Other networks do not see it."""

    port_names: dict[str, int] = {}
    """Ports by the names under which SRV questions ask for them, such as `https: 8443` for _https._tcp. One that is not in `ports`
    has no effect."""

    member_of: str = ""
    """Name of the service of which this is one member, such as a pod of a StatefulSet; empty: none. Questions for the SRV records
    of that service are answered with its members."""

    alias_of: str = ""
    """Name of the service of which this is another name, in another domain; empty: none. A beginning of both names stands for that
    service."""

    @property
    def proxy_version(self) -> int | None:
        """The version of that header, None if the service expects none."""
        return {False: None, True: 2, "v1": 1, "v2": 2}[self.proxy_protocol]


class VipSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The stable address under which clients of this network reach a service."""

    name: str
    address: str


Spec: TypeAlias = NetworkSpec | RelaySpec | TurnSpec | AllocationSpec | GatewaySpec | ServiceSpec | VipSpec

SPEC_TYPES: Mapping[Kind, type[Spec]] = {
    Kind.NETWORK: NetworkSpec,
    Kind.RELAY: RelaySpec,
    Kind.TURN: TurnSpec,
    Kind.ALLOCATION: AllocationSpec,
    Kind.GATEWAY: GatewaySpec,
    Kind.SERVICE: ServiceSpec,
    Kind.VIP: VipSpec,
}


NEGOTIATED = frozenset({"service.alias_of", "service.health", "service.member_of", "service.port_names"})
"""Fields that are sent only to peers that say that they know them, since a record with an unknown field is skipped or refused as
a whole. Without them the other fields keep their meaning."""


def with_fields(spec: Spec, known: frozenset[str]) -> Spec:
    """Return a spec without the negotiated fields that a peer does not know."""
    if not isinstance(spec, ServiceSpec) or known >= NEGOTIATED:
        return spec
    unknown = {name: value for name, value in _UNSET.items() if f"service.{name}" not in known and getattr(spec, name)}
    return msgspec.structs.replace(spec, **unknown) if unknown else spec


_UNSET: Mapping[str, Any] = {"alias_of": "", "health": None, "member_of": "", "port_names": {}}


def is_port_name(text: str) -> bool:
    """Return whether a port may have this name: a label that is not a number (RFC 6335 section 5.1 has at most 15 characters)."""
    return is_ldh_label(text) and not text.isdigit()


def is_record_id(text: str) -> bool:
    """Return whether this is a valid id: lower-case letters, digits, inner `-`, `.` and `_`, at most 63 characters."""
    return _ID.fullmatch(text) is not None


def service_id(name: str) -> str:
    """Return the default id of a service's record: its name, shortened with a hash if it is too long."""
    if len(name) <= MAX_ID:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[: MAX_ID - 17].rstrip('.-')}-{digest}"


def check_spec(kind: Kind, network: str, spec: Spec, allowed: TargetList | None = None) -> None:
    """Raise BadRecord for the first error of a spec in a record of this network.

    A CIDR of `allowed` that lies completely inside a refused range permits its addresses.
    """
    for fault in spec_faults(kind, network, spec, allowed):
        raise BadRecord(fault.path, f"expected {fault.expected}, got {fault.got}")


def check_key(kind: Kind, network: str, record_id: str) -> None:
    """Raise BadRecord if the network or the id of a record is invalid."""
    for fault in key_faults(kind, network, record_id):
        raise BadRecord(fault.path, f"expected {fault.expected}, got {fault.got}")


def key_faults(kind: Kind, network: str, record_id: str, path: str = "$") -> Iterator[Fault]:
    """Yield all errors of a record's network and id."""
    if not is_ldh_label(network):
        yield Fault(f"{path}.network", "a network id: lower-case letters, digits, inner hyphens", shown(network))
    if not is_record_id(record_id):
        yield Fault(
            f"{path}.id", "an id: lower-case letters, digits, inner '-', '.', '_', 63 at most", shown(record_id)
        )
    elif kind is Kind.NETWORK and record_id != network:
        yield Fault(f"{path}.id", f"{network!r}, the network itself", shown(record_id))


def spec_faults(
    kind: Kind, network: str, spec: Spec, allowed: TargetList | None = None, path: str = "$.spec"
) -> Iterator[Fault]:
    """Yield all errors of a spec whose structure is valid."""
    if not isinstance(spec, SPEC_TYPES[kind]):
        yield Fault(path, f"the spec of a {kind}", type(spec).__name__)
        return

    yield from _CHECKERS[kind](path, spec, _Place(network, allowed))


def decode_spec(kind: Kind, data: bytes | msgspec.Raw) -> Spec:
    """Decode a spec from JSON, without checking its values (see `check_spec`). Raises BadRecord."""
    try:
        return msgspec.json.decode(data, type=SPEC_TYPES[kind])
    except msgspec.ValidationError as error:
        # msgspec's message ends in " - at `$.port`", unless the error concerns the whole value.
        sentence, _, path = str(error).partition(" - at `$")
        raise BadRecord(f"$.spec{path.removesuffix('`')}", sentence[:1].lower() + sentence[1:]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRecord("$.spec", f"expected JSON: {str(error)[:200]}") from None


def _count(path: str, items: Any, most: int, least: int = 0) -> Iterator[Fault]:
    if not least <= len(items) <= most:
        yield Fault(path, f"{least} to {most} items", str(len(items)))


def _each(
    path: str, items: Iterable[Any], most: int, faults: Callable[[str, Any], Iterator[Fault]], least: int = 0
) -> Iterator[Fault]:
    items = list(items)
    yield from _count(path, items, most, least)
    for index, item in enumerate(items[:most]):
        yield from faults(f"{path}[{index}]", item)


def _id_faults(path: str, text: str) -> Iterator[Fault]:
    if not is_record_id(text):
        yield Fault(path, "an id: lower-case letters, digits, inner '-', '.', '_', 63 at most", shown(text))


def _name_faults(path: str, text: str) -> Iterator[Fault]:
    if not is_service_name(text):
        yield Fault(path, "a lower-case service name of two labels or more", shown(text))


def _port_faults(path: str, port: int) -> Iterator[Fault]:
    if not 1 <= port <= MAX_PORT:
        yield Fault(path, f"a port 1-{MAX_PORT}", shown(port))


def _weight_faults(path: str, weight: int) -> Iterator[Fault]:
    if not 1 <= weight <= MAX_WEIGHT:
        yield Fault(path, f"a whole number 1-{MAX_WEIGHT}", shown(weight))


def _zone_faults(path: str, text: str) -> Iterator[Fault]:
    if text:
        yield from _id_faults(path, text)


def _network_faults(path: str, text: str) -> Iterator[Fault]:
    if not is_ldh_label(text):
        yield Fault(path, "a network id", shown(text))


def _proto_faults(path: str, text: str) -> Iterator[Fault]:
    if not _PROTO.fullmatch(text):
        yield Fault(path, "a protocol and version such as framed/1", shown(text))


_NO_HOSTS = TargetList.parse(["240.0.0.0/5", "248.0.0.0/6", "252.0.0.0/7", "254.0.0.0/8"])  # not broadcast


def _address_faults(path: str, text: str, allowed: TargetList | None) -> Iterator[Fault]:
    try:
        address = parse_address(text)
    except BadAddress:
        yield Fault(path, "an IP address", shown(text))
        return
    why = refusal(address, allowed)
    if why is not None:
        yield Fault(path, "an address that may be dialled", f"{text}, which is {why}")


def _endpoint_faults(path: str, text: str, allowed: TargetList | None) -> Iterator[Fault]:
    try:
        address, _ = parse_endpoint(text)
    except BadAddress:
        yield Fault(path, "ip:port or [ipv6]:port", shown(text))
        return
    why = refusal(address, allowed)
    if why is not None:
        yield Fault(path, "an address that may be dialled", f"{text}, which is {why}")


def _turn_url_faults(path: str, text: str, allowed: TargetList | None) -> Iterator[Fault]:
    try:
        url = parse_turn_url(text)
    except BadAddress:
        yield Fault(path, "turn:HOST:PORT?transport=tcp or turns:HOST:PORT?transport=tcp", shown(text))
        return
    if ":" in url.host or url.host.rpartition(".")[2].isdigit():
        yield from _address_faults(path, url.host, allowed)


@dataclass(frozen=True, slots=True)
class _Place:
    """The network of a record, and the refused addresses that are permitted in it."""

    network: str
    allowed: TargetList | None

    def address_faults(self, path: str, text: str) -> Iterator[Fault]:
        return _address_faults(path, text, self.allowed)

    def endpoint_faults(self, path: str, text: str) -> Iterator[Fault]:
        return _endpoint_faults(path, text, self.allowed)


def _network_spec_faults(_path: str, _spec: NetworkSpec, _place: _Place) -> Iterator[Fault]:
    return iter(())


def _relay_faults(path: str, spec: RelaySpec, place: _Place) -> Iterator[Fault]:
    yield from _each(f"{path}.addresses", spec.addresses, MAX_ADDRESSES, place.address_faults, least=1)
    yield from _each(f"{path}.ports", spec.ports, MAX_PORTS, _port_faults, least=1)
    yield from _count(f"{path}.sources", spec.sources, MAX_TURN_SERVERS)
    for turn, sources in spec.sources.items():
        yield from _id_faults(child(f"{path}.sources", turn), turn)
        yield from _each(child(f"{path}.sources", turn), sources, MAX_ADDRESSES, place.address_faults)
    yield from _each(f"{path}.asks", spec.asks, MAX_ASKED, _network_faults)


def _turn_faults(path: str, spec: TurnSpec, place: _Place) -> Iterator[Fault]:
    yield from _turn_url_faults(f"{path}.url", spec.url, place.allowed)
    yield from _each(f"{path}.relay_addresses", spec.relay_addresses, MAX_ADDRESSES, place.address_faults, least=1)
    yield from _port_faults(f"{path}.port_min", spec.port_min)
    yield from _port_faults(f"{path}.port_max", spec.port_max)
    if spec.port_max < spec.port_min:
        yield Fault(f"{path}.port_max", f"a port from {spec.port_min} on", shown(spec.port_max))
    yield from _zone_faults(f"{path}.zone", spec.zone)


def _allocation_faults(path: str, spec: AllocationSpec, place: _Place) -> Iterator[Fault]:
    if not is_ldh_label(spec.via):
        yield Fault(f"{path}.via", "a network id", shown(spec.via))
    elif spec.via == place.network:
        yield Fault(f"{path}.via", f"a network other than {place.network!r}, the one served", shown(spec.via))
    yield from _id_faults(f"{path}.turn", spec.turn)
    yield from _port_faults(f"{path}.port", spec.port)
    yield from _id_faults(f"{path}.gateway", spec.gateway)
    yield from _each(f"{path}.proto", spec.proto, MAX_PROTO, _proto_faults, least=1)
    yield from _weight_faults(f"{path}.weight", spec.weight)


def _gateway_faults(path: str, spec: GatewaySpec, place: _Place) -> Iterator[Fault]:
    yield from place.endpoint_faults(f"{path}.address", spec.address)
    yield from _each(f"{path}.proto", spec.proto, MAX_PROTO, _proto_faults, least=1)
    yield from _weight_faults(f"{path}.weight", spec.weight)
    yield from _zone_faults(f"{path}.zone", spec.zone)


def _service_faults(path: str, spec: ServiceSpec, place: _Place) -> Iterator[Fault]:
    yield from _name_faults(f"{path}.name", spec.name)
    yield from _count(f"{path}.ports", spec.ports, MAX_PORTS, least=1)
    for port, endpoints in spec.ports.items():
        where = child(f"{path}.ports", port)
        try:
            parse_port(port)
        except BadAddress:
            yield Fault(where, f"a port 1-{MAX_PORT} without leading zeros as key", shown(port))
        yield from _each(where, endpoints, MAX_ENDPOINTS, place.endpoint_faults)
    yield from _count(f"{path}.port_names", spec.port_names, MAX_PORT_NAMES)
    for name, number in spec.port_names.items():
        where = child(f"{path}.port_names", name)
        if not is_port_name(name):
            yield Fault(where, "a name of lower-case letters, digits and inner hyphens, and not a number", shown(name))
        yield from _port_faults(where, number)
    if spec.member_of and not (is_service_name(spec.member_of) and spec.name.endswith(f".{spec.member_of}")):
        yield Fault(f"{path}.member_of", "the end of the name after one of its dots", shown(spec.member_of))
    if spec.alias_of:
        yield from _name_faults(f"{path}.alias_of", spec.alias_of)
    if spec.health is not None and not 1 <= spec.health.interval_s <= MAX_CHECK_INTERVAL_S:
        yield Fault(f"{path}.health.interval_s", f"seconds 1-{MAX_CHECK_INTERVAL_S}", shown(spec.health.interval_s))


def _vip_faults(path: str, spec: VipSpec, place: _Place) -> Iterator[Fault]:
    yield from _name_faults(f"{path}.name", spec.name)
    # No host has the address of a vip: the relay answers for it. So it may be in the range that is reserved for future use.
    if any(_address_faults(f"{path}.address", spec.address, _NO_HOSTS)):
        yield from place.address_faults(f"{path}.address", spec.address)


_CHECKERS: Mapping[Kind, Callable[[str, Any, _Place], Iterator[Fault]]] = {
    Kind.NETWORK: _network_spec_faults,
    Kind.RELAY: _relay_faults,
    Kind.TURN: _turn_faults,
    Kind.ALLOCATION: _allocation_faults,
    Kind.GATEWAY: _gateway_faults,
    Kind.SERVICE: _service_faults,
    Kind.VIP: _vip_faults,
}
