"""The roles' configurations made from the configuration file."""

from ipaddress import IPv4Network, ip_address
from pathlib import Path

from crossnet.app import role_configs
from crossnet.config.file import load
from crossnet.config.sections import Config
from discovery.model.spec import GatewaySpec, TurnSpec
from sniproxy.tunnel.epoch import epoch_in
from turnreg.client.control_connection import Credentials
from turnreg.registrar.config import Issued, Register, RestSecret

FILE = """
network: b
discovery: ["https://10.0.0.2:8600", "https://discovery.example", "http://[::1]"]
keys: {ab-1: {file: key, from: a, to: b}}
import: [{names: ["*.shop.example"], from: [a, c], prefer: remote}]
relay: {id: r, listen: ["10.0.0.9:443", "[fd00::9]:443"], allow: [10.0.0.0/8], deliver: ["10.1.0.0/16:443"],
        max_hello: 32KiB, zone: eu-1}
dns: {listen: "0.0.0.0:53", upstream: [10.0.0.10, "[fd00::53]:5353"], ttl: 7s}
gateway:
  id: gw-1
  allow: ["10.0.0.0/16:443,8443"]
  listen: "0.0.0.0:7443"
  advertise: 192.0.2.1:7443
  weight: 3
  zone: eu-2
  turn: {a: {issue: true}, c: {secret: {file: secret}}, d: {username: u, password: {file: secret}}}
turn: {id: t, zone: eu-1, listen: "0.0.0.0:3478", relay_address: 10.0.0.7, users: {u: {file: secret}}, allow_peers: [127.0.0.0/8]}
"""


EPOCH = bytes(range(16))


def config(folder: Path) -> Config:
    (folder / "key").write_text("0a" * 32)
    (folder / "secret").write_text("hush\n")
    (folder / "x.yaml").write_text(FILE)
    return load(folder / "x.yaml")


def test_the_relay(tmp_path: Path) -> None:
    read = config(tmp_path)
    assert read.relay is not None
    made = role_configs.relay_config(read, read.relay, [])
    assert made.listen == (("10.0.0.9", 443), ("fd00::9", 443))
    assert made.allow == (IPv4Network("10.0.0.0/8"),)
    assert made.deliver.allows(ip_address("10.1.2.3"), 443)
    assert not made.deliver.allows(ip_address("10.1.2.3"), 444)
    assert made.max_hello_bytes == 32768
    assert (made.zone, made.pool) == ("eu-1", 2)
    rule = made.imports.rule_for("orders.shop.example")
    assert rule is not None
    assert (rule.sources, rule.prefer) == (("a", "c"), "remote")


def test_the_resolver(tmp_path: Path) -> None:
    read = config(tmp_path)
    assert read.dns is not None
    made = role_configs.dns_config(read, read.dns)
    assert list(map(str, made.upstream)) == ["10.0.0.10", "[fd00::53]:5353"]
    assert made.ttl_s == 7


def test_the_gateway_and_its_registrar(tmp_path: Path) -> None:
    read = config(tmp_path)
    assert read.gateway is not None
    made = role_configs.gateway_config(read, read.gateway, [("127.0.0.1", 8690)])
    assert (made.listen, made.guard) == ((("0.0.0.0", 7443),), (("127.0.0.1", 8690),))
    registrar = role_configs.registrar_config(read, read.gateway, epoch=EPOCH)
    assert registrar.turn == {
        "a": Issued(),
        "c": RestSecret(secret="hush"),
        "d": Credentials(username="u", password="hush"),
    }
    assert registrar.allow == {}
    assert (registrar.ca, registrar.register, registrar.replicas, registrar.weight) == ({}, Register.ALL, 2, 3)
    assert epoch_in(registrar.proto) == EPOCH
    expected = GatewaySpec(address="192.0.2.1:7443", weight=3, zone="eu-2", proto=list(registrar.proto))
    assert role_configs.gateway_spec(read.gateway, ("0.0.0.0", 7443), EPOCH) == expected
    assert role_configs.keys(read)["ab-1"].secret == b"\n" * 32


