# ruff: noqa: E501, ISC004 - a table of files and of the line that each one gets
"""The configuration file: an example, and every class of error with its line."""

import os
from pathlib import Path

import pytest
import yaml

from crossnet.config.file import ConfigError, effective, load, warnings

DESIGN_EXAMPLE = """
network: a
domain: svc.mesh.internal
discovery: [https://10.0.0.2:8600]
discovery_tls: {ca: ca.pem}
token: {file: token}
admin: 127.0.0.1:8690
keys: {ab-1: {file: ab-1.key, from: a, to: b}}
import: [{names: ["*.shop.svc.cluster.local"], from: [b]}]
relay:    {id: relay-1, listen: ["0.0.0.0:443"], advertise: ["10.0.0.9"], allow: ["10.0.0.0/8"], deliver: [], direct: [], pool: 2}
dns:      {listen: "0.0.0.0:53", upstream: ["10.0.0.10"], ttl: 5s}
gateway:  {id: gw-1, allow: ["10.0.0.0/16:443,8443"], accept: [framed], turn: {b: {issue: true}}}
turn:     {id: turn-1, listen: ["0.0.0.0:3478"], relay_address: 10.0.0.7, ports: 49152-65535, secret: {file: turn.secret}}
turn_servers: [{id: turn-2, url: "turn:10.0.0.8:3478?transport=tcp", relay_addresses: [10.0.0.8], port_min: 49152, port_max: 65535}]
discovery_server: {listen: "0.0.0.0:8600", store: "sqlite:discovery.db", tls: {cert: c.pem, key: k.pem}, tokens: {file: tokens.yaml}, turn_secrets: {}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "ca.pem": "certificate",
        "c.pem": "certificate",
        "k.pem": "key",
        "token": "hush-token\n",
        "ab-1.key": "0f" * 32 + "\n",
        "turn.secret": "hush-turn\r\n",
        "tokens.yaml": "[]",
        "bad-tokens.yaml": "[{hash: x, network: b}]",
        "bad-mesh.yaml": "networks: [{id: a}]\nservices: [{name: a.b, network: a, ports: {1: ['127.0.0.1:1']}}]",
        "empty": "\n",
        "two-lines": "a\nb\n",
        "mesh.yaml": "networks: []",
    }.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o600)
    return tmp_path


def lines(folder: Path, text: str) -> list[str]:
    """Return the errors of a file, without the file's name."""
    path = folder / "crossnet.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(path)
    told = str(refused.value).splitlines()
    assert all(line.startswith(f"{path}: $") for line in told)
    return [line.removeprefix(f"{path}: ") for line in told]


def test_the_example_of_the_design_is_good(folder: Path) -> None:
    path = folder / "crossnet.yaml"
    path.write_text(DESIGN_EXAMPLE)
    config = load(path)
    assert config.roles == ("discovery_server", "turn", "turn_servers", "dns", "relay", "gateway")
    assert config.token is not None
    assert config.token.text == "hush-token"
    assert config.keys["ab-1"].secret == b"\x0f" * 32
    assert config.turn is not None
    assert [secret.value for secret in config.turn.secret] == [b"hush-turn"]
    assert config.dns is not None
    assert (str(config.dns.upstream[0]), config.dns.ttl_s) == ("10.0.0.10", 5.0)
    assert warnings(config) == ["$.keys: none is to 'a': the gateway can take no stream"]


def test_the_effective_configuration_reads_back_and_hides_secrets(folder: Path) -> None:
    path = folder / "crossnet.yaml"
    path.write_text(DESIGN_EXAMPLE)
    shown = effective(load(path))
    assert "hush" not in shown
    assert "0f0f" not in shown
    read = yaml.safe_load(shown)
    assert read["token"] == "***"
    assert read["keys"]["ab-1"] == {"file": "***", "from": "a", "to": "b"}
    assert read["turn"]["secret"] == ["***"]
    assert read["dns"]["ttl"] == "5s"
    assert read["drain"] == "30s"
    assert read["admin"] == "127.0.0.1:8690"
    assert read["turn"]["ports"] == "49152-65535"
    assert read["import"] == [{"names": ["*.shop.svc.cluster.local"], "from": ["b"], "prefer": "local"}]
    assert "gateway" in read
    assert "listen" in read["gateway"]


