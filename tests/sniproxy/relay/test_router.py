"""From a name to candidates: every kind of route, and everything that must never become one. Without sockets."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.addresses import TargetList, refusal
from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import (
    AnyRecord,
    Kind,
    Mesh,
    ServiceSpec,
    TurnSpec,
)
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate
from sniproxy.transport.direct import DIRECT
from sniproxy.transport.errors import Unroutable
from sniproxy.transport.turn import TURN
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.preamble import SigningKey
from tests.support.fixed_discovery import record
from tests.support.routes import (
    BASE,
    DOMAIN,
    EVERYTHING,
    NAME,
    NOTHING,
    TURN_MESH,
    allocation,
    compact,
    gateway,
    key,
    network,
    refused,
    router,
    service,
    turn,
)

# --- what leads somewhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "p8443-10-1-0-5.b.svc.mesh.internal",
        "_8443._10-1-0-5._b.svc.mesh.internal",
    ],
)
def test_an_address_in_another_network_by_its_allocation(name: str) -> None:
    assert router().candidates(name, TURN_MESH, 443) == [
        Candidate(
            traits=TURN,
            network="b",
            target="10.1.0.5:8443",
            address="10.0.0.7",
            port=50000,
            addressee="gw-1-a-turn-1-50000",
            proto=("framed/1",),
        )
    ]


@pytest.mark.parametrize(
    "name", ["p8443-xfd000000000000000000000000000005.b.svc.mesh.internal", "_8443._fd00--5._b.svc.mesh.internal"]
)
def test_an_ipv6_target(name: str) -> None:
    assert router().candidates(name, TURN_MESH, 443)[0].target == "[fd00::5]:8443"


def test_direct_gateways_come_before_allocations() -> None:
    mesh = TURN_MESH.apply([gateway("192.0.2.1:7443"), gateway("[2001:db8::9]:7443", name="gw-2")])
    found = router().candidates(compact("10.1.0.5"), mesh, 443)
    assert [(c.traits, c.address, c.port, c.addressee) for c in found] == [
        (DIRECT, "192.0.2.1", 7443, "gw-1"),
        (DIRECT, "2001:db8::9", 7443, "gw-2"),
        (TURN, "10.0.0.7", 50000, "gw-1-a-turn-1-50000"),
    ]
    assert str(found[0]) == "direct:gw-1"


def test_the_ways_to_one_network_are_put_into_order_and_networks_are_not() -> None:
    def backwards(candidates: Sequence[Candidate]) -> list[Candidate]:
        return list(reversed(candidates))

    ways = [*(allocation(port) for port in (50001, 50002, 50003)), gateway(), allocation(50004, to="c")]
    mesh = Mesh.of([*BASE, *ways, service(), service(to="c"), network("c")])
    found = router(order=backwards).candidates(NAME, mesh, 8443)
    assert [(way.network, way.port) for way in found] == [
        ("b", 50003),
        ("b", 50002),
        ("b", 50001),
        ("b", 7443),
        ("c", 50004),
    ]


def test_weight_and_zone_of_a_way() -> None:
    near = record(Kind.TURN, "a", "turn-1", msgspec.structs.replace(turn().spec, zone="eu-1"))
    heavy = record(Kind.ALLOCATION, "b", "heavy", msgspec.structs.replace(allocation().spec, weight=5))
    mesh = Mesh.of([*BASE, near, heavy])
    (way,) = router(zone="eu-1").candidates(compact("10.1.0.5"), mesh, 443)
    assert (way.weight, way.near) == (5, True)
    for zone in ("eu-2", ""):
        assert not router(zone=zone).candidates(compact("10.1.0.5"), mesh, 443)[0].near


def test_a_service_is_requested_by_its_full_name() -> None:
    mesh = TURN_MESH.apply([service("orders.shop.svc.cluster.local")])
    for name in (f"p8443-orders.shop.b.{DOMAIN}", f"_8443.orders.shop._b.{DOMAIN}"):
        assert router().candidates(name, mesh, 443)[0].target == "orders.shop.svc.cluster.local:8443"


def test_imports_in_their_order() -> None:
    mesh = TURN_MESH.apply([service(), service(to="c"), network("c"), allocation(50005, to="c")])
    found = router().candidates(NAME, mesh, 443)
    assert [(candidate.network, candidate.port) for candidate in found] == [("b", 50000), ("c", 50005)]
    other = router(imports=Imports([ImportRule(names=(NAME,), sources=("c", "b"), prefer="local")]))
    assert [candidate.network for candidate in other.candidates(NAME, mesh, 443)] == ["c", "b"]


def test_imports_fail_over_to_a_network_that_has_a_way() -> None:
    mesh = Mesh.of([*BASE, service(), service(to="c"), network("c"), allocation(50005, to="c")])
    assert [candidate.network for candidate in router().candidates(NAME, mesh, 443)] == ["c"]


def test_a_service_that_is_not_imported_has_no_route() -> None:
    mesh = TURN_MESH.apply([service("bank.example"), service(to="d"), network("d"), allocation(50007, to="d")])
    assert refused(mesh, "bank.example") is Reason.UNKNOWN_NAME
    assert refused(mesh, NAME) is Reason.UNKNOWN_NAME, "d offers it, but we import it from b and c only"
    assert refused(mesh, "orders.shop.example.org") is Reason.UNKNOWN_NAME


# --- ports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ports", "local_port", "target"),
    [
        (["8443"], 443, 8443),
        (["443", "8443"], 443, 443),
        (["443", "8443"], 8443, 8443),
        (["443", "8443"], 9443, None),
    ],
)
def test_the_port_of_a_plain_name(ports: list[str], local_port: int, target: int | None) -> None:
    mesh = TURN_MESH.apply([service(ports={port: [] for port in ports})])
    if target is None:
        assert refused(mesh, NAME, local_port) is Reason.AMBIGUOUS_PORT
    else:
        assert router().candidates(NAME, mesh, local_port)[0].target == f"{NAME}:{target}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (compact("10.1.0.5", to="nowhere"), Reason.UNKNOWN_NETWORK),
        (f"p8443-orders.shop.nowhere.{DOMAIN}", Reason.UNKNOWN_NETWORK),
        (f"p8443-orders.shop.b.{DOMAIN}", Reason.AMBIGUOUS_NAME),
        (f"p8443-stock.shop.b.{DOMAIN}", Reason.UNKNOWN_NAME),
        (f"p9443-orders.shop.example.b.{DOMAIN}", Reason.UNKNOWN_NAME),
        (f"b.{DOMAIN}", Reason.BAD_NAME),
        (DOMAIN, Reason.BAD_NAME),
        (f"p0-10-1-0-5.b.{DOMAIN}", Reason.BAD_NAME),
        (f"p08443-10-1-0-5.b.{DOMAIN}", Reason.BAD_NAME),
        (f"p65536-10-1-0-5.b.{DOMAIN}", Reason.BAD_NAME),
        (f"_8443._10-1-0-5._b.{DOMAIN}.{DOMAIN}", Reason.BAD_NAME),
        ("stock.example", Reason.UNKNOWN_NAME),
    ],
)
def test_names_that_lead_nowhere(name: str, reason: Reason) -> None:
    mesh = TURN_MESH.apply([service(), service("orders.shop.svc.cluster.local")])
    assert refused(mesh, name) is reason


# --- what other networks may not make us do -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([], "no allocation at all"),
        ([allocation(49151)], "below the range of our own TURN server"),
        ([allocation(22)], "a port of ours that is no allocation"),
        ([allocation(via="c")], "an allocation on another network's TURN server"),
        ([allocation(server="turn-9")], "a TURN server that we do not have"),
        ([allocation(proto=["raw/1"])], "a stream protocol that we do not speak"),
        ([gateway(proto="raw/1")], "the same of a gateway"),
        ([allocation(to="c")], "an allocation that leads to another network"),
    ],
)
def test_no_route(records: list[AnyRecord], why: str) -> None:
    assert refused(Mesh.of([*BASE, *records]), compact("10.1.0.5")) is Reason.NO_ROUTE, why


def test_of_another_networks_record_only_the_port_counts() -> None:
    """Its TURN records are not used, nor anything else that it publishes."""
    theirs = TurnSpec(
        url="turn:203.0.113.1:3478?transport=tcp", relay_addresses=["203.0.113.1"], port_min=1, port_max=65535
    )
    mesh = TURN_MESH.apply([record(Kind.TURN, "b", "turn-1", theirs), allocation(22, name="low")])
    found = router().candidates(compact("10.1.0.5"), mesh, 443)
    assert [(candidate.address, candidate.port) for candidate in found] == [("10.0.0.7", 50000)]


def test_ports_at_the_edges_of_the_range() -> None:
    mesh = Mesh.of([network("b"), turn(low=50000, high=50001), *(allocation(port) for port in range(49998, 50004))])
    assert [c.port for c in router().candidates(compact("10.1.0.5"), mesh, 443)] == [50000, 50001]


def test_the_relayed_address_is_ipv4_where_there_is_any() -> None:
    mesh = Mesh.of([network("b"), turn("turn-1", "2001:db8::7", "10.0.0.7"), allocation()])
    assert router().candidates(compact("10.1.0.5"), mesh, 443)[0].address == "10.0.0.7"


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "0.0.0.0", "::1", "::ffff:10.0.0.7", "nonsense"])
def test_a_relayed_address_that_may_not_be_dialled(address: str) -> None:
    mesh = Mesh.of([network("b"), turn("turn-1", address), allocation()])
    assert refused(mesh, compact("10.1.0.5")) is Reason.NO_ROUTE


def test_gateways_are_dialled_only_inside_relay_direct() -> None:
    mesh = Mesh.of([*BASE, gateway("192.0.2.1:7443")])
    name = compact("10.1.0.5")
    assert refused(mesh, name, direct=NOTHING) is Reason.NO_ROUTE
    assert refused(mesh, name, direct=TargetList.parse(["192.0.2.0/24:443"])) is Reason.NO_ROUTE
    inside = router(direct=TargetList.parse(["192.0.2.0/24:7443"]))
    assert len(inside.candidates(name, mesh, 443)) == 1


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:7443",
        "169.254.169.254:80",
        "0.0.0.0:7443",
        "224.0.0.1:7443",
        "255.255.255.255:7443",
        "[::1]:7443",
        "[::]:7443",
        "[::ffff:10.0.0.1]:7443",
        "[::ffff:127.0.0.1]:7443",
        "[64:ff9b::7f00:1]:7443",
        "[2002:7f00:1::]:7443",
        "[fe80::1]:7443",
        "2130706433:7443",
        "0177.0.0.1:7443",
        "0x7f000001:7443",
        "10.0.0.1",
        "gateway.example:7443",
    ],
)
def test_a_gateways_address_that_is_never_dialled(address: str) -> None:
    """Even though relay.direct has everything: a discovery server that accepts such a record must not control us."""
    assert refused(Mesh.of([*BASE, gateway(address)]), compact("10.1.0.5")) is Reason.NO_ROUTE


def test_without_a_key_there_is_no_stream() -> None:
    name = compact("10.1.0.5")
    assert refused(TURN_MESH, name, keys=SigningKeys({})) is Reason.NO_KEY
    backwards = SigningKey(id="ba", secret=bytes(32), from_network="b", to_network="a")
    assert refused(TURN_MESH, name, keys=SigningKeys({"ba": backwards})) is Reason.NO_KEY
    mesh = TURN_MESH.apply([service(), service(to="c"), network("c"), allocation(50005, to="c")])
    only_c = router(keys=SigningKeys({"ac": key("c")}))
    assert [candidate.network for candidate in only_c.candidates(NAME, mesh, 443)] == ["c"]
    assert refused(mesh, NAME, keys=SigningKeys({})) is Reason.NO_KEY


def test_the_first_key_of_a_direction_signs() -> None:
    keys = SigningKeys({"ab-2": replace(key("b"), id="ab-2"), "ab-1": replace(key("b"), id="ab-1")})
    found = keys.get("a", "b")
    assert found is not None
    assert found.id == "ab-2"
    assert keys.get("b", "a") is None


def test_a_hostile_service_name_gives_no_route_and_no_crash() -> None:
    """Records are checked when they are written. Invalid ones must not stop us here."""
    spec = ServiceSpec(name=NAME, ports={"8443": [], "0": [], "70000": [], "x": []})
    mesh = TURN_MESH.apply([record(Kind.SERVICE, "b", "odd", spec), allocation(70000), allocation(-1)])
    found = router().candidates(NAME, mesh, 8443)
    assert [candidate.port for candidate in found] == [50000]
    long = replace_service_name("a." * 200 + "example")
    assert refused(TURN_MESH.apply([long]), f"p8443-a.a.b.{DOMAIN}") is Reason.NO_ROUTE


def replace_service_name(name: str) -> AnyRecord:
    return record(Kind.SERVICE, "b", "odd", ServiceSpec(name=name, ports={"8443": []}))


# --- anything at all ------------------------------------------------------------------------------------------------

_names = st.one_of(
    st.text(max_size=80),
    st.from_regex(r"(p[0-9]{1,6}-|_[0-9]{1,6}\.)[a-z0-9.-]{0,60}\.[ab]\.svc\.mesh\.internal", fullmatch=True),
    st.ip_addresses().map(lambda address: compact(str(address), 80, "a")),
)


@given(name=_names, port=st.integers(0, 70000))
def test_any_name_gives_candidates_that_may_be_dialled_or_unroutable(name: str, port: int) -> None:
    try:
        found = router(deliver=EVERYTHING).candidates(name, TURN_MESH, port)
    except Unroutable:
        return
    assert found
    for candidate in found:
        address = ip_address(candidate.address)
        assert refusal(address) is None
        assert 1 <= candidate.port <= 65535
