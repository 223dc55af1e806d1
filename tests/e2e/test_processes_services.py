"""Members of a StatefulSet, found by SRV at a real resolver and reached one by one through relay and gateway."""

import json
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import dns.asyncquery
import dns.message
import dns.rdatatype
import pytest

from sniproxy.engine import SocketStream
from tests.e2e.test_processes_versions import as_before
from tests.support.previous import interpreter
from tests.support.processes import Loopback, Mesh, running_mesh
from tests.support.streams import read_all
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

DB = "db.shop.svc.cluster.local"
ALIAS = "db.shop.svc.clusterset.local"
MEMBERS = 3
ASK_TIMEOUT_S = 5.0


def saying(text: bytes) -> Callable[[SocketStream], Awaitable[None]]:
    """Return a service that says its name behind what it got."""

    async def answer(stream: SocketStream) -> None:
        while await stream.recv():
            pass
        await stream.send(text)
        stream.shutdown_write()

    return answer


def imports_members(document: dict[str, Any]) -> None:
    document["import"][0]["names"] += [f"*.{DB}", "*.*.svc.clusterset.local", f"*.*.{ALIAS}"]


@pytest.mark.slow
@pytest.mark.timeout(400)  # installs that version
@pytest.mark.parametrize("old", ["relay", "gateway"])
async def test_parts_of_the_previous_version_read_the_other_fields(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, old: str
) -> None:
    """A record with an unknown field would not exist for them."""
    base = tmp_path_factory.getbasetemp()
    python = interpreter((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "previous")
    changes = {"gateway": as_before} if old == "gateway" else {}
    mesh = Mesh(tmp_path, Loopback(), changes=changes, pythons={old: python})
    name = f"db-0.{DB}"
    with running_mesh(mesh):
        async with mesh.serving(saying(b"db-0")) as port:
            spec = {"name": name, "ports": {"27017": [f"{mesh.plan.service}:{port}"]}, "member_of": DB}
            put = mesh.records_command("put", "service", name, json.dumps(spec | {"port_names": {"mongo": 27017}}))
            assert put.returncode == 0, put.stderr
            for part in ("relay", "gateway"):
                await eventually(lambda part=part: name in [it["id"] for it in mesh.records(part, "service")])  # type: ignore[misc]
            client = await mesh.dial(f"p27017-{name}.b.svc.mesh.internal")
            client.shutdown_write()
            assert await read_all(client) == b"db-0"
            client.close()


async def test_each_member_is_reached_by_its_name(tmp_path: Path) -> None:
    changes = dict.fromkeys(("dns", "relay"), imports_members)
    mesh = Mesh(tmp_path, Loopback(), dns=True, changes=changes)
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(tokens.read_text().replace('"**.cluster.local"', '"**.cluster.local","**.clusterset.local"'))

    async def ask(name: str, qtype: str) -> list[str]:
        question = dns.message.make_query(name, qtype)
        reply = await dns.asyncquery.udp(question, mesh.plan.dns, ASK_TIMEOUT_S, mesh.plan.dns_port)
        return sorted(rdata.to_text() for rrset in reply.answer for rdata in rrset)

    async def said_by(name: str) -> bytes:
        client = await mesh.dial(name)
        client.shutdown_write()
        said = await read_all(client)
        client.close()
        return said

    def put(name: str, endpoints: list[str], **fields: str) -> None:
        spec = {"name": name, "ports": {"27017": endpoints}, "port_names": {"mongo": 27017}, **fields}
        done = mesh.records_command("put", "service", name, json.dumps(spec))
        assert done.returncode == 0, done.stderr

    with running_mesh(mesh):
        async with AsyncExitStack() as services:
            endpoints = []
            for number in range(MEMBERS):
                port = await services.enter_async_context(mesh.serving(saying(b"db-%d" % number)))
                endpoints.append(f"{mesh.plan.service}:{port}")
            put(DB, endpoints)
            put(ALIAS, endpoints, alias_of=DB)
            for number, endpoint in enumerate(endpoints):
                put(f"db-{number}.{DB}", [endpoint], member_of=DB)
                put(f"db-{number}.b.{ALIAS}", [endpoint], member_of=ALIAS, alias_of=f"db-{number}.{DB}")
            count = 2 * MEMBERS + 2
            for part in ("dns", "relay", "gateway"):
                await eventually(lambda part=part: len(mesh.records(part, "service")) >= count)  # type: ignore[misc]

            for domain, cluster in ((DB, ""), (ALIAS, ".b")):
                for port_label in ("_mongo", "_27017"):
                    records = await ask(f"{port_label}._tcp.{domain}", "SRV")
                    assert len(records) == MEMBERS
                    for number, record in enumerate(records):
                        target = record.split()[3].removesuffix(".")
                        assert target == f"p27017-db-{number}{cluster}.{domain}.b.svc.mesh.internal"
                        assert await ask(target, "A") == [mesh.plan.relay]
                        assert await said_by(target) == b"db-%d" % number
                # By their own names, as other members know them, at the relay's own port.
                for number in range(MEMBERS):
                    name = f"db-{number}{cluster}.{domain}"
                    assert await ask(name, "A") == [mesh.plan.relay]
                    assert await said_by(name) == b"db-%d" % number
            # The beginning of both names stands for the service, in spite of its second name.
            assert await said_by("p27017-db.shop.b.svc.mesh.internal") in {
                b"db-%d" % number for number in range(MEMBERS)
            }
    assert mesh.defects() == []
