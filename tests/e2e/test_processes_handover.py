"""An upgrade under load of a process that is both relay and gateway: no stream, connection or allocation is lost."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sniproxy.engine import connect
from tests.support.hellos import client_hello
from tests.support.processes import DOMAIN, TURNS, Loopback, Mesh, running_mesh
from tests.support.talk import Talk, talking

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

RELAY_PORT = 8931
"""Port of the relay that runs in the same process as network b's gateway."""


def both_roles(document: dict[str, Any]) -> None:
    document |= {"handover": "gateway.over", "drain": "30s"}
    service = document["gateway"]["allow"][0].partition("/")[0]
    document["relay"] = {"id": "relay-b", "listen": f"{service}:{RELAY_PORT}", "deliver": [f"{service}/32"]}


@pytest.fixture(params=TURNS)
def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mesh]:
    made = Mesh(tmp_path, Loopback(), turn=request.param, changes={"gateway": both_roles})
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(tokens.read_text().replace('["allocation","gateway"]', '["allocation","gateway","relay"]'))
    with running_mesh(made) as mesh:
        yield mesh


def ports(mesh: Mesh) -> dict[str, int]:
    """Return the relayed port of each of the gateway's allocation records."""
    return {line["record"]: line["relayed"][1] for line in mesh.registrations()}


async def connect_repeatedly(mesh: Mesh, talk: Talk, over: asyncio.Event) -> int:
    """Open one stream after the other through the relay of network b. Returns their number; an error is raised."""
    count = 0
    while not over.is_set():
        client = await connect(mesh.plan.service, RELAY_PORT, timeout_s=10)
        try:
            await client.send(client_hello(talk.name))
            await client.send(b"question")
            assert await client.recv_exactly(8) == b"question"
        finally:
            client.close()
        count += 1
        await asyncio.sleep(0.01)
    return count


async def test_an_upgrade_of_relay_and_gateway_under_load_loses_no_stream(mesh: Mesh) -> None:
    over = asyncio.Event()
    async with talking(mesh) as talk, asyncio.TaskGroup() as group:
        assert talk.name.endswith(f".b.{DOMAIN}")
        near = group.create_task(connect_repeatedly(mesh, talk, over))
        held = await talk.hold()
        before = ports(mesh)
        async with talk.repeating(0.005):
            old, new = mesh.upgrade("gateway")
            await mesh.eventually("the old process has handed over", lambda: mesh.events("gateway", "handed_over"))
            assert old.alive
            assert new.alive
            # The new process has allocations under the same records; the old ones still carry their stream.
            await mesh.eventually("the new process has all records", lambda: ports(mesh).keys() == before.keys())
            after = ports(mesh)
            assert set(after.values()).isdisjoint(before.values())
            await mesh.eventually("the relay has the new records", mesh.converged)
            await held.ping()
            await talk.at_once(10)
            await held.end()
            over.set()
            await mesh.eventually("the old process has ended", lambda: not old.alive)
            # The end of the old process's lease has removed no record of the new one.
            assert mesh.converged()
            await talk.at_once(10)
        assert old.exit_code() == 0
    assert near.result() > 20
    assert {event["reason"] for event in mesh.events("relay")} == {"ok"}
    reasons = {event["reason"] for event in mesh.events("gateway")}
    assert reasons <= {"ok", "client_reset"}, "clients of the near relay close without a half-close"
