"""Specs: the valid values of each kind, and the paths of errors."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.addresses import TargetList
from discovery.model.spec import (
    NEGOTIATED,
    SPEC_TYPES,
    BadRecord,
    GatewaySpec,
    Kind,
    RelaySpec,
    ServiceSpec,
    Spec,
    check_key,
    check_spec,
    decode_spec,
    is_record_id,
    service_id,
    spec_faults,
    with_fields,
)

GOOD: dict[Kind, dict[str, Any]] = {
    Kind.NETWORK: {},
    Kind.RELAY: {
        "addresses": ["10.0.0.9", "fd00::9"],
        "ports": [443],
        "sources": {"turn-1": ["10.0.0.9"]},
        "asks": ["b", "c"],
    },
    Kind.TURN: {
        "url": "turn:192.0.2.7:3478?transport=tcp",
        "relay_addresses": ["10.0.0.7"],
        "port_min": 49152,
        "port_max": 65535,
        "zone": "eu-1",
    },
    Kind.ALLOCATION: {
        "via": "a",
        "turn": "turn-1",
        "port": 50000,
        "gateway": "gw-1",
        "proto": ["framed/1"],
        "weight": 3,
    },
    Kind.GATEWAY: {"address": "10.9.0.1:7443", "proto": ["framed/1"], "weight": 2, "zone": "eu-1"},
    Kind.SERVICE: {"name": "orders.shop", "ports": {"8443": ["10.1.0.5:8443", "[fd00::5]:1"]}, "proxy_protocol": True},
    Kind.VIP: {"name": "orders.shop", "address": "10.200.0.1"},
}


def spec(kind: Kind, **changes: Any) -> Spec:
    return decode_spec(kind, msgspec.json.encode(GOOD[kind] | changes))


@pytest.mark.parametrize("kind", Kind)
def test_specs_round_trip(kind: Kind) -> None:
    good = spec(kind)
    check_spec(kind, "b", good)
    assert decode_spec(kind, msgspec.json.encode(good)) == good
    assert msgspec.to_builtins(good) == GOOD[kind]


def test_defaults_are_not_written() -> None:
    """An earlier version, which refuses unknown fields, accepts the record as long as new fields have their defaults."""
    assert msgspec.to_builtins(GatewaySpec(address="10.9.0.1:7443")) == {
        "address": "10.9.0.1:7443",
        "proto": ["framed/1"],
    }
    relay = RelaySpec(addresses=["10.0.0.9"], ports=[443])
    assert msgspec.json.encode(relay) == b'{"addresses":["10.0.0.9"],"ports":[443]}'
    assert decode_spec(Kind.RELAY, msgspec.json.encode(relay)) == relay


@pytest.mark.parametrize(("asked", "version"), [(False, None), (True, 2), ("v1", 1), ("v2", 2)])
def test_the_proxy_header_of_a_service(asked: bool | str, version: int | None) -> None:
    service = spec(Kind.SERVICE, proxy_protocol=asked)
    assert isinstance(service, ServiceSpec)
    assert service.proxy_version == version
    assert msgspec.to_builtins(service).get("proxy_protocol", False) == asked


@pytest.mark.parametrize("asked", ["v3", "", "true", 1, 2, None, ["v1"]])
def test_other_proxy_headers_are_refused(asked: object) -> None:
    with pytest.raises(BadRecord) as caught:
        spec(Kind.SERVICE, proxy_protocol=asked)
    assert caught.value.path == "$.spec.proxy_protocol"


@pytest.mark.parametrize(
    ("kind", "changes", "path"),
    [
        (Kind.RELAY, {"addresses": []}, "$.spec.addresses"),
        (Kind.RELAY, {"addresses": ["10.0.0.9"] * 65}, "$.spec.addresses"),
        (Kind.RELAY, {"addresses": ["10.0.0.9", "relay.example"]}, "$.spec.addresses[1]"),
        (Kind.RELAY, {"addresses": ["127.0.0.1"]}, "$.spec.addresses[0]"),
        (Kind.RELAY, {"ports": [443, 0]}, "$.spec.ports[1]"),
        (Kind.RELAY, {"ports": [65536]}, "$.spec.ports[0]"),
        (Kind.RELAY, {"ports": []}, "$.spec.ports"),
        (Kind.RELAY, {"sources": {"turn 1": []}}, '$.spec.sources["turn 1"]'),
        (Kind.RELAY, {"sources": {"turn-1": ["::ffff:10.0.0.9"]}}, '$.spec.sources["turn-1"][0]'),
        (Kind.RELAY, {"sources": {f"t{n}": [] for n in range(257)}}, "$.spec.sources"),
        (Kind.RELAY, {"asks": ["b", "No_network"]}, "$.spec.asks[1]"),
        (Kind.RELAY, {"asks": ["b"] * 1001}, "$.spec.asks"),
        (Kind.TURN, {"url": "http://10.0.0.7"}, "$.spec.url"),
        (Kind.TURN, {"url": "turn:127.0.0.1"}, "$.spec.url"),
        (Kind.TURN, {"url": "turn:[::1]:3478"}, "$.spec.url"),
        (Kind.TURN, {"relay_addresses": ["10.0.0.7:3478"]}, "$.spec.relay_addresses[0]"),
        (Kind.TURN, {"port_min": 0}, "$.spec.port_min"),
        (Kind.TURN, {"port_max": 70000}, "$.spec.port_max"),
        (Kind.TURN, {"port_min": 50000, "port_max": 49999}, "$.spec.port_max"),
        (Kind.TURN, {"zone": "EU 1"}, "$.spec.zone"),
        (Kind.ALLOCATION, {"weight": 0}, "$.spec.weight"),
        (Kind.ALLOCATION, {"weight": 1001}, "$.spec.weight"),
        (Kind.GATEWAY, {"weight": -1}, "$.spec.weight"),
        (Kind.GATEWAY, {"zone": "-"}, "$.spec.zone"),
        (Kind.ALLOCATION, {"via": "b"}, "$.spec.via"),
        (Kind.ALLOCATION, {"via": "A"}, "$.spec.via"),
        (Kind.ALLOCATION, {"turn": ""}, "$.spec.turn"),
        (Kind.ALLOCATION, {"port": -1}, "$.spec.port"),
        (Kind.ALLOCATION, {"gateway": "x" * 64}, "$.spec.gateway"),
        (Kind.ALLOCATION, {"proto": []}, "$.spec.proto"),
        (Kind.ALLOCATION, {"proto": ["framed"]}, "$.spec.proto[0]"),
        (Kind.GATEWAY, {"address": "10.9.0.1"}, "$.spec.address"),
        (Kind.GATEWAY, {"address": "gw.example:7443"}, "$.spec.address"),
        (Kind.GATEWAY, {"address": "169.254.169.254:80"}, "$.spec.address"),
        (Kind.SERVICE, {"name": "orders"}, "$.spec.name"),
        (Kind.SERVICE, {"name": "Orders.shop"}, "$.spec.name"),
        (Kind.SERVICE, {"name": "x." * 200 + "y"}, "$.spec.name"),
        (Kind.SERVICE, {"ports": {}}, "$.spec.ports"),
        (Kind.SERVICE, {"ports": {"08443": []}}, "$.spec.ports.08443"),
        (Kind.SERVICE, {"ports": {"https": []}}, "$.spec.ports.https"),
        (Kind.SERVICE, {"ports": {"8443": ["orders.shop:8443"]}}, "$.spec.ports.8443[0]"),
        (Kind.SERVICE, {"ports": {"8443": ["10.1.0.5:1", "[::1]:1"]}}, "$.spec.ports.8443[1]"),
        (Kind.SERVICE, {"ports": {"8443": ["10.1.0.5:1"] * 1001}}, "$.spec.ports.8443"),
        (Kind.SERVICE, {"ports": {str(n): [] for n in range(1, 66)}}, "$.spec.ports"),
        (Kind.VIP, {"name": "orders"}, "$.spec.name"),
        (Kind.VIP, {"address": "255.255.255.255"}, "$.spec.address"),
    ],
)
def test_bad_values(kind: Kind, changes: dict[str, Any], path: str) -> None:
    bad = spec(kind, **changes)
    with pytest.raises(BadRecord) as caught:
        check_spec(kind, "b", bad)
    assert caught.value.path == path
    assert "expected" in caught.value.expected


@pytest.mark.parametrize(
    ("kind", "data", "path"),
    [
        (Kind.NETWORK, b'{"x":1}', "$.spec"),
        (Kind.RELAY, b'{"addresses":["10.0.0.9"]}', "$.spec"),
        (Kind.RELAY, b'{"addresses":["10.0.0.9",1],"ports":[443]}', "$.spec.addresses[1]"),
        (Kind.RELAY, b'{"addresses":[],"ports":["443"]}', "$.spec.ports[0]"),
        (Kind.RELAY, b"{", "$.spec"),
        (Kind.RELAY, b"\xff", "$.spec"),
        (Kind.RELAY, b"[" * 100_000, "$.spec"),
        (Kind.VIP, b'{"name":"\xff","address":""}', "$.spec"),
    ],
)
def test_bad_structure(kind: Kind, data: bytes, path: str) -> None:
    with pytest.raises(BadRecord) as caught:
        decode_spec(kind, data)
    assert caught.value.path == path


@given(st.sampled_from(Kind), st.binary(max_size=100))
def test_garbage_gives_badrecord_only(kind: Kind, data: bytes) -> None:
    try:
        decode_spec(kind, data)
    except BadRecord:
        pass


def test_the_spec_of_another_kind_is_refused() -> None:
    with pytest.raises(BadRecord, match="spec of a vip"):
        check_spec(Kind.VIP, "b", spec(Kind.GATEWAY))


def test_all_errors_of_a_spec_are_reported() -> None:
    bad = spec(Kind.TURN, url="", relay_addresses=["x", "::1"], port_min=0, port_max=-1)
    assert len(list(spec_faults(Kind.TURN, "b", bad))) == 6


def test_an_allowed_range_lets_tests_use_loopback() -> None:
    on_loopback = spec(Kind.SERVICE, ports={"8443": ["127.0.0.1:8443"]})
    check_spec(Kind.SERVICE, "b", on_loopback, TargetList.parse(["127.0.0.0/8"]))
    with pytest.raises(BadRecord):
        check_spec(Kind.SERVICE, "b", on_loopback, TargetList.parse(["0.0.0.0/0"]))


def test_keys() -> None:
    check_key(Kind.RELAY, "a", "relay-1.x_y")
    check_key(Kind.NETWORK, "a", "a")
    for kind, network, record_id, path in (
        (Kind.RELAY, "A", "relay-1", "$.network"),
        (Kind.RELAY, "a.b", "relay-1", "$.network"),
        (Kind.RELAY, "a", "", "$.id"),
        (Kind.RELAY, "a", "../x", "$.id"),
        (Kind.RELAY, "a", "x" * 64, "$.id"),
        (Kind.RELAY, "a", "Relay", "$.id"),
        (Kind.NETWORK, "a", "b", "$.id"),
    ):
        with pytest.raises(BadRecord) as caught:
            check_key(kind, network, record_id)
        assert caught.value.path == path


@given(st.from_regex(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.){1,3}[a-z]{1,60}", fullmatch=True))
def test_a_service_without_an_id_gets_one(name: str) -> None:
    assert is_record_id(service_id(name))
    assert service_id(name) != service_id(name + "x")


def test_every_kind_has_a_spec() -> None:
    assert set(SPEC_TYPES) == set(Kind)


@pytest.mark.parametrize(
    ("health", "path"),
    [
        ({"check": "tcp"}, None),
        ({"check": "tls", "interval_s": 3600}, None),
        ({"check": "udp"}, "$.spec.health.check"),
        ({"check": "tcp", "interval_s": 0}, "$.spec.health.interval_s"),
        ({"check": "tcp", "interval_s": 3601}, "$.spec.health.interval_s"),
        ({"check": "tcp", "port": 1}, "$.spec.health"),
        ({}, "$.spec.health"),
    ],
)
def test_checks_of_a_service(health: dict[str, object], path: str | None) -> None:
    if path is None:
        checked = spec(Kind.SERVICE, health=health)
        check_spec(Kind.SERVICE, "b", checked)
        assert msgspec.to_builtins(checked)["health"] == health
        return
    with pytest.raises(BadRecord) as caught:
        check_spec(Kind.SERVICE, "b", spec(Kind.SERVICE, health=health))
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"port_names": {"https": 8443, "h2": 8443, "other": 1}}, None),
        ({"port_names": {"https": 0}}, "$.spec.port_names.https"),
        ({"port_names": {"443": 443}}, "$.spec.port_names.443"),
        ({"port_names": {"_https": 443}}, "$.spec.port_names._https"),
        ({"port_names": {f"p{number}": 1 for number in range(129)}}, "$.spec.port_names"),
        ({"name": "db-0.db.shop", "member_of": "db.shop"}, None),
        ({"name": "db-0.b.db.shop", "member_of": "db.shop"}, None),
        ({"name": "db-0.db.shop", "member_of": "shop"}, "$.spec.member_of"),
        ({"name": "db-0.db.shop", "member_of": "b.shop"}, "$.spec.member_of"),
        ({"name": "db.shop", "member_of": "db.shop"}, "$.spec.member_of"),
        ({"alias_of": "orders.shop"}, None),
        ({"alias_of": "_x"}, "$.spec.alias_of"),
    ],
)
def test_names_of_ports_and_members(fields: dict[str, object], path: str | None) -> None:
    if path is None:
        checked = spec(Kind.SERVICE, **fields)
        check_spec(Kind.SERVICE, "b", checked)
        assert msgspec.to_builtins(checked).items() >= fields.items()
        return
    with pytest.raises(BadRecord) as caught:
        check_spec(Kind.SERVICE, "b", spec(Kind.SERVICE, **fields))
    assert caught.value.path == path


def test_negotiated_fields_are_left_out_for_peers_that_do_not_know_them() -> None:
    whole = spec(Kind.SERVICE, name="db-0.db.shop", member_of="db.shop", port_names={"https": 8443})
    assert with_fields(whole, NEGOTIATED) is whole
    assert with_fields(whole, frozenset()) == spec(Kind.SERVICE, name="db-0.db.shop")
    assert with_fields(whole, frozenset({"service.member_of"})) == spec(
        Kind.SERVICE, name="db-0.db.shop", member_of="db.shop"
    )
    kinds = {field.partition(".")[0] for field in NEGOTIATED}
    assert kinds <= {str(kind) for kind in Kind}
