"""One process with real clients: a relay alone with a static mesh, its signals, its end, and starts that fail."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.running import Running, curl, free_port, mutual_tls_service, running
from tests.support.waiting import wait_until

NAME = "orders.shop.example"
RELAY = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: {drain}
import: [{{names: [orders.shop.example], from: [a]}}]
relay: {{id: relay-1, listen: "127.0.0.1:0", deliver: ["127.0.0.1/32:{port}"]}}
"""
MESH = """
networks: [{{id: a}}, {{id: b}}]
services: [{{name: orders.shop.example, network: a, ports: {{443: ["127.0.0.1:{port}"]}}}}]
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, list[str]]]:
    folder = tmp_path_factory.mktemp("service")
    with mutual_tls_service(folder, NAME, "*.a.svc.mesh.internal") as (port, trust):
        yield folder, port, trust


@pytest.fixture
def relay(tmp_path: Path, service: tuple[Path, int, list[str]]) -> Iterator[Running]:
    (tmp_path / "mesh.yaml").write_text(MESH.format(port=service[1]))
    with running(tmp_path, RELAY.format(port=service[1], drain="10s")) as process:
        yield process


def connect(relay: Running) -> socket.socket:
    address, _, port = relay.started()["relay"][0].rpartition(":")
    return socket.create_connection((address, int(port)), 5)


@pytest.mark.needs("curl")
def test_a_relay_alone_serves_a_local_route(relay: Running, service: tuple[Path, int, list[str]]) -> None:
    _, port, trust = service
    address = relay.started()["relay"][0]
    for name in (NAME, f"p{port}-127-0-0-1.a.svc.mesh.internal"):
        done = curl(name, address, *trust)
        assert done.returncode == 0, done.stderr
        assert "CN=a client" not in done.stderr
        assert '"subject": "commonName=a client"' in done.stdout
    event = relay.wait_for("stream")
    assert (event["route"], event["reason"], event["target"]) == ("local", "ok", f"127.0.0.1:{port}")
    assert event["ms_first_byte"] >= 0


@pytest.mark.needs("openssl")
def test_openssl_is_served_or_gets_an_alert(relay: Running, service: tuple[Path, int, list[str]]) -> None:
    folder, port, _ = service
    address = relay.started()["relay"][0]

    def ask(name: str) -> subprocess.CompletedProcess[bytes]:
        files = [
            "-CAfile",
            str(folder / "ca.pem"),
            "-cert",
            str(folder / "client.pem"),
            "-key",
            str(folder / "client.key"),
        ]
        command = ["openssl", "s_client", "-quiet", "-connect", address, "-servername", name, "-verify_hostname", name]
        request = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
        return subprocess.run(
            [*command, "-verify_return_error", *files], input=request, capture_output=True, timeout=20, check=False
        )

    assert b"200 OK" in ask(NAME).stdout
    for name in (f"p{port}-127-0-0-1.nowhere.svc.mesh.internal", "elsewhere.example"):
        refused = ask(name)
        assert refused.returncode != 0
        assert b"alert number 112" in refused.stderr
    assert b"alert number 49" in ask("p1-127-0-0-1.a.svc.mesh.internal").stderr  # deliver does not list that port
    assert b"alert number 80" in ask("p1-10-0-0-1.b.svc.mesh.internal").stderr  # known, but no gateway


def test_version_and_configuration_are_logged_at_the_start(relay: Running) -> None:
    listening = relay.started()
    assert not listening["relay"][0].endswith(":0")
    first, second = relay.events()[:2]
    assert first["event"] == "crossnet"
    assert first["open_files"] >= 1024
    assert second["config"]["relay"]["idle_timeout"] == "off"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_at_once_where_nothing_is_open(tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}]")
    with running(tmp_path, RELAY.format(port=1, drain="0")) as process:
        process.started()
        assert process.end(number) == code
        assert process.events("ended")


def test_a_draining_relay_ends_its_streams_well(tmp_path: Path, service: tuple[Path, int, list[str]]) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH.format(port=service[1]))
    with running(tmp_path, RELAY.format(port=service[1], drain="200ms")) as process:
        with connect(process) as client:
            client.sendall(b"\x16\x03\x01")  # an incomplete hello: an open stream
            wait_until(lambda: '"state"' in process.ask("/streams")[1])
            assert process.end() == 143
        assert process.events("cut")[0]["streams"] == 1
        assert process.events("draining")


def test_a_second_signal_does_not_wait(relay: Running) -> None:
    with connect(relay) as client:
        client.sendall(b"\x16\x03\x01")
        relay.process.send_signal(signal.SIGTERM)
        relay.wait_for("draining")
        assert relay.ask("/readyz")[0] == 503
        assert relay.end() == 143


def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}]")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = RELAY.format(port=1, drain="0").replace('127.0.0.1:0", deliver', f'127.0.0.1:{port}", deliver')
        with running(tmp_path, config) as process:
            assert process.process.wait(20) == 1
            (told,) = process.events("cannot_start")
    assert told["detail"].startswith("relay: ")
    assert str(port) in told["detail"]


def test_an_admin_port_that_is_taken_too(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}]")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = RELAY.format(port=1, drain="0").replace(
            "admin: 127.0.0.1:0", f"admin: 127.0.0.1:{taken.getsockname()[1]}"
        )
        with running(tmp_path, config) as process:
            assert process.process.wait(20) == 1
            assert process.events("cannot_start")[0]["detail"].startswith("admin: ")


def test_only_the_roles_that_are_asked_for_run(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}]")
    config = RELAY.format(port=1, drain="0") + f"dns: {{listen: '127.0.0.1:{free_port()}', upstream: 127.0.0.1:9}}\n"
    with running(tmp_path, config, "relay") as process:
        assert set(process.started()) == {"admin", "relay"}


@pytest.mark.needs("curl")
def test_two_networks_with_a_static_mesh_by_a_direct_gateway(
    tmp_path: Path, service: tuple[Path, int, list[str]]
) -> None:
    _, port, trust = service
    gateway_port = free_port()
    (tmp_path / "ab.key").write_text("5c" * 32)
    (tmp_path / "mesh.yaml").write_text(
        f"networks: [{{id: a}}, {{id: b}}]\n"
        f"gateways: [{{network: b, id: gw-1, address: '127.0.0.1:{gateway_port}'}}]\n"
        f"services: [{{name: {NAME}, network: b, ports: {{443: ['127.0.0.1:{port}']}}}}]\n"
    )
    both = "discovery: mesh.yaml\nadmin: 127.0.0.1:0\ndrain: 0\nkeys: {ab: {file: ab.key, from: a, to: b}}\n"
    gateway = (
        f"network: b\n{both}gateway: {{id: gw-1, listen: '127.0.0.1:{gateway_port}', allow: ['127.0.0.1/32:{port}']}}\n"
    )
    relay = f"network: a\n{both}import: [{{names: [{NAME}], from: [b]}}]\n"
    relay += "relay: {id: r, listen: '127.0.0.1:0', direct: [127.0.0.0/8]}\n"
    with running(tmp_path, gateway, name="gateway") as far, running(tmp_path, relay, name="relay") as near:
        far.started()
        done = curl(NAME, near.started()["relay"][0], *trust)
        assert done.returncode == 0, done.stderr
        assert '"subject": "commonName=a client"' in done.stdout
        # The gateway does not allow it, such as the service's own admin port.
        assert curl("p1-127-0-0-1.b.svc.mesh.internal", near.started()["relay"][0], *trust).returncode == 35
        near.wait_for("stream", 2)
        far.wait_for("stream", 2)
        streams = {event["reason"]: event for event in near.events("stream")}
        assert streams["ok"]["route"] == "direct"
        assert streams["ok"]["stream"] in {event["stream"] for event in far.events("stream")}
        assert set(streams) == {"ok", "denied"}
        assert near.end() == far.end() == 143
