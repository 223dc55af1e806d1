"""Processes that start while discovery is down, with only a saved view, or with none."""

import asyncio
import json
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import dnslib
import pytest

from tests.support.processes import Change, Loopback, Mesh, running_mesh
from tests.support.running import free_port
from tests.support.talk import talking

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ASK_TIMEOUT_S = 2.0


def saved(mesh: Mesh, part: str) -> Path:
    return mesh.folder / f"{part}.snapshot"


def a_mesh(folder: Path, turn: str, *, direct: bool = False) -> Mesh:
    """Every part saves its view. With `direct`, relays reach the gateway without a TURN server, too."""

    def saving(part: str) -> Change:
        def change(document: dict[str, Any]) -> None:
            document["snapshot"] = f"{part}.snapshot"
            if part == "gateway":
                # Without the discovery server, no credentials are issued.
                del document["gateway"]["turn"]["a"]["issue"]
                document["gateway"]["turn"]["a"]["secret"] = {"file": "turn.secret"}
                if direct:
                    document["gateway"]["listen"] = [f"{ground.plan.gateway}:{free_port()}"]

        return change

    ground = Loopback()
    parts = ["relay", "gateway", "dns", *(["turn"] if turn == "embedded" else [])]
    return Mesh(folder, ground, turn=turn, dns=True, changes={part: saving(part) for part in parts})


def has_saved(mesh: Mesh, part: str, *kinds: str) -> bool:
    with suppress(FileNotFoundError):
        lines = saved(mesh, part).read_bytes().splitlines()[2:]
        return {json.loads(line)["kind"] for line in lines} >= {*kinds}
    return False


def says(mesh: Mesh, part: str, answer: object) -> bool:
    return bool(mesh.ask(part, "/readyz") == answer)


def has_logged(mesh: Mesh, part: str, words: str) -> bool:
    return any(words in line for line in mesh.lines(part))


async def all_saved(mesh: Mesh, *kinds: str) -> None:
    for part in ("relay", "gateway", "dns"):
        await mesh.eventually(f"{part} has saved {kinds}", partial(has_saved, mesh, part, *kinds, "turn", "relay"))


async def ready_with_saved_view(mesh: Mesh, *parts: str) -> None:
    """Wait until these parts are ready, and check that they report the age of their view."""
    for part in parts:
        await mesh.eventually(f"{part} is ready", partial(mesh.ready, part))
        answer = mesh.ask(part, "/readyz")
        assert answer["ready"]
        assert answer["stale_s"] > 0
        discovery = mesh.ask(part, "/status")["discovery"]
        assert discovery["synced"]
        assert not discovery["connected"]
        assert discovery["records"]


def addresses(mesh: Mesh, name: str) -> list[str]:
    """Query the resolver as a client does. Returns the addresses."""
    with mesh.ground.on("client"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(ASK_TIMEOUT_S)
        client.connect((mesh.plan.dns, mesh.plan.dns_port))
        client.send(dnslib.DNSRecord.question(name).pack())
        return [str(answer.rdata) for answer in dnslib.DNSRecord.parse(client.recv(4096)).rr]


async def test_everything_restarts_from_saved_views(tmp_path: Path) -> None:
    with running_mesh(a_mesh(tmp_path, "embedded", direct=True)) as mesh:
        async with talking(mesh) as talk:
            await talk.once()
            await all_saved(mesh, "allocation", "gateway")
            before = {line["relayed"][1] for line in mesh.registrations()}
            for part in mesh.names:
                mesh[part].kill()
            for part in mesh.names:
                if part != "discovery":
                    mesh.start(part)
            await ready_with_saved_view(mesh, "relay", "gateway", "dns", "turn")
            assert await asyncio.to_thread(addresses, mesh, talk.name) == [mesh.plan.relay]

            # The TURN server was restarted as well, so the saved allocations are gone, but the direct route works.
            await talk.at_once(10)
            assert {event["route"] for event in mesh.events("relay")[-10:]} == {"direct"}

            # With the saved records of TURN server and relay, the gateway has registered and permitted the relay.
            await mesh.eventually(
                "the gateway is registered again", lambda: any(line["permissions"] for line in mesh.registrations())
            )

            mesh.start("discovery")
            await mesh.eventually("the relay knows the current allocations", mesh.converged)
            await mesh.eventually("the view is live", lambda: mesh.ask("relay", "/readyz")["stale_s"] == 0)

            def ports() -> set[int]:
                return {line["relayed"][1] for line in mesh.registrations() if line["relayed"]}

            # One replica may register a little later than the other.
            await mesh.eventually(
                "the records contain the new allocations",
                lambda: {record["spec"]["port"] for record in mesh.records("relay", "allocation")} == ports() != before,
            )
            await talk.at_once(10)


@pytest.mark.interop
@pytest.mark.needs("turnserver")
async def test_a_relay_that_starts_alone_uses_its_saved_view_but_no_damaged_one(tmp_path: Path) -> None:
    with running_mesh(a_mesh(tmp_path, "coturn")) as mesh:
        async with talking(mesh) as talk:
            await talk.once()
            await all_saved(mesh, "allocation")
            for part in ("discovery", "relay", "dns"):
                mesh[part].kill()
            for part in ("relay", "dns"):
                mesh.start(part)
            await ready_with_saved_view(mesh, "relay", "dns")
            assert await asyncio.to_thread(addresses, mesh, talk.name) == [mesh.plan.relay]
            await talk.at_once(10)
            assert {event["route"] for event in mesh.events("relay")} == {"turn"}

            for part in ("relay", "dns"):
                mesh[part].kill()
            for part in ("relay", "dns"):
                whole = saved(mesh, part).read_bytes()
                saved(mesh, part).write_bytes(whole.replace(b'"port":', b'"port":1', 1))
                mesh.start(part)
            for part in ("relay", "dns"):
                await mesh.eventually(f"{part} has set the file aside", partial(has_logged, mesh, part, "set aside"))
                assert saved(mesh, part).with_name(f"{part}.snapshot.bad").exists()
                assert not saved(mesh, part).exists()
                nothing = {"ready": False, "waiting_for": ["a first view of discovery"], "stale_s": None}
                await mesh.eventually(f"{part} reports what is missing", partial(says, mesh, part, nothing))
            mesh.start("discovery")
            for part in ("relay", "dns"):
                await mesh.eventually(f"{part} is ready again", partial(mesh.ready, part))
            await mesh.eventually("the relay knows all allocations", mesh.converged)
            await talk.at_once(10)