def test_a_file_of_one_role_is_enough(folder: Path) -> None:
    path = folder / "crossnet.yaml"
    path.write_text("network: a\ndiscovery: mesh.yaml\nrelay: {id: r, listen: 127.0.0.1:0}\n")
    config = load(path)
    assert config.static_mesh == folder / "mesh.yaml"
    assert config.roles == ("relay",)


def test_all_errors_are_reported_at_once(folder: Path) -> None:
    told = lines(
        folder,
        """
network: A_
tokn: x
admin: 127.0.0.1
relay: {id: relay-1, listen: ["0.0.0.0:443"], allow: ["10.0.0.0/33"], deliver: ["10.0.0.1/8", "10.0.0.0/8:0"], pol: 2}
gateway: {id: gw-1, turn: {b: {}}}
turn: {id: turn-1, listen: ["127.0.0.1:3478"], relay_address: 10.0.0.700}
""",
    )
    assert told == [
        "$.tokn: expected a known key such as token, got an unknown key",
        "$.network: expected a network id (a-z, 0-9, inner hyphens), got 'A_'",
        "$.admin: expected ip:port or [ipv6]:port, got '127.0.0.1'",
        "$.relay.pol: expected a known key such as pool, got an unknown key",
        "$.relay.allow[0]: expected a CIDR such as 10.0.0.0/8, got '10.0.0.0/33'",
        "$.relay.deliver[0]: expected a CIDR without host bits such as 10.0.0.0/8, got '10.0.0.1/8'",
        "$.relay.deliver[1]: expected PORTS as N, N-M or *, got '10.0.0.0/8:0'",
        "$.relay.advertise: expected the addresses that clients reach, since it listens on all, got nothing",
        "$.gateway.allow: expected a list, got nothing",
        "$.gateway.turn.b: expected one of {username, password}, {secret} and {issue: true}, got none",
        "$.turn.relay_address: expected an IP address, got '10.0.0.700'",
        "$.turn.secret: expected {file: PATH}, or users, got neither",
        "$.discovery: expected URLs, or a path ending in .yaml, since turn needs it, got nothing",
    ]


