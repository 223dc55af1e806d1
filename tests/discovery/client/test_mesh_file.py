"""A mesh.yaml instead of a server."""

import asyncio
from pathlib import Path

import pytest

from discovery.client.contract import DiscoveryError
from discovery.client.mesh_file import BadFile, StaticDiscovery, format_mesh, load_mesh
from discovery.model.addresses import TargetList
from discovery.model.mesh import Kind, Mesh, RelaySpec, ServiceSpec, VipSpec
from tests.discovery.waiting import LogWaiter

DESIGN = """
networks: [{id: a}, {id: b}]
services: [{name: orders.shop.svc.cluster.local, network: b, ports: {8443: ["10.1.0.5:8443"]}}]
gateways: [{network: b, id: gw-1, address: "10.9.0.1:7443"}]
relays:   [{network: a, id: relay-1, addresses: ["10.0.0.9"], ports: [443]}]
"""
RELAY = RelaySpec(addresses=["10.0.0.10"], ports=[443])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(DESIGN)
    return path


def test_the_documented_example(path: Path) -> None:
    mesh = load_mesh(path)
    assert mesh.networks == {"a", "b"}
    service = mesh.service("b", "orders.shop.svc.cluster.local")
    assert service is not None
    assert service.spec.ports == {"8443": ["10.1.0.5:8443"]}
    assert service.id == "orders.shop.svc.cluster.local"
    assert mesh.gateways("b")[0].spec.address == "10.9.0.1:7443"
    assert mesh.gateways("b")[0].spec.proto == ["framed/1"]
    assert mesh.relays("a")[0].spec.addresses == ["10.0.0.9"]
    assert mesh.revision == 1


def test_all_errors_are_reported_with_their_paths(path: Path) -> None:
    path.write_text(
        """
        networks: [{id: a}, {id: b}, {id: a}]
        services:
          - {name: orders.shop, network: c, ports: {8443: ["10.1.0.5"], 99999: [], "0443": ["127.0.0.1:1"]}}
          - {name: orders, ports: {8443: []}, proxi: true}
          - {name: orders.shop, network: b, ports: {yes: []}}
          - {id: S, name: pay.shop, network: b, ports: {1: []}}
          - {name: pay.shop, network: B, ports: {1: []}}
          - 3
        gateways: [{network: b, id: gw-1, address: gw.example:7443}]
        relays: {network: a}
        allocations: []
        relay: []
        vips: [{network: b, id: 7, name: orders.shop, address: 10.200.0.1}]
        """
    )
    with pytest.raises(BadFile) as caught:
        load_mesh(path)
    name = str(path)
    assert str(caught.value).split("\n") == [
        f"{name}: $.networks[2]: expected each network of a network once, got that of $.networks[0] again",
        f"{name}: $.services[0].ports.8443[0]: expected ip:port or [ipv6]:port, got '10.1.0.5'",
        f"{name}: $.services[0].ports.99999: expected a port 1-65535 without leading zeros as key, got '99999'",
        f"{name}: $.services[0].ports.0443: expected a port 1-65535 without leading zeros as key, got '0443'",
        f"{name}: $.services[0].ports.0443[0]: expected an address that may be dialled, got 127.0.0.1:1, which is loopback",
        f"{name}: $.services[1].network: expected a value, got nothing",
        f"{name}: $.services[1].proxi: expected one of {', '.join(ServiceSpec.__struct_fields__)}, got an unknown key",
        f"{name}: $.services[2].ports.yes: expected a port 1-65535 without leading zeros as key, got 'yes'",
        f"{name}: $.services[3].id: expected an id: lower-case letters, digits, inner '-', '.', '_', 63 at most, got 'S'",
        f"{name}: $.services[4].network: expected a network id: lower-case letters, digits, inner hyphens, got 'B'",
        f"{name}: $.services[5]: expected a mapping, got 3",
        f"{name}: $.gateways[0].address: expected ip:port or [ipv6]:port, got 'gw.example:7443'",
        f"{name}: $.relays: expected a list, got a mapping",
        f"{name}: $.allocations: expected no TURN servers in a file, got a section that needs a discovery server",
        f"{name}: $.relay: expected one of networks, services, gateways, relays, vips, got an unknown key",
        f"{name}: $.vips[0].id: expected a string, got 7",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "$: expected a mapping of networks"),
        ("[]", "$: expected a mapping of networks"),
        ("services: []", "$.networks: expected a list, got nothing"),
        (
            "networks: [{id: a}]\nrelays: [{network: b, id: r, addresses: [10.0.0.9], ports: [443]}]",
            "$.relays[0].network: expected one of the networks listed under $.networks, got 'b'",
        ),
        ("networks: [{id: a, x: 1}]", "$.networks[0].x: expected one of no keys at all, got an unknown key"),
        ("networks: [{id: a}]\nnetworks: []", "$.networks: expected each key once, got it again in line 2, column 1"),
    ],
)
def test_faults(path: Path, text: str, told: str) -> None:
    path.write_text(text)
    with pytest.raises(BadFile) as caught:
        load_mesh(path)
    assert str(caught.value).startswith(f"{path}: {told}")


