"""Tokens that the discovery server no longer knows, or that lose a permission a part needs, while everything runs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Loopback, Mesh, running_mesh
from tests.support.talk import talking

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


def without(line: str, part: str, *, kinds: bool) -> str:
    """Remove the token of a part, or the kinds that it may write, from a line of the tokens file."""
    entry = json.loads(line.removeprefix("- "))
    if entry["name"] != part:
        return line
    return "- " + json.dumps(entry | {"kinds": ["vip"]}) if kinds else ""


def change(mesh: Mesh, lines: list[str]) -> None:
    fresh = mesh.folder / "tokens.fresh"
    fresh.write_text("\n".join(lines))
    fresh.replace(mesh.folder / "tokens.yaml")


def waits_for(mesh: Mesh, part: str, words: str) -> bool:
    answer: dict[str, Any] = mesh.ask(part, "/readyz") or {}
    return not answer.get("ready", True) and any(words in waiting for waiting in answer["waiting_for"])


def logged(mesh: Mesh, part: str, event: str, words: str) -> bool:
    return any(words in json.dumps(found) for found in mesh.events(part, event))


async def test_a_token_that_the_server_no_longer_knows(tmp_path: Path) -> None:
    words = "the token is not known here"
    with running_mesh(Mesh(tmp_path, Loopback())) as mesh:
        async with talking(mesh) as talk:
            held = await talk.hold()
            before = (tmp_path / "tokens.yaml").read_text().splitlines()
            for part in ("relay", "gateway", "turn"):
                change(mesh, [without(line, part, kinds=False) for line in before])
                await mesh.eventually(f"{part} is not ready", partial(waits_for, mesh, part, words))
                assert logged(mesh, part, "discovery_refused", words)
                assert words in str(mesh.ask(part, "/status")["conditions"]["discovery_access"])
                await mesh.eventually(
                    "the server has logged it", partial(logged, mesh, "discovery", "request_refused", words)
                )
                await held.ping()
                change(mesh, before)
                await mesh.eventually(f"{part} is ready again", partial(mesh.ready, part))
            await mesh.eventually("the relay knows all allocations", mesh.converged)
            await held.ping()
            await held.end()
            await talk.once()


async def test_a_token_that_may_no_longer_write_what_a_part_must_write(tmp_path: Path) -> None:
    words = "the token may not write relay records"
    with running_mesh(Mesh(tmp_path, Loopback())) as mesh:
        async with talking(mesh) as talk:
            held = await talk.hold()
            before = (tmp_path / "tokens.yaml").read_text().splitlines()
            mesh["discovery"].kill()
            mesh.delete_store()  # so that all records have to be written again
            change(mesh, [without(line, "relay", kinds=True) for line in before])
            mesh.start("discovery")
            await mesh.eventually("the relay is not ready", partial(waits_for, mesh, "relay", words))
            await mesh.eventually(
                "the server has logged it", partial(logged, mesh, "discovery", "request_refused", words)
            )
            (refused,) = [each for each in mesh.events("discovery", "request_refused") if words in each["why"]][:1]
            assert (refused["token"], refused["of_network"], refused["status"]) == ("relay", "a", 403)
            await held.ping()
            change(mesh, before)
            await mesh.eventually("the relay is ready again", partial(mesh.ready, "relay"))
            await mesh.eventually("the relay knows all allocations", mesh.converged)
            await held.ping()
            await held.end()