RELAY = "network: a\ndiscovery: mesh.yaml\nrelay: {id: r, listen: ['127.0.0.1:0']"
DNS = "network: a\ndiscovery: mesh.yaml\ndns: {listen: 127.0.0.1:0"
GATEWAY = "network: a\ndiscovery: http://127.0.0.1:1\ngateway: {id: g, allow: []"
TURN = "network: a\ndiscovery: http://127.0.0.1:1\nturn: {id: t, listen: '0.0.0.0:3478', relay_address: 10.0.0.7"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "$: expected a mapping, got null"),
        ("[]", "$: expected a mapping, got a list"),
        ("{}", "$.network: expected a network id (a-z, 0-9, inner hyphens), got nothing"),
        ("network: a\nnetwork: b", "$.network: expected each key once, got it again in line 2, column 1"),
        ("network: [", "$: expected YAML, got did not find expected node content in line 2, column 1"),
        ("network: a\ndomain: a..b", "$.domain: expected a name ('a..b' has an empty label), got 'a..b'"),
        (
            "network: a\ndomain: svc.cluster.local",
            "$.domain: expected a zone apart from cluster.local, which is the cluster's own, got 'svc.cluster.local'",
        ),
        (
            "network: a\ndomain: local",
            "$.domain: expected a zone apart from cluster.local, which is the cluster's own, got 'local'",
        ),
        (
            f"{DNS}, search: [corp.internal]}}\ndomain: svc.corp.internal",
            "$.domain: expected a zone apart from corp.internal, which is a search domain, got 'svc.corp.internal'",
        ),
        ("network: a\ndiscovery: 10.0.0.1", "$.discovery: expected https://HOST:PORT, or a path ending in .yaml, got '10.0.0.1'"),
        ("network: a\ndiscovery: [absent.yaml]", "$.discovery[0]: expected a readable file, got 'absent.yaml' (No such file or directory)"),
        (
            "network: a\ndiscovery: [http://10.0.0.1:8600]",
            "$.discovery[0]: expected https, or http to loopback, or insecure: true, got 'http://10.0.0.1:8600'",
        ),
        ("network: a\ndiscovery: [mesh.yaml, mesh.yaml]", "$.discovery: expected URLs, and one path at most, got 2 paths"),
        ("network: a\ntoken: hush", "$.token: expected {file: PATH}, secrets stand in files of their own, got something else (not shown)"),
        ("network: a\ntoken: {file: absent}", "$.token.file: expected a readable file, got 'absent' (No such file or directory)"),
        ("network: a\ntoken: {file: empty}", "$.token.file: expected a file with a secret in it, got 'empty', which is empty"),
        ("network: a\ntoken: {file: two-lines}", "$.token.file: expected a file with one line of ASCII text, got 'two-lines', which has something else"),
        ("network: a\nkeys: {k: {file: token, from: a, to: b}}", "$.keys.k.file: expected a file with 64 hexadecimal digits, got 'token', which has something else"),
        ("network: a\nkeys: {k: {file: ab-1.key, from: a}}", "$.keys.k.to: expected a network id (a-z, 0-9, inner hyphens), got nothing"),
        ("network: a\nlog: {format: xml}", "$.log.format: expected json or logfmt, got 'xml'"),
        ("network: a\ndrain: soon", "$.drain: expected a duration such as 5s, or 0, got 'soon'"),
        ("network: a\nimport: [{names: [a.b], from: b}]", "$.import[0].from: expected a list, got 'b'"),
        ("network: a\nimport: [{names: [a.b], from: [b], prefer: both}]", "$.import[0].prefer: expected local or remote, got 'both'"),
        ("network: a\nimport: [{names: [a*.b], from: [b]}]", "$.import[0].names[0]: expected a lower-case name of two labels or more, each a label or '*', got 'a*.b'"),
        (f"{RELAY}, pool: -1}}", "$.relay.pool: expected a whole number 0-1000000, got -1"),
        (f"{RELAY}, pool: true}}", "$.relay.pool: expected a whole number 0-1000000, got true"),
        (f"{DNS}, ttl: 5}}", "$.dns.ttl: expected a duration such as 5s, got 5"),
        (f"{DNS}, ttl: 0s}}", "$.dns.ttl: expected whole seconds, 1s or more, got '0s'"),
        (f"{DNS}, ttl: 200h}}", "$.dns.ttl: expected a duration of at most 7d, got '200h'"),
        (f"{DNS}, upstream: [dns.example]}}", "$.dns.upstream[0]: expected ip, ip%interface, ip:port, tcp://ip, tls://ip#name or https://ip/path#name of a DNS server, got 'dns.example'"),
        (f"{GATEWAY}, accept: [framd]}}", "$.gateway.accept[0]: expected framed, got 'framd'"),
        (f"{GATEWAY}, turn: {{b: {{username: u}}}}}}", "$.gateway.turn.b.password: expected {file: PATH}, got nothing"),
        (f"{GATEWAY}, turn: {{b: {{issue: true, secret: {{file: token}}}}}}}}", "$.gateway.turn.b: expected one of {username, password}, {secret} and {issue: true}, got more"),
        (f"{GATEWAY}, listen: '0.0.0.0:1'}}", "$.gateway.advertise: expected ip:port that relays dial, since it listens on all addresses, got nothing"),
        (
            "network: a\ndiscovery: mesh.yaml\ngateway: {id: g, allow: [], turn: {b: {issue: true}}}",
            "$.gateway.turn: expected a discovery server, since allocations come and go, got a static mesh file",
        ),
        (f"{TURN}, advertise_relay_address: '::1', secret: {{file: token}}}}", "$.turn.advertise_relay_address: expected as many addresses of the same families as relay_address, got others"),
        (
            "network: a\ndiscovery: http://127.0.0.1:1\nturn: {id: t, listen: '0.0.0.0:1', relay_address: [10.0.0.7, 10.0.0.8], secret: {file: token}}",
            "$.turn.relay_address: expected one address of a family, got two",
        ),
        (f"{TURN.replace('10.0.0.7', '[]')}, secret: {{file: token}}}}", "$.turn.relay_address: expected one address of a family, got none"),
        (f"{TURN.replace('10.0.0.7', '0.0.0.0')}, secret: {{file: token}}}}", "$.turn.relay_address: expected an address of this host, got 0.0.0.0"),
        (
            f"domain: {'.'.join(['x' * 60] * 3)}\n{TURN}, secret: {{file: token}}}}",
            "$.turn.realm: expected one of at most 127 characters, got the domain, which is longer",
        ),
        (f"{TURN}, realm: {'x' * 128}, secret: {{file: token}}}}", "$.turn.realm: expected at most 127 characters, got 128"),
        (
            "network: a\ndiscovery: http://127.0.0.1:1\nturn: {id: t, relay_address: 10.0.0.7, secret: {file: token}}",
            "$.turn.listen: expected ip:port, or tls, got neither",
        ),
        (f"{TURN}, ports: 9-1, secret: {{file: token}}}}", "$.turn.ports: expected a range of ports such as 49152-65535, got '9-1'"),
        (
            "network: a\ndiscovery: http://127.0.0.1:1\nturn_servers: [{id: t, url: 'http://x', relay_addresses: []}]",
            "$.turn_servers[0].url: expected turn:HOST:PORT?transport=tcp or turns:HOST:PORT?transport=tcp, got 'http://x'",
        ),
        (
            "network: a\ndiscovery: http://127.0.0.1:1\n"
            "turn_servers: [{id: t, url: 'turn:10.0.0.8', relay_addresses: [10.0.0.8], port_min: 9, port_max: 8}]",
            "$.turn_servers[0].port_max: expected a port from 9 on, got 8",
        ),
        ("network: a\ndiscovery_server: {listen: '127.0.0.1:0', tokens: {file: bad-tokens.yaml}}", "$.discovery_server.tokens.file: expected a tokens file ($[0].hash: expected the SHA-256 of a token, 64 lower-case hexadecimal digits), got something else"),
        ("network: a\ndiscovery_server: {listen: '10.0.0.1:0', tls: {cert: c.pem, key: k.pem}}", "$.discovery_server.tokens: expected tokens, since it listens on 10.0.0.1:0, or insecure: true, got nothing"),
        ("network: a\ndiscovery_server: {listen: '10.0.0.1:0', tokens: {file: tokens.yaml}}", "$.discovery_server.tls: expected tls, since it listens on 10.0.0.1:0, or insecure: true, got nothing"),
        ("network: a\ndiscovery: bad-mesh.yaml", "$.discovery: expected a mesh file ($.services[0].ports.1[0]: expected an address that may be dialled), got 127.0.0.1:1, which is loopback"),
        ("network: a\ndiscovery_server: {listen: '127.0.0.1:0', store: 'etcd:http://127.0.0.1:1', etcd: {username: u}}", "$.discovery_server.etcd.password: expected username and password, or neither, got one of them"),
        ("network: a\ndiscovery_server: {listen: '127.0.0.1:0', store: 'etcd:http://10.0.0.1:1', etcd: {username: u, password: {file: token}}}", "$.discovery_server.store: expected https where there is a password, or http to loopback, or insecure: true, got 'http://10.0.0.1:1'"),
        ("network: a\ndiscovery_server: {listen: '127.0.0.1:0', store: postgres}", "$.discovery_server.store: expected memory, sqlite:PATH or etcd:URL,URL, got 'postgres'"),
    ],
)  # fmt: skip
def test_one_clear_line_for_each_error(folder: Path, text: str, told: str) -> None:
    assert lines(folder, text) == [told]


