"""Real processes: a service that does not run is started by the first stream that wants it."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import DOMAIN, Loopback, Mesh, standing, streams_of
from tests.sniproxy.hellos import client_hello

pytestmark = pytest.mark.anyio

SERVICE = "orders.shop.svc.cluster.local"
NAME = f"p8443-orders.shop.b.{DOMAIN}"


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """Where the command writes the process id of the server that it starts; it ends with the test, or within a minute."""
    yield tmp_path / "pids"
    for pid in (tmp_path / "pids").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)


@pytest.mark.interop
@pytest.mark.needs("socat", "turnserver")
async def test_a_service_that_wakes_late_is_reached_by_the_second_allocation(tmp_path: Path, pids: Path) -> None:
    """The first attempt is held and refused in time, the second one is held in its turn: the command runs once for both."""
    ground = Loopback()
    with socket.create_server((ground.plan.service, 0)) as server:
        port = server.getsockname()[1]
    listen = f"timeout 60 socat TCP-LISTEN:{port},fork,reuseaddr,bind={ground.plan.service} EXEC:cat"
    script = f"echo $CROSSNET_SERVICE >>{tmp_path}/woken\nsleep 1.5\n{listen} >/dev/null 2>&1 & echo $! >>{pids}"

    def activate(document: dict[str, Any]) -> None:
        command = ["sh", "-c", script]
        document["gateway"]["activate"] = [{"names": "**.cluster.local", "command": command, "timeout": "1s"}]

    with standing(Mesh(tmp_path, ground, turn="coturn", changes={"gateway": activate})) as mesh:
        spec = {"name": SERVICE, "ports": {"8443": [f"{ground.plan.service}:{port}"]}}
        assert mesh.records_command("put", "service", SERVICE, json.dumps(spec)).returncode == 0
        await mesh.eventually("the gateway knows the service", lambda: mesh.records("gateway", "service"))
        await mesh.eventually("the relay, too", lambda: mesh.records("relay", "service"))
        hello = client_hello(NAME)
        client = await mesh.dial(NAME, hello=hello)
        assert await client.recv_exactly(len(hello)) == hello, "the real server gives it back"
        client.shutdown_write()
        while await client.recv():
            pass
        client.close()
        await mesh.eventually(
            "both have told of its end", lambda: mesh.events("relay") and len(mesh.events("gateway")) == 2
        )
        assert streams_of(mesh.events("gateway")) == ["no_endpoint", "ok"]
        assert streams_of(mesh.events("relay")) == ["ok"]
        assert mesh.events("relay")[0]["attempts"] == 2
    assert (tmp_path / "woken").read_text().split() == [SERVICE]
