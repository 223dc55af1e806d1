"""Health checks at a real relay: HAProxy's kinds of check, and that of Kubernetes. They are no streams, so they are not logged."""

import contextlib
import json
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.running import Running, free_port, running
from tests.support.waiting import listens, wait_until

FILE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
{log}
relay: {{id: relay-1, listen: "127.0.0.1:0"{proxied}}}
"""
MESH = "networks: [{id: a}]\n"
PROXIED = ", proxy_from: [127.0.0.1/32]"
ENOUGH = 3


@contextlib.contextmanager
def a_relay(folder: Path, *, proxied: bool = False, log: str = "") -> Iterator[tuple[Running, int]]:
    """Run a relay alone while the block runs. Yields it and its port."""
    (folder / "mesh.yaml").write_text(MESH)
    with running(folder, FILE.format(proxied=PROXIED if proxied else "", log=log)) as relay:
        yield relay, int(relay.started()["relay"][0].rpartition(":")[2])


@contextlib.contextmanager
def checked_by_haproxy(folder: Path, port: int, option: str, server: str) -> Iterator[Path]:
    """Let HAProxy check a port while the block runs. Yields its control socket."""
    control, front = folder / "haproxy.sock", free_port()
    (folder / "haproxy.cfg").write_text(
        f"global\n stats socket {control}\n"
        "defaults\n mode tcp\n timeout connect 2s\n timeout client 2s\n timeout server 2s\n"
        f"listen checked\n bind 127.0.0.1:{front}\n {option}\n server relay 127.0.0.1:{port} {server} inter 100ms\n"
    )
    command = ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens("127.0.0.1", front), what="HAProxy listens")
        yield control
    finally:
        process.kill()
        process.wait()


def status(control: Path) -> str:
    """Return what HAProxy says of the relay, by its checks."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(control))
        asking.sendall(b"show stat json\n")
        answer = b""
        while more := asking.recv(65536):
            answer += more
    (fields,) = [row for row in json.loads(answer) if any(f["value"]["value"] == "relay" for f in row)]
    found = {field["field"]["name"]: field["value"]["value"] for field in fields}
    return str(found["status"])


def counted(relay: Running, reason: str) -> float:
    """Return how many streams ended for this reason."""
    line = f'crossnet_relay_streams_total{{reason="{reason}"}} '
    return next(
        float(text.removeprefix(line)) for text in relay.ask("/metrics")[1].splitlines() if text.startswith(line)
    )


@pytest.mark.interop
@pytest.mark.needs("haproxy")
@pytest.mark.parametrize(
    ("option", "server", "proxied"),
    [
        pytest.param("option ssl-hello-chk", "check", False, id="ssl-hello-chk"),
        pytest.param("", "check check-send-proxy send-proxy", True, id="check-send-proxy"),
        pytest.param("", "check check-send-proxy send-proxy-v2", True, id="check-send-proxy v2"),
        pytest.param("option tcp-check", "check check-send-proxy send-proxy", True, id="tcp-check behind a header"),
    ],
)
def test_a_check_that_the_relay_sees_is_counted_as_a_probe_and_not_logged(
    tmp_path: Path, option: str, server: str, proxied: bool
) -> None:
    with a_relay(tmp_path, proxied=proxied) as (relay, port):
        with checked_by_haproxy(tmp_path, port, option, server) as control:
            wait_until(lambda: counted(relay, "probe") >= ENOUGH)
            assert status(control) == "UP"
        assert relay.end() == 143
        assert not relay.events("stream")


@pytest.mark.interop
@pytest.mark.needs("haproxy")
@pytest.mark.parametrize("option", ["", "option tcp-check"])
def test_a_check_that_only_connects_leaves_no_line(tmp_path: Path, option: str) -> None:
    """HAProxy resets such a connection before it is complete, so the relay does not even see most of them."""
    with a_relay(tmp_path) as (relay, port):
        with checked_by_haproxy(tmp_path, port, option, "check") as control:
            wait_until(lambda: status(control) == "UP")
        assert relay.end() == 143
        assert not relay.events("stream")


@pytest.mark.interop
@pytest.mark.needs("haproxy")
@pytest.mark.parametrize(
    ("option", "server", "reason", "advice"),
    [
        pytest.param("", "check check-send-proxy send-proxy", "not_tls", "relay.proxy_from", id="check-send-proxy"),
        pytest.param("option httpchk", "check", "not_tls", "https", id="httpchk"),
        pytest.param("", "check check-ssl verify none", "no_sni", "server_name", id="check-ssl"),
    ],
)
def test_a_check_that_cannot_succeed_is_told_what_to_change(
    tmp_path: Path, option: str, server: str, reason: str, advice: str
) -> None:
    with a_relay(tmp_path) as (relay, port), checked_by_haproxy(tmp_path, port, option, server):
        line = relay.wait_for("stream", ENOUGH)
        assert line["reason"] == reason
        assert advice in line["detail"]


@pytest.mark.parametrize("log", ["", "log: {probes: true}"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_connection_without_a_byte(tmp_path: Path, how: str, log: str) -> None:
    """As by the tcpSocket probe of Kubernetes, by load balancers and by scanners."""
    with a_relay(tmp_path, log=log) as (relay, port):
        for _ in range(ENOUGH):
            with socket.create_connection(("127.0.0.1", port), 10) as client:
                wait_until(lambda: len(json.loads(relay.ask("/streams")[1])["relay"]) == 1)
                if how == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wait_until(lambda: len(json.loads(relay.ask("/streams")[1])["relay"]) == 0)
        assert counted(relay, "probe") == ENOUGH
        assert counted(relay, "client_reset") == 0
        assert relay.end() == 143
        assert [line["reason"] for line in relay.events("stream")] == (["probe"] * ENOUGH if log else [])