def test_the_registrar_has_its_ca_and_options(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("its PEM")
    (tmp_path / "crossnet.yaml").write_text(
        "network: b\ndiscovery: http://127.0.0.1:1\n"
        "gateway: {id: gw-1, allow: [], register: imported, replicas: 3, turn: {a: {issue: true, ca: ca.pem}}}\n"
    )
    read = load(tmp_path / "crossnet.yaml")
    assert read.gateway is not None
    registrar = role_configs.registrar_config(read, read.gateway, epoch=EPOCH)
    assert (registrar.ca, registrar.register, registrar.replicas) == ({"a": "its PEM"}, Register.IMPORTED, 3)


def test_the_turn_server(tmp_path: Path) -> None:
    read = config(tmp_path)
    assert read.turn is not None
    made = role_configs.turn_config(read, read.turn)
    assert (made.users, made.realm, made.secrets) == ({"u": "hush"}, "svc.mesh.internal", ())
    assert made.allowed_peers is not None
    expected = TurnSpec(
        url="turn:10.0.0.7:3478?transport=tcp",
        relay_addresses=["10.0.0.7"],
        port_min=49152,
        port_max=65535,
        zone="eu-1",
    )
    assert role_configs.turn_spec(read.turn, ("0.0.0.0", 3478)) == expected
    assert role_configs.turn_spec(read.turn, ("10.0.0.8", 3478)).url == "turn:10.0.0.8:3478?transport=tcp"


def test_discovery_servers_whose_address_is_known_are_guarded(tmp_path: Path) -> None:
    assert role_configs.discovery_endpoints(config(tmp_path)) == [("10.0.0.2", 8600), ("::1", 80)]


TURN = """
network: b
discovery: ["https://10.0.0.2:8600"]
turn:
  id: t
  listen: "0.0.0.0:3478"
  listen_udp: "0.0.0.0:3478"
  tls: {listen: "0.0.0.0:5349", cert: secret, key: key}
  relay_address: [10.0.0.7, "fd00::7"]
  advertise_relay_address: [192.0.2.7, "2001:db8::7"]
  secret: [{file: secret}, {file: key}]
  udp_allocations: true
  active_connect: true
  max_allocations_per_user: 4
  max_streams_per_user: 100
  max_bytes_per_second_per_user: 10MiB
"""


def test_all_of_the_turn_server(tmp_path: Path) -> None:
    config(tmp_path)
    (tmp_path / "turn.yaml").write_text(TURN)
    read = load(tmp_path / "turn.yaml")
    assert read.turn is not None
    made = role_configs.turn_config(read, read.turn)
    assert (made.listen_udp, made.listen_tls) == ((("0.0.0.0", 3478),), (("0.0.0.0", 5349),))
    assert (made.tls_cert, made.tls_key) == (tmp_path / "secret", tmp_path / "key")
    assert made.relay_addresses == ("10.0.0.7", "fd00::7")
    assert made.advertised == {"10.0.0.7": "192.0.2.7", "fd00::7": "2001:db8::7"}
    assert made.secrets == ("hush", "0a" * 32)
    assert made.udp_allocations
    assert made.active_connect
    limits = made.limits
    assert (limits.max_allocations_per_account, limits.max_connections_per_account) == (4, 100)
    assert limits.max_bytes_per_second_per_account == 10 * 1024 * 1024
    spec = role_configs.turn_spec(read.turn, ("0.0.0.0", 5349), tls=True)
    assert spec.url == "turns:192.0.2.7:5349?transport=tcp"
    assert spec.relay_addresses == ["192.0.2.7", "2001:db8::7"]


def test_discovery_servers_and_etcd_members_are_guarded(tmp_path: Path) -> None:
    (tmp_path / "crossnet.yaml").write_text(
        'network: b\ninsecure: true\ndiscovery: ["https://10.0.0.1:8600", "https://disc.example:8601", "https://disc2.example"]\n'
        'discovery_server: {listen: "127.0.0.1:0", store: "etcd:https://10.0.0.2:2379,https://10.0.0.3:2379"}\n'
        "gateway: {id: gw-1, allow: [], turn: {a: {issue: true}}}\n"
    )
    read = load(tmp_path / "crossnet.yaml")
    assert role_configs.discovery_endpoints(read) == [("10.0.0.1", 8600), ("10.0.0.2", 2379), ("10.0.0.3", 2379)]
    assert role_configs.discovery_names(read) == [("disc.example", 8601), ("disc2.example", 443)]
