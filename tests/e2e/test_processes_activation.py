"""Real processes: a service that is not running is started by the first stream to it."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.hellos import client_hello
from tests.support.processes import DOMAIN, Loopback, Mesh, running_mesh, streams_of

pytestmark = pytest.mark.anyio

SERVICE = "orders.shop.svc.cluster.local"
NAME = f"p8443-orders.shop.b.{DOMAIN}"


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """Path of the file for the process id of the server that the command starts. It ends with the test, or after a minute."""
    yield tmp_path / "pids"
    for pid in (tmp_path / "pids").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.interop
@pytest.mark.needs("socat", "turnserver")
@pytest.mark.parametrize(
    ("wakes_s", "timeout", "attempts"),
    [
        pytest.param(1.5, "1s", 2, id="second attempt: the first one waits and is refused, and the command runs once"),
        pytest.param(10.5, "20s", 1, id="first attempt: the relay is told to wait longer than it normally would"),
    ],
)
async def test_a_service_that_wakes_late_is_reached(
    tmp_path: Path, pids: Path, wakes_s: float, timeout: str, attempts: int
) -> None:
    ground = Loopback()
    with socket.create_server((ground.plan.service, 0)) as server:
        port = server.getsockname()[1]
    listen = f"timeout 60 socat TCP-LISTEN:{port},fork,reuseaddr,bind={ground.plan.service} EXEC:cat"
    script = f"echo $CROSSNET_SERVICE >>{tmp_path}/woken\nsleep {wakes_s}\n{listen} >/dev/null 2>&1 & echo $! >>{pids}"

    def activate(document: dict[str, Any]) -> None:
        command = ["sh", "-c", script]
        document["gateway"]["activate"] = [{"names": "**.cluster.local", "command": command, "timeout": timeout}]

    with running_mesh(Mesh(tmp_path, ground, turn="coturn", changes={"gateway": activate})) as mesh:
        spec = {"name": SERVICE, "ports": {"8443": [f"{ground.plan.service}:{port}"]}}
        assert mesh.records_command("put", "service", SERVICE, json.dumps(spec)).returncode == 0
        await mesh.eventually("the gateway has the service record", lambda: mesh.records("gateway", "service"))
        await mesh.eventually("the relay has the service record", lambda: mesh.records("relay", "service"))
        hello = client_hello(NAME)
        client = await mesh.dial(NAME, hello=hello)
        assert await client.recv_exactly(len(hello)) == hello, "the server echoes it"
        client.shutdown_write()
        while await client.recv():
            pass
        client.close()
        await mesh.eventually(
            "both have logged its end", lambda: mesh.events("relay") and len(mesh.events("gateway")) == attempts
        )
        assert streams_of(mesh.events("gateway")) == ["no_endpoint"] * (attempts - 1) + ["ok"]
        assert streams_of(mesh.events("relay")) == ["ok"]
        assert mesh.events("relay")[0]["attempts"] == attempts
    assert (tmp_path / "woken").read_text().split() == [SERVICE]