def test_an_allowed_range_lets_a_service_be_on_loopback(path: Path) -> None:
    path.write_text(DESIGN.replace("10.1.0.5", "127.0.0.1"))
    with pytest.raises(BadFile, match="loopback"):
        load_mesh(path)
    assert load_mesh(path, TargetList.parse(["127.0.0.1:8443"])).services("b")


def test_published_records_are_merged_in(path: Path) -> None:
    discovery = StaticDiscovery(path, network="a")
    assert discovery.synced
    seen: list[Mesh] = []
    stop = discovery.subscribe(seen.append)
    discovery.publish(Kind.RELAY, "relay-2", RELAY)
    discovery.publish(Kind.RELAY, "relay-2", RELAY)
    assert [relay.id for relay in discovery.mesh.relays("a")] == ["relay-1", "relay-2"]
    # The file takes precedence over published records.
    discovery.publish(Kind.RELAY, "relay-1", RELAY)
    discovery.withdraw(Kind.RELAY, "relay-1")
    assert discovery.mesh.relays("a")[0].spec.addresses == ["10.0.0.9"]
    discovery.publish(Kind.RELAY, "relay-3", RELAY, network="b")
    discovery.withdraw(Kind.RELAY, "relay-3", network="b")
    assert [len(mesh) for mesh in seen] == [6, 7, 6]
    assert seen[0].revision < seen[1].revision < seen[2].revision
    stop()
    with pytest.raises(ValueError, match="network"):
        StaticDiscovery(path).publish(Kind.RELAY, "r", RELAY)


@pytest.mark.anyio
async def test_a_changed_file_is_read_again(path: Path, logged: LogWaiter) -> None:
    discovery = StaticDiscovery(path, network="a", reload_s=0.01)
    discovery.publish(Kind.RELAY, "relay-2", RELAY)
    before = discovery.mesh.revision
    changed = asyncio.Event()
    discovery.subscribe(lambda _: changed.set())
    async with asyncio.TaskGroup() as group, asyncio.timeout(10):
        task = group.create_task(discovery.run())
        await asyncio.to_thread(path.write_text, DESIGN.replace("relay-1", "relay-9"))
        await changed.wait()
        assert [relay.id for relay in discovery.mesh.relays("a")] == ["relay-2", "relay-9"]
        assert discovery.mesh.revision > before
        await asyncio.to_thread(path.write_text, "broken: ")
        await logged.until("cannot be used")
        assert len(discovery.mesh.relays("a")) == 2
        task.cancel()


@pytest.mark.anyio
async def test_it_implements_the_interface_of_a_client(path: Path) -> None:
    discovery = StaticDiscovery(path, network="a")
    discovery.publish(Kind.RELAY, "relay-2", RELAY)
    assert await discovery.settled(0)
    with pytest.raises(DiscoveryError) as caught:
        await discovery.turn_credentials("b")
    assert caught.value.code == "static"
    async with asyncio.TaskGroup() as group:
        task = group.create_task(discovery.run())
        await asyncio.sleep(0)
        task.cancel()
    await discovery.close()
    assert len(discovery.mesh.relays("a")) == 1


def test_if_absent_does_not_replace_a_record(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text("networks: [{id: a}]\nvips: [{network: a, id: v1, name: orders.shop, address: 10.200.0.1}]\n")
    discovery = StaticDiscovery(path, network="a")
    for record_id, last in (("v1", 9), ("v2", 2), ("v2", 3)):
        spec = VipSpec(name="orders.shop", address=f"10.200.0.{last}")
        discovery.publish(Kind.VIP, record_id, spec, if_absent=True)
    assert [vip.spec.address for vip in discovery.mesh.vips("a")] == ["10.200.0.1", "10.200.0.2"]


def test_a_formatted_mesh_is_read_back_unchanged(tmp_path: Path) -> None:
    first, second = tmp_path / "mesh.yaml", tmp_path / "again.yaml"
    first.write_text(
        "networks: [{id: a}, {id: b}]\n"
        "services: [{network: b, name: o.s, ports: {8443: ['10.1.0.1:1', '[fd00::5]:2']}, proxy_protocol: true},\n"
        "           {network: b, name: p.s, ports: {1: []}, proxy_protocol: v1}]\n"
        "gateways: [{network: b, id: gw, address: '10.9.0.1:7443'}]\n"
        "relays: [{network: a, id: r, addresses: [10.0.0.9], ports: [443], sources: {t: [10.0.0.9]}}]\n"
        "vips: [{network: a, id: v1, name: o.s, address: 10.200.0.1}]\n"
    )
    mesh = load_mesh(first)
    second.write_text(format_mesh(mesh))
    assert list(load_mesh(second)) == list(mesh)
    second.write_text(format_mesh([record for record in mesh if record.kind is not Kind.NETWORK]))
    assert list(load_mesh(second)) == list(mesh)  # a network is declared if it has a record
    second.write_text(format_mesh([]))
    assert len(load_mesh(second)) == 0
