"""Addresses in TURN records of other networks: which are refused, how many, and how often they are tried."""

import pytest

from discovery.model.addresses import Address, TargetList
from discovery.model.mesh import AnyRecord, Kind, Mesh, Record
from discovery.model.spec import GatewaySpec, RelaySpec, ServiceSpec, Spec, TurnSpec
from turnreg.registrar.destinations import (
    FREE_TRIES,
    MAX_ADDRESSES,
    MAX_KNOWN,
    PAUSES,
    WINDOW_S,
    Destinations,
)

OURS = "10.77.0.2"


def record(kind: Kind, spec: Spec, network: str = "b") -> AnyRecord:
    return Record(kind=kind, network=network, id="x-1", revision=1, spec=spec)


MESH = Mesh.of(
    [
        record(
            Kind.SERVICE, ServiceSpec(name="redis.shop.example", ports={"443": ["10.77.0.5:6379", "[fd00::5]:6379"]})
        ),
        record(Kind.SERVICE, ServiceSpec(name="theirs.example", ports={"443": ["10.66.0.5:6379"]}), "c"),
        record(Kind.RELAY, RelaySpec(addresses=["10.77.0.10"], ports=[443])),
        record(Kind.GATEWAY, GatewaySpec(address="10.77.0.11:7443")),
        record(Kind.TURN, TurnSpec(url="turn:10.77.0.20:3478", relay_addresses=[], port_min=1, port_max=2)),
    ]
)


def is_ours(address: Address) -> bool:
    return str(address) == OURS


@pytest.fixture
def destinations() -> Destinations:
    made = Destinations("b", is_own=is_ours)
    made.reconfigure({}, [("10.77.0.30", 8600), ("0.0.0.0", 8690)])
    return made


@pytest.mark.parametrize(
    ("address", "port", "why"),
    [
        ("10.77.0.5", 6379, "a service, relay or gateway"),
        ("fd00::5", 6379, "a service, relay or gateway"),
        ("64:ff9b::10.77.0.5", 6379, "a service, relay or gateway"),
        ("2002:0a4d:0005::1", 6379, "a service, relay or gateway"),
        ("10.77.0.10", 443, "a service, relay or gateway"),
        ("10.77.0.11", 7443, "a service, relay or gateway"),
        ("10.77.0.30", 8600, "a discovery server or a listener"),
        ("64:ff9b::10.77.0.30", 8600, "a discovery server or a listener"),
        (OURS, 8690, "a discovery server or a listener"),
        (OURS, 22, "an address of this host"),
        ("127.0.0.1", 3478, "loopback"),
        ("::ffff:10.77.0.5", 6379, "IPv4-mapped"),
        ("169.254.169.254", 80, "link-local"),
    ],
)
def test_what_only_we_can_reach_is_refused(destinations: Destinations, address: str, port: int, why: str) -> None:
    assert why in str(destinations.refusal("c", address, port, MESH, 0.0))


@pytest.mark.parametrize(
    ("address", "port"),
    [("10.77.0.5", 6380), ("10.77.0.30", 3478), ("10.66.0.5", 6379), ("10.77.0.20", 3478), ("192.168.7.7", 3478)],
)
def test_private_networks_need_no_setting(destinations: Destinations, address: str, port: int) -> None:
    assert destinations.refusal("c", address, port, MESH, 0.0) is None


def test_a_pin_lifts_what_it_names_and_refuses_the_rest(destinations: Destinations) -> None:
    allow = {"c": TargetList.parse([OURS, "127.0.0.0/8", "10.77.0.0/16"])}
    destinations.reconfigure(allow, [("10.77.0.30", 8600), ("127.0.0.1", 8690)])
    for address in (OURS, "127.0.0.1", "10.77.3.4"):
        assert destinations.refusal("c", address, 3478, MESH, 0.0) is None
    assert "not in gateway.turn.c.allow" in str(destinations.refusal("c", "10.78.0.1", 3478, MESH, 0.0))
    # No pin opens these.
    for address, port in (("10.77.0.5", 6379), ("10.77.0.30", 8600), ("127.0.0.1", 8690), ("169.254.169.254", 80)):
        assert destinations.refusal("c", address, port, MESH, 0.0) is not None
    # It is for one network.
    assert "loopback" in str(destinations.refusal("d", "127.0.0.1", 3478, MESH, 0.0))
    # A pinned network may have as many servers as it likes.
    for number in range(50):
        address = f"10.77.9.{number}"
        assert destinations.refusal("c", address, 3478, MESH, 0.0) is None
        destinations.began("c", address, 3478, 0.0)


def test_a_network_gets_few_addresses_an_hour(destinations: Destinations) -> None:
    for number in range(MAX_ADDRESSES):
        assert destinations.refusal("c", "10.66.0.1", 1000 + number, MESH, number) is None
        destinations.began("c", "10.66.0.1", 1000 + number, number)
    why = destinations.refusal("c", "10.66.0.2", 1000, MESH, 10.0)
    assert why is not None
    assert "gateway.turn.c.allow" in why
    assert destinations.refusal("c", "10.66.0.1", 1000, MESH, 10.0) is None  # one of the four
    assert destinations.refusal("d", "10.66.0.2", 1000, MESH, 10.0) is None  # another network
    assert destinations.refusal("c", "10.66.0.2", 1000, MESH, WINDOW_S) is None  # the first one is forgotten


def test_an_address_that_speaks_no_turn_is_tried_less_and_less(destinations: Destinations) -> None:
    now, pauses = 0.0, []
    for _ in range(20):
        wait_s = destinations.wait_s("c", "10.66.0.1", 6379, now)
        pauses.append(wait_s)
        now += wait_s
        destinations.began("c", "10.66.0.1", 6379, now)
    assert pauses[: FREE_TRIES + 3] == [0.0] * FREE_TRIES + [1.0, 2.0, 4.0]
    assert pauses[-1] == PAUSES.longest_s
    assert destinations.wait_s("c", "10.66.0.1", 6380, now) == 0.0
    # Once it has spoken TURN it is tried as its registration likes, for an hour.
    destinations.succeeded("c", "10.66.0.1", 6379, now)
    for _ in range(20):
        destinations.began("c", "10.66.0.1", 6379, now)
        assert destinations.wait_s("c", "10.66.0.1", 6379, now) == 0.0
    for later_s in (WINDOW_S / 2, WINDOW_S):
        destinations.began("c", "10.66.0.1", 6379, now + later_s)
    assert destinations.wait_s("c", "10.66.0.1", 6379, now + WINDOW_S) > 0.0


def test_an_operators_change_is_tried_at_once(destinations: Destinations) -> None:
    for _ in range(9):
        destinations.began("c", "10.66.0.1", 6379, 0.0)
    assert destinations.wait_s("c", "10.66.0.1", 6379, 0.0) > 0.0
    destinations.reconfigure({}, ())
    assert destinations.wait_s("c", "10.66.0.1", 6379, 0.0) == 0.0


def test_what_is_remembered_is_bounded(destinations: Destinations) -> None:
    destinations.reconfigure({"c": TargetList.parse(["10.0.0.0/8"])}, ())
    for number in range(MAX_KNOWN + 100):
        destinations.began("c", f"10.1.{number // 250}.{number % 250}", 1, number / 1000)
    assert len(destinations._tried["c"]) == MAX_KNOWN
