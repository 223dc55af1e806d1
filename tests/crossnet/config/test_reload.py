"""A new configuration under a running process: what changes at once, what waits, and what a bad file does."""

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossnet.config.file import load
from crossnet.config.reload import change, files
from discovery.api.tokens import format_entry, make_entry, make_token
from discovery.model.mesh import Kind
from tests.support.hellos import client_hello
from tests.support.running import Running, free_port, running
from tests.support.turn_client import Client, code
from tests.support.waiting import wait_until as until
from turnreg.stun.auth import rest_credentials

FILE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
keys: {{ab-1: {{file: ab.key, from: a, to: b}}}}
relay: {{id: relay-1, listen: "127.0.0.1:0", deliver: ["127.0.0.1/32"]{more}}}
"""
DENY = ", rules: [{to: a, action: deny}]"
ALLOW = ", rules: [{to: a, action: allow}]"
ACCESS_DENIED = bytes.fromhex("15030300020231")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}, {id: b}]")
    (tmp_path / "ab.key").write_text("0a" * 32)
    return tmp_path


@pytest.fixture
def service() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        yield listening


def write(folder: Path, text: str) -> None:
    """Replace the file atomically, as everybody should."""
    (folder / "new").write_text(text)
    os.replace(folder / "new", folder / "crossnet.yaml")


def dial(relay: Running, service: socket.socket) -> tuple[socket.socket, bytes]:
    """Connect through the relay and send a ClientHello for the service; return the connection and the hello."""
    address, _, port = relay.started()["relay"][0].rpartition(":")
    client = socket.create_connection((address, int(port)), 10)
    hello = client_hello(f"p{service.getsockname()[1]}-127-0-0-1.a.svc.mesh.internal")
    client.sendall(hello)
    return client, hello


def is_served(relay: Running, service: socket.socket) -> bool:
    client, hello = dial(relay, service)
    with client:
        service.settimeout(0.2)
        try:
            accepted, _ = service.accept()
        except TimeoutError:
            assert client.recv(100) == ACCESS_DENIED
            return False
        with accepted:
            assert accepted.recv(10_000) == hello
        return True


def test_rules_change_and_a_stream_goes_on(folder: Path, service: socket.socket) -> None:
    with running(folder, FILE.format(more=ALLOW)) as relay:
        held, hello = dial(relay, service)
        accepted, _ = service.accept()
        with held, accepted:
            accepted.settimeout(10)
            assert accepted.recv(10_000) == hello
            # By SIGHUP, then by the change of the file alone.
            write(folder, FILE.format(more=DENY))
            relay.process.send_signal(signal.SIGHUP)
            read = relay.wait_for("config_read")
            assert (read["applied"], read["restart_needed"]) == (["relay.rules"], [])
            assert not is_served(relay, service)
            write(folder, FILE.format(more=ALLOW + ", hello_timeout: 3s"))
            assert relay.wait_for("config_read", 2)["applied"] == ["relay.rules", "relay.hello_timeout"]
            assert is_served(relay, service)
            held.sendall(b"still here")
            assert accepted.recv(100) == b"still here"
        config = relay.ask("/config")[1]
        assert '"hello_timeout": "3s"' in config
        metrics = relay.ask("/metrics")[1]
        assert 'crossnet_config_reloads_total{result="applied"} 2.0' in metrics
        assert relay.wait_for("config_read", 2)["sha256"] in metrics
        assert relay.end() == 143


def test_a_bad_file_changes_nothing_and_all_errors_are_logged(folder: Path, service: socket.socket) -> None:
    with running(folder, FILE.format(more=ALLOW)) as relay:
        relay.started()
        write(folder, FILE.format(more=", rules: [{to: A, action: deny}, {action: no}], hello_timeout: 3"))
        relay.process.send_signal(signal.SIGHUP)
        assert relay.wait_for("config_refused")["faults"] == 3
        said = [str(event["fault"]).split(":")[0] for event in relay.events("config_fault")]
        assert said == ["$.relay.rules[0].to", "$.relay.rules[1].action", "$.relay.hello_timeout"]
        assert is_served(relay, service)
        assert "crossnet_config_last_reload_successful 0.0" in relay.ask("/metrics")[1]
        assert "$.relay.hello_timeout" in relay.ask("/status")[1]
        write(folder, FILE.format(more=", listen: '127.0.0.1:1'").replace('listen: "127.0.0.1:0", ', ""))
        relay.process.send_signal(signal.SIGHUP)
        read = relay.wait_for("config_read")
        assert (read["level"], read["applied"], read["restart_needed"]) == (
            "warning",
            ["relay.rules"],
            ["relay.listen"],
        )
        assert '"127.0.0.1:0"' in relay.ask("/config")[1]
        assert "crossnet_config_restart_needed 1.0" in relay.ask("/metrics")[1]


def test_a_key_is_read_anew_when_its_file_changes(folder: Path) -> None:
    with running(folder, FILE.format(more="")) as relay:
        relay.started()
        write(folder, FILE.format(more="") + "log: {level: debug}\n")
        assert relay.wait_for("config_read")["applied"] == ["log"]
        (folder / "ab.key").write_text("0b" * 32)
        assert relay.wait_for("config_read", 2)["applied"] == ["keys"]
        (folder / "ab.key").unlink()
        assert relay.wait_for("config_refused")["faults"] == 1


def test_the_turn_server_takes_a_new_secret(folder: Path) -> None:
    (folder / "old").write_text("old secret")
    (folder / "new-secret").write_text("new secret")
    turn = 'turn: {{id: turn-1, listen: "127.0.0.1:0", relay_address: 127.0.0.1, realm: lab, secret: [{secrets}]}}\n'
    write(folder, FILE.format(more="") + turn.format(secrets="{file: old}"))
    with running(folder, (folder / "crossnet.yaml").read_text()) as server:
        address, _, port = server.started()["turn"][0].rpartition(":")
        user, password = rest_credentials("new secret", "b", time.time() + 60)
        with Client((address, int(port)), user=user, password=password) as client:
            client.login()
            assert code(client.ask(client.allocate_request())) == 401
            write(folder, FILE.format(more="") + turn.format(secrets="{file: new-secret}, {file: old}"))
            assert server.wait_for("config_read")["applied"] == ["turn.secret"]
            client.allocate()
        (folder / "old").write_text("another")
        assert server.wait_for("config_read", 2)["applied"] == ["turn.secret"]


TOKENS = """
network: a
admin: 127.0.0.1:0
discovery: ["http://127.0.0.1:{port}"]
token: {{file: token}}
discovery_server: {{listen: "127.0.0.1:{port}", tokens: {{file: tokens.yaml}}}}
relay: {{id: relay-1, listen: "127.0.0.1:0", advertise: [10.0.0.9]}}
"""


def test_a_token_is_replaced_without_a_restart(folder: Path) -> None:
    old, new = make_token(), make_token()
    entries = [format_entry(make_entry(token, name="relay", network="a", kinds=[Kind.RELAY])) for token in (old, new)]
    (folder / "tokens.yaml").write_text(entries[0])
    (folder / "token").write_text(old)
    with running(folder, TOKENS.format(port=free_port())) as process:

        def knows_itself() -> bool:
            return '"relay-1"' in process.ask("/mesh")[1] and json.loads(process.ask("/readyz")[1])["stale_s"] == 0

        until(knows_itself)
        (folder / "tokens.yaml").write_text(entries[1])
        until(lambda: not json.loads(process.ask("/status")[1])["discovery"]["connected"])
        (folder / "token").write_text(new)
        assert process.wait_for("config_read")["applied"] == ["token"]
        until(knows_itself)
        assert not any(old in line or new in line for line in process.log.read_text().splitlines())


def test_equal_values_are_no_change(folder: Path) -> None:
    write(folder, FILE.format(more=""))
    old = load(folder / "crossnet.yaml")
    write(
        folder, FILE.format(more="").replace("drain: 0", "drain: 5s\ninsecure: true") + "dns: {listen: '127.0.0.1:0'}\n"
    )
    new = load(folder / "crossnet.yaml")
    assert change(old, old).config == old
    made = change(old, new)
    assert (made.applied, made.restart) == (("drain",), ("insecure", "dns"))
    assert (made.config.drain_s, made.config.insecure, made.config.dns) == (5.0, False, None)
    assert set(files(old)) == {folder / "ab.key"}


def test_changes_that_contradict_a_waiting_one_wait_with_it(folder: Path) -> None:
    text = (
        'network: b\ndiscovery: ["https://10.0.0.1"]\n{more}'
        "gateway: {{id: gw-1, allow: [], max_streams: {most}, activate: [{wake}]}}\n"
    )
    write(folder, text.format(more="", most=5, wake=""))
    old = load(folder / "crossnet.yaml")
    # Without `insecure`, which waits for a restart, services must not be started over plain HTTP.
    write(folder, text.format(more="insecure: true\n", most=6, wake='{names: a.example, url: "http://10.0.0.9/"}'))
    made = change(old, load(folder / "crossnet.yaml"))
    assert made.config == old
    assert (made.applied, made.restart) == ((), ("gateway.activate", "gateway.max_streams", "insecure"))
    # Changes that do not contradict it are applied.
    write(folder, text.format(more="insecure: true\n", most=6, wake=""))
    made = change(old, load(folder / "crossnet.yaml"))
    assert (made.applied, made.restart) == (("gateway.max_streams",), ("insecure",))


DATA = """
network: a
admin: 127.0.0.1:0
discovery: ["http://127.0.0.1:{port}"]
discovery_server: {{listen: "127.0.0.1:{port}"{secrets}}}
relay: {{id: relay-1, listen: "127.0.0.1:0", advertise: [10.0.0.9]}}
{turn_servers}
"""


def test_secrets_to_issue_from_and_turn_servers_are_data(folder: Path) -> None:
    (folder / "secret").write_text("a secret")
    port = free_port()

    def text(secrets: str = "", turn_servers: str = "") -> str:
        return DATA.format(port=port, secrets=secrets, turn_servers=turn_servers)

    def issue() -> int:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/turn-credentials",
            data=b'{"network": "a"}',
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def turn_servers(process: Running) -> list[str]:
        records = json.loads(process.ask("/mesh")[1])["records"]
        return [record["spec"]["url"] for record in records if record["kind"] == "turn"]

    with running(folder, text()) as process:
        until(lambda: json.loads(process.ask("/readyz")[1])["ready"])
        assert issue() == 404
        one = "turn_servers: [{{id: turn-1, url: 'turn:10.0.0.{last}', relay_addresses: [10.0.0.8]}}]"
        write(folder, text(", turn_secrets: {a: {file: secret}}", one.format(last=8)))
        process.process.send_signal(signal.SIGHUP)
        assert process.wait_for("config_read")["applied"] == ["turn_servers", "discovery_server.turn_secrets"]
        assert issue() == 200
        until(lambda: turn_servers(process) == ["turn:10.0.0.8"])
        assert "turn_servers" in json.loads(process.ask("/status")[1])["roles"]
        write(folder, text("", one.format(last=7)))
        process.process.send_signal(signal.SIGHUP)
        until(lambda: turn_servers(process) == ["turn:10.0.0.7"])
        assert issue() == 404
        write(folder, text())
        process.process.send_signal(signal.SIGHUP)
        until(lambda: turn_servers(process) == [])
