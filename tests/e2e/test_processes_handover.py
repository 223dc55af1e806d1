"""An upgrade of a process that is relay and gateway at once, under load: no stream, no connect and no allocation is missed."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sniproxy.engine import connect
from tests.support.hellos import client_hello
from tests.support.processes import DOMAIN, TURNS, Loopback, Mesh, standing
from tests.support.talk import Talk, talking

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

RELAY_PORT = 8931
"""Of the relay that network b's gateway is, too."""


def both_roles(document: dict[str, Any]) -> None:
    document |= {"handover": "gateway.over", "drain": "30s"}
    service = document["gateway"]["allow"][0].partition("/")[0]
    document["relay"] = {"id": "relay-b", "listen": f"{service}:{RELAY_PORT}", "deliver": [f"{service}/32"]}


@pytest.fixture(params=TURNS)
def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mesh]:
    made = Mesh(tmp_path, Loopback(), turn=request.param, changes={"gateway": both_roles})
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(tokens.read_text().replace('["allocation","gateway"]', '["allocation","gateway","relay"]'))
    with standing(made) as mesh:
        yield mesh


def ports(mesh: Mesh) -> dict[str, int]:
    """The relayed port of each allocation record, as the gateway has it."""
    return {line["record"]: line["relayed"][1] for line in mesh.registrations()}


async def connect_on_and_on(mesh: Mesh, talk: Talk, over: asyncio.Event) -> int:
    """Have one stream after the other through the relay of network b; gives how many there were. A failure is raised."""
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
        near = group.create_task(connect_on_and_on(mesh, talk, over))
        held = await talk.hold()
        before = ports(mesh)
        async with talk.going_on(0.005):
            old, new = mesh.upgrade("gateway")
            await mesh.eventually("it is handed over", lambda: mesh.events("gateway", "handed_over"))
            assert old.alive
            assert new.alive
            # The successor's allocations are there, under the same records; the old ones still have their stream.
            await mesh.eventually("the new one answers for itself", lambda: ports(mesh).keys() == before.keys())
            after = ports(mesh)
            assert set(after.values()).isdisjoint(before.values())
            await mesh.eventually("the relay knows", mesh.whole)
            await held.ping()
            await talk.at_once(10)
            await held.end()
            over.set()
            await mesh.eventually("the old process has ended", lambda: not old.alive)
            # With the old one's lease nothing of the new one's has gone.
            assert mesh.whole()
            await talk.at_once(10)
        assert old.exit_code() == 0
    assert near.result() > 20
    assert {event["reason"] for event in mesh.events("relay")} == {"ok"}
    reasons = {event["reason"] for event in mesh.events("gateway")}
    assert reasons <= {"ok", "client_reset"}, "clients of the near relay just close"
