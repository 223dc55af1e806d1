"""A relay that listens on the ports of imported services, and publishes them in its record."""

import json
import socket
from pathlib import Path

import pytest

from tests.support.hellos import client_hello
from tests.support.running import running
from tests.support.waiting import wait_until

FILE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
import: [{{names: [orders.shop.example], from: [b]}}]
relay: {{id: relay-1, listen: "127.0.0.1:0", ports: auto, port_range: {low}-{high}}}
"""
MESH = """
networks: [{{id: a}}, {{id: b}}]
services:
- {{name: orders.shop.example, network: b, ports: {{{inside}: ["10.0.0.1:1"], {taken}: ["10.0.0.1:1"], 9: ["10.0.0.1:1"]}}}}
"""


def test_a_service_is_reached_on_its_own_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used, socket.create_server(("127.0.0.1", 0)) as spare:
        inside, taken = spare.getsockname()[1], used.getsockname()[1]
        spare.close()
        (tmp_path / "mesh.yaml").write_text(MESH.format(inside=inside, taken=taken))
        with running(tmp_path, FILE.format(low=min(inside, taken), high=max(inside, taken))) as relay:
            own = int(relay.started()["relay"][0].rpartition(":")[2])
            assert relay.wait_for("ports")["ports"] == sorted({own, inside})
            assert relay.wait_for("port_not_opened")["port"] == taken
            with socket.create_connection(("127.0.0.1", inside), 10) as client:
                client.sendall(client_hello("orders.shop.example"))
                assert client.recv(100) == bytes.fromhex(
                    "15030300020250"
                )  # the name and its port are known, but there is no route yet
            stream = relay.wait_for("stream")
            assert (stream["reason"], stream["local"]) == ("no_route", f"127.0.0.1:{inside}")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", 9), 5)

            def published() -> list[int]:
                records = json.loads(relay.ask("/mesh")[1])["records"]
                ports: list[int] = next(record["spec"]["ports"] for record in records if record["kind"] == "relay")
                return ports

            wait_until(lambda: published() == sorted({own, inside}))
