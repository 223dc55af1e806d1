"""Ports of imported services: which services count, in which range, and how many at most."""

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Kind, Mesh
from discovery.model.spec import NetworkSpec, ServiceSpec
from sniproxy.relay.service_ports import MAX_PORTS, service_ports
from tests.support.fixed_discovery import record

IMPORTS = Imports([ImportRule(names=("*.shop.example",), sources=("b",))])


def mesh(*services: tuple[str, str, list[int]]) -> Mesh:
    records = [record(Kind.NETWORK, network, network, NetworkSpec()) for network in ("a", "b", "c")]
    for network, name, ports in services:
        spec = ServiceSpec(name=name, ports={str(port): ["10.0.0.1:1"] for port in ports})
        records.append(record(Kind.SERVICE, network, name, spec))
    return Mesh.of(records)


def test_only_services_that_are_imported_from_that_network_count() -> None:
    found = mesh(
        ("b", "one.shop.example", [8443, 9000]),
        ("b", "other.example", [1111]),
        ("c", "one.shop.example", [2222]),
        ("a", "two.shop.example", [3333]),
    )
    assert service_ports(found, "a", IMPORTS, 1, 65535) == [8443, 9000]
    assert service_ports(found, "a", IMPORTS, 8444, 9000) == [9000]
    assert service_ports(found, "a", Imports([]), 1, 65535) == []


def test_own_services_count_if_asked_for_and_imported() -> None:
    imports = Imports([ImportRule(names=("*.shop.example",), sources=("a", "b"))])
    found = mesh(
        ("a", "one.shop.example", [3333]),
        ("a", "one.other.example", [4444]),
        ("b", "two.shop.example", [8443]),
    )
    assert service_ports(found, "a", imports, 1, 65535) == [8443]
    assert service_ports(found, "a", imports, 1, 65535, own=True) == [3333, 8443]
    assert service_ports(found, "a", IMPORTS, 1, 65535, own=True) == [8443], "imported from b alone"


def test_there_is_a_maximum() -> None:
    found = mesh(("b", "one.shop.example", list(range(2000, 2000 + MAX_PORTS + 50))))
    assert service_ports(found, "a", IMPORTS, 1, 65535) == list(range(2000, 2000 + MAX_PORTS))
