"""A service of which most endpoints are dead: every stream reaches the one that lives, and each dead one is met once."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sniproxy.engine import SocketStream
from tests.support.processes import Loopback, Mesh, running_mesh
from tests.support.streams import read_all, silent_listener
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

STREAMS = 12
DEAD = 3


@contextmanager
def dead(address: str) -> Iterator[list[str]]:
    """Endpoints that say nothing, as behind a firewall that drops."""
    with ExitStack() as stack:
        yield [f"{address}:{stack.enter_context(silent_listener(address))}" for _ in range(DEAD)]


async def echo(stream: SocketStream) -> None:
    while data := await stream.recv():
        await stream.send(data)
    stream.shutdown_write()


async def test_streams_reach_the_endpoint_that_lives(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, Loopback())
    with running_mesh(mesh), dead(mesh.plan.service) as silent:
        async with mesh.serving(echo) as port:
            service = {
                "name": "many.shop.svc.cluster.local",
                "ports": {"443": [*silent, f"{mesh.plan.service}:{port}"]},
            }
            put = mesh.records_command("put", "service", "many", json.dumps(service))
            assert put.returncode == 0, put.stderr
            for part in ("relay", "gateway"):
                await eventually(lambda part=part: "many" in [it["id"] for it in mesh.records(part, "service")])  # type: ignore[misc]
            for number in range(STREAMS):
                client = await mesh.dial("p443-many.shop.svc.cluster.local.b.svc.mesh.internal", behind=b"%d" % number)
                client.shutdown_write()
                assert (await read_all(client)).endswith(b"%d" % number)
                client.close()
            await eventually(lambda: len(mesh.events("relay")) >= STREAMS)
        failing = mesh.ask("gateway", "/status")["gateway_endpoints"]
        left_out = mesh.events("gateway", "endpoint_left_out")
        assert {line["reason"] for line in mesh.events("relay")} == {"ok"}
    assert failing
    assert {line["endpoint"] for line in failing} <= set(silent)
    assert len(left_out) <= 2 * DEAD, "12 streams, and not a wait each"
