"""Streams at the admin server: filtered by their properties, ended by their id, and only from this machine."""

import json
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.hellos import client_hello
from tests.support.running import Running, running

FILE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
relay: {id: relay-1, listen: "127.0.0.1:0", deliver: ["127.0.0.1/32"]}
"""


@pytest.fixture(scope="module")
def service() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        yield listening


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("streams")
    (folder / "mesh.yaml").write_text("networks: [{id: a}, {id: b}]")
    with running(folder, FILE) as process:
        yield process


def stream(relay: Running, service: socket.socket, label: str) -> tuple[socket.socket, socket.socket, str]:
    """Open a stream; return both of its ends and the name that it requested."""
    address, _, port = relay.started()["relay"][0].rpartition(":")
    client = socket.create_connection((address, int(port)), 10)
    target = f"{service.getsockname()[1]}-127-0-0-1"
    name = (
        f"p{target}.a.svc.mesh.internal"
        if label == "compact"
        else f"_{target.replace('-', '._', 1)}._a.svc.mesh.internal"
    )
    hello = client_hello(name)
    client.sendall(hello)
    accepted, _ = service.accept()
    accepted.settimeout(10)
    received = b""
    while len(received) < len(hello):
        received += accepted.recv(10_000)
    return client, accepted, name


def rows(relay: Running, query: str) -> list[dict[str, Any]]:
    status, body = relay.ask(f"/streams{query}")
    assert status == 200, body
    found: list[dict[str, Any]] = json.loads(body)["relay"]
    return found


def end(relay: Running, path: str, headers: dict[str, str], local: str = "127.0.0.1") -> tuple[int, dict[str, Any]]:
    admin = relay.started()["admin"][0]
    request = urllib.request.Request(f"http://{admin}{path}", headers=headers, method="DELETE")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_streams_are_found_and_one_is_ended(relay: Running, service: socket.socket) -> None:
    one = stream(relay, service, "compact")
    two = stream(relay, service, "mangled")
    try:
        assert len(rows(relay, "")) == 2
        assert [row["sni"] for row in rows(relay, f"?sni={one[2]}")] == [one[2]]
        assert [row["sni"] for row in rows(relay, "?sni=*.a.svc.mesh.internal")] == [one[2]]
        assert len(rows(relay, "?sni=**.svc.mesh.internal&network=a&client=127.0.0.0/8&state=open")) == 2
        assert rows(relay, "?network=b") == rows(relay, "?client=10.0.0.1") == rows(relay, "?state=hello") == []
        for query in ("?name=x", "?client=x", "?sni=*", "?sni=a.*b"):
            assert relay.ask(f"/streams{query}")[0] == 400
        wanted = rows(relay, f"?sni={one[2]}")[0]["stream"]
        for headers in ({}, {"Origin": "http://127.0.0.1"}):
            assert end(relay, f"/streams/{wanted}", headers)[0] == 403
        for missing in ("00" * 16, "zz", wanted[:-2]):
            assert end(relay, f"/streams/{missing}", {"Crossnet-Admin": "1"})[0] == 404
        assert end(relay, f"/streams/{wanted}", {"Crossnet-Admin": "1"}) == (200, {"ended": wanted})
        for wire in one[:2]:
            wire.settimeout(10)
            with pytest.raises(ConnectionResetError):
                wire.recv(1)
        event = relay.wait_for("stream")
        assert (event["stream"], event["detail"]) == (wanted, "ended at the admin server")
        two[0].sendall(b"still here")
        assert two[1].recv(100) == b"still here"
        assert [row["stream"] for row in rows(relay, "?reason=*")] == [wanted]
        assert rows(relay, "?reason=idle_timeout") == []
    finally:
        for wire in (*one[:2], *two[:2]):
            wire.close()


def test_a_browser_is_not_granted_a_preflight(relay: Running) -> None:
    admin = relay.started()["admin"][0]
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "DELETE"}
    request = urllib.request.Request(f"http://{admin}/streams/00", headers=headers, method="OPTIONS")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=5)
    with refused.value as error:
        assert error.code == 405
        assert not any(name.lower().startswith("access-control") for name in error.headers)


def test_steps_and_dials_are_measured(relay: Running, service: socket.socket) -> None:
    client, accepted, _ = stream(relay, service, "compact")
    with client, accepted:
        accepted.sendall(b"answer")
        assert client.recv(100) == b"answer"
        before = len(relay.events("stream"))
    relay.wait_for("stream", before + 1)
    metrics = dict(line.rsplit(" ", 1) for line in relay.ask("/metrics")[1].splitlines() if not line.startswith("#"))
    for step in ("hello", "route", "connect", "first_byte"):
        assert float(metrics[f"crossnet_relay_{step}_seconds_count"]) >= 1
        assert f'crossnet_relay_{step}_seconds_bucket{{le="30.0"}}' in metrics
    assert float(metrics['crossnet_relay_dials_total{result="ok",route="local"}']) >= 1
    assert metrics['crossnet_relay_dials_total{result="reset",route="turn"}'] == "0.0"
    assert float(metrics['crossnet_relay_network_streams_total{network="a",outcome="ok"}']) >= 0
    assert float(metrics['crossnet_relay_network_bytes_total{direction="down",network="a"}']) >= 6
