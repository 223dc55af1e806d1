"""The loop guard: parts of crossnet by their records, by configuration, and on every address of this host."""

from ipaddress import ip_address

import pytest

from discovery.model.addresses import Address, BadAddress
from discovery.model.mesh import AnyRecord, GatewaySpec, Kind, Mesh, RelaySpec, TurnSpec
from sniproxy.access.loop_guard import LoopGuard
from tests.support.fixed_discovery import record


def turn(network: str, url: str) -> AnyRecord:
    spec = TurnSpec(url=url, relay_addresses=["10.0.0.7"], port_min=49152, port_max=65535)
    return record(Kind.TURN, network, "turn-1", spec)


MESH = Mesh.of(
    [
        record(Kind.RELAY, "b", "relay-1", RelaySpec(addresses=["10.1.0.9", "fd00::9"], ports=[443, 8443])),
        record(Kind.RELAY, "a", "relay-1", RelaySpec(addresses=["10.0.0.9"], ports=[443])),
        record(Kind.GATEWAY, "b", "gw-1", GatewaySpec(address="10.1.0.8:7443")),
        record(Kind.GATEWAY, "a", "gw-1", GatewaySpec(address="10.0.0.8:7443")),
        turn("a", "turn:192.0.2.7:3478?transport=tcp"),
        turn("c", "turns:[2001:db8::7]?transport=tcp"),
        turn("d", "turn:turn.example:3478?transport=tcp"),
        record(Kind.RELAY, "b", "odd", RelaySpec(addresses=["not an address"], ports=[443])),
        record(Kind.GATEWAY, "b", "odd", GatewaySpec(address="not an endpoint")),
        turn("e", "nonsense"),
    ]
)


@pytest.mark.parametrize(
    ("address", "port", "stopped"),
    [
        ("10.1.0.9", 443, True),
        ("10.1.0.9", 8443, True),
        ("fd00::9", 443, True),
        ("10.1.0.9", 80, False),
        ("10.1.0.8", 7443, True),
        ("192.0.2.7", 3478, True),  # every network's TURN server: a gateway registers there
        ("2001:db8::7", 5349, True),
        ("10.0.0.9", 443, False),  # another network's relay: here the address may be a service's
        ("10.0.0.8", 7443, False),
        ("10.1.0.5", 8443, False),
    ],
)
def test_by_record(address: str, port: int, stopped: bool) -> None:
    assert LoopGuard("b").stops(ip_address(address), port, MESH) is stopped


def test_by_configuration() -> None:
    guard = LoopGuard("b", [("10.1.0.2", 8600), ("::1", 8690)])
    assert guard.stops(ip_address("10.1.0.2"), 8600, Mesh.EMPTY)
    assert guard.stops(ip_address("::1"), 8690, Mesh.EMPTY)
    assert not guard.stops(ip_address("10.1.0.2"), 8601, Mesh.EMPTY)
    guard.add("10.1.0.3", 443)
    assert guard.stops(ip_address("10.1.0.3"), 443, Mesh.EMPTY)
    with pytest.raises(BadAddress):
        guard.add("localhost", 443)


@pytest.mark.parametrize("anywhere", ["0.0.0.0", "::"])
def test_a_wildcard_is_every_address_of_this_host_and_no_other(anywhere: str) -> None:
    asked: list[Address] = []

    def is_own(address: Address) -> bool:
        asked.append(address)
        return str(address) == "10.1.0.4"

    guard = LoopGuard("b", [(anywhere, 8600)], is_own=is_own)
    assert guard.stops(ip_address("10.1.0.4"), 8600, MESH)
    assert not guard.stops(ip_address("10.1.0.5"), 8600, MESH)
    assert not guard.stops(ip_address("10.1.0.4"), 8443, MESH)
    assert [str(address) for address in asked] == ["10.1.0.4", "10.1.0.5"], "asked only where the port is ours"


def test_a_new_mesh_counts_at_once() -> None:
    guard = LoopGuard("b")
    where = ip_address("10.1.0.77")
    assert not guard.stops(where, 443, MESH)
    grown = MESH.apply([record(Kind.RELAY, "b", "relay-2", RelaySpec(addresses=["10.1.0.77"], ports=[443]))])
    assert guard.stops(where, 443, grown)
    assert not guard.stops(where, 443, MESH)
