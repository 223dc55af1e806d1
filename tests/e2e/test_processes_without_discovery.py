"""What starts while discovery is away: real processes that have nothing but the view they saved, or not even that."""

import asyncio
import json
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import dnslib
import pytest

from tests.support.processes import Change, Loopback, Mesh, standing
from tests.support.running import free_port
from tests.support.talk import talking

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ASK_TIMEOUT_S = 2.0


def saved(mesh: Mesh, part: str) -> Path:
    return mesh.folder / f"{part}.snapshot"


def a_mesh(folder: Path, turn: str, *, direct: bool = False) -> Mesh:
    """Have every part save its view; with `direct` relays reach the gateway without a TURN server, too."""

    def saving(part: str) -> Change:
        def change(document: dict[str, Any]) -> None:
            document["snapshot"] = f"{part}.snapshot"
            if part == "gateway":
                # Credentials that a server issues are not to be had from one that is away.
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


def says(mesh: Mesh, part: str, told: object) -> bool:
    return bool(mesh.ask(part, "/readyz") == told)


def has_logged(mesh: Mesh, part: str, words: str) -> bool:
    return any(words in line for line in mesh.lines(part))


async def all_saved(mesh: Mesh, *kinds: str) -> None:
    for part in ("relay", "gateway", "dns"):
        await mesh.eventually(f"{part} has saved {kinds}", partial(has_saved, mesh, part, *kinds, "turn", "relay"))


async def serve_stale(mesh: Mesh, *parts: str) -> None:
    """Wait until these parts are ready, and hold that they say how old their view is."""
    for part in parts:
        await mesh.eventually(f"{part} is ready", partial(mesh.ready, part))
        told = mesh.ask(part, "/readyz")
        assert told["ready"]
        assert told["stale_s"] > 0
        discovery = mesh.ask(part, "/status")["discovery"]
        assert discovery["synced"]
        assert not discovery["connected"]
        assert discovery["records"]


def addresses(mesh: Mesh, name: str) -> list[str]:
    """Ask the resolver as a client does."""
    with mesh.ground.on("client"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(ASK_TIMEOUT_S)
        client.connect((mesh.plan.dns, mesh.plan.dns_port))
        client.send(dnslib.DNSRecord.question(name).pack())
        return [str(answer.rdata) for answer in dnslib.DNSRecord.parse(client.recv(4096)).rr]


async def test_everything_starts_again_from_what_it_saved(tmp_path: Path) -> None:
    with standing(a_mesh(tmp_path, "embedded", direct=True)) as mesh:
        async with talking(mesh) as talk:
            await talk.once()
            await all_saved(mesh, "allocation", "gateway")
            before = {line["relayed"][1] for line in mesh.registrations()}
            for part in mesh.names:
                mesh[part].kill()
            for part in mesh.names:
                if part != "discovery":
                    mesh.start(part)
            await serve_stale(mesh, "relay", "gateway", "dns", "turn")
            assert await asyncio.to_thread(addresses, mesh, talk.name) == [mesh.plan.relay]

            # The TURN server is new as well, so what the relay has saved of allocations leads nowhere: but directly it goes.
            await talk.at_once(10)
            assert {event["route"] for event in mesh.events("relay")[-10:]} == {"direct"}

            # By the TURN server's record and the relay's, as they were saved, the gateway has registered and let the relay in.
            await mesh.eventually(
                "the gateway is registered anew", lambda: any(line["permissions"] for line in mesh.registrations())
            )

            mesh.start("discovery")
            await mesh.eventually("all is known as it is now", mesh.whole)
            await mesh.eventually("the view is live", lambda: mesh.ask("relay", "/readyz")["stale_s"] == 0)

            def ports() -> set[int]:
                return {line["relayed"][1] for line in mesh.registrations() if line["relayed"]}

            # One replica may have found the new TURN server a little later than the other.
            await mesh.eventually(
                "the records are of the new allocations",
                lambda: {record["spec"]["port"] for record in mesh.records("relay", "allocation")} == ports() != before,
            )
            await talk.at_once(10)


@pytest.mark.interop
@pytest.mark.needs("turnserver")
async def test_a_relay_that_starts_alone_uses_what_it_saved_and_nothing_damaged(tmp_path: Path) -> None:
    with standing(a_mesh(tmp_path, "coturn")) as mesh:
        async with talking(mesh) as talk:
            await talk.once()
            await all_saved(mesh, "allocation")
            for part in ("discovery", "relay", "dns"):
                mesh[part].kill()
            for part in ("relay", "dns"):
                mesh.start(part)
            await serve_stale(mesh, "relay", "dns")
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
                await mesh.eventually("it is set aside", partial(has_logged, mesh, part, "set aside"))
                assert saved(mesh, part).with_name(f"{part}.snapshot.bad").exists()
                assert not saved(mesh, part).exists()
                nothing = {"ready": False, "waiting_for": ["a first view of discovery"], "stale_s": None}
                await mesh.eventually("it says what it lacks", partial(says, mesh, part, nothing))
            mesh.start("discovery")
            for part in ("relay", "dns"):
                await mesh.eventually("it is ready", partial(mesh.ready, part))
            await mesh.eventually("all is known", mesh.whole)
            await talk.at_once(10)