def test_targets_that_may_be_dialled_are_allowed_in_a_mesh_file(folder: Path) -> None:
    path = folder / "crossnet.yaml"
    path.write_text(
        "network: a\ndiscovery: bad-mesh.yaml\nrelay: {id: r, listen: 127.0.0.1:0, deliver: [127.0.0.1/32]}"
    )
    assert load(path).static_mesh is not None


def test_http_is_taken_to_loopback_and_where_it_is_asked_for(folder: Path) -> None:
    path = folder / "crossnet.yaml"
    for discovery in (
        "[http://127.0.0.1:1, 'http://[::1]:1', http://localhost:1]",
        "[http://10.0.0.1:1]\ninsecure: true",
    ):
        path.write_text(f"network: a\ndiscovery: {discovery}\n")
        load(path)


def test_probably_unintended_settings_are_warnings(folder: Path) -> None:
    (folder / "token").chmod(0o644)
    path = folder / "crossnet.yaml"
    path.write_text(
        "network: a\ntoken: {file: token}\ninsecure: true\ndiscovery: http://10.0.0.1\nrelay: {id: r, listen: 127.0.0.1:0}\n"
    )
    assert warnings(load(path)) == [
        f"$.token: {folder / 'token'} is readable by every user of this machine",
        "$.keys: none is from 'a': the relay can reach no other network",
        "$.insecure: discovery may be spoken to without TLS; tokens and records travel in the clear",
    ]


def test_relative_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "crossnet.yaml").write_text("network: a\ntoken: {file: token}\n")
    monkeypatch.chdir(folder.parent)
    config = load(Path(os.path.relpath(folder / "crossnet.yaml")))
    assert config.token is not None
    assert config.token.path == folder / "token"
