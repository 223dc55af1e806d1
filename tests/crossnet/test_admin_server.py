"""The admin server of a running process: what it shows, and to whom it does not."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator

import pytest

from tests.support.running import Running, running

CONFIG = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
token: {file: token}
relay: {id: relay-1, listen: "127.0.0.1:0"}
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("admin")
    (folder / "mesh.yaml").write_text("networks: [{id: a}, {id: b}]")
    (folder / "token").write_text("hush\n")
    with running(folder, CONFIG) as started:
        started.started()
        yield started


def test_health_and_readiness(process: Running) -> None:
    assert process.ask("/healthz") == (200, "ok\n")
    status, body = process.ask("/readyz")
    assert (status, json.loads(body)) == (200, {"ready": True, "waiting_for": [], "stale_s": None})


def test_metrics_have_every_reason_before_it_happens(process: Running) -> None:
    _, text = process.ask("/metrics")
    assert 'crossnet_relay_streams_total{reason="unknown_network"} 0.0' in text
    assert "crossnet_build_info" in text
    assert "process_open_fds" in text


def test_the_configuration_is_complete_and_hides_secrets(process: Running) -> None:
    _, body = process.ask("/config")
    assert "hush" not in body
    config = json.loads(body)
    assert config["token"] == "***"
    assert config["relay"]["hello_timeout"] == "5s"


def test_status_streams_and_mesh(process: Running) -> None:
    status = json.loads(process.ask("/status")[1])
    assert (status["network"], status["roles"], status["streams"]) == ("a", ["relay"], {"relay": 0})
    assert status["discovery"]["networks"] == ["a", "b"]
    assert json.loads(process.ask("/streams")[1]) == {"relay": []}
    records = json.loads(process.ask("/mesh")[1])["records"]
    assert {"network", "relay"} == {record["kind"] for record in records}


def test_the_index_lists_the_pages(process: Running) -> None:
    pages = process.ask("/")[1].split()
    assert {"/healthz", "/readyz", "/metrics", "/streams", "/config"} <= set(pages)
    assert process.ask("/nothing")[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:8690", 200), ("evil.example", 421), ("localhost:99999", 421)],
)
def test_a_name_that_somebody_points_here_is_not_served(process: Running, host: str, status: int) -> None:
    assert process.ask("/streams", host=host)[0] == status


def test_half_requests_take_the_admin_servers_share_of_descriptors_alone(process: Running) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{process.process.pid}/fd"))

    before = descriptors()
    where = process.started()["admin"][0].rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(1003):
            client = stack.enter_context(socket.create_connection((where[0], int(where[2])), 10))
            client.sendall(b"GET /readyz HTTP/1.1\r\nHost: ")
        assert process.ask("/readyz")[0] == 200
        assert descriptors() <= before + 256 + 2
    assert 'crossnet_admin_connections_refused_total{reason="address_full"}' in process.ask("/metrics")[1]
