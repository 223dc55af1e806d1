"""Parts of this version with parts of the previous one, in both combinations: every stream succeeds at the first attempt."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.previous import interpreter
from tests.support.processes import Loopback, Mesh, running_mesh
from tests.support.talk import talking

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(400)]  # the first test installs that version

STREAMS = 6
BULK_PINGS = 100
"""200 kB in each direction: more than a TURN server carries without RECEIVED."""

MIXES = [
    ("relay",),
    ("gateway",),
    ("discovery",),
    ("turn",),
    ("relay", "discovery"),
    ("gateway", "discovery"),
    ("discovery", "turn", "relay"),
    ("discovery", "turn", "gateway"),
]


CASES = [pytest.param(old, "embedded", id="+".join(old)) for old in MIXES] + [
    pytest.param(
        old, "coturn", id=f"{'+'.join(old)} by coturn", marks=[pytest.mark.interop, pytest.mark.needs("turnserver")]
    )
    for old in MIXES
    if "turn" not in old
]


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter with that version installed, shared by all workers."""
    base = tmp_path_factory.getbasetemp()
    return interpreter((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "previous")


def as_before(document: dict[str, Any]) -> None:
    """Convert a gateway's file for the previous version."""
    gateway = document["gateway"]
    allowed = [access.pop("allow", []) for access in gateway.get("turn", {}).values()]
    gateway["allow_turn_servers"] = sorted({cidr for cidrs in allowed for cidr in cidrs})


@pytest.mark.parametrize(("old", "turn"), CASES)
async def test_old_and_new_work_together(tmp_path: Path, previous: Path, old: Sequence[str], turn: str) -> None:
    mesh = Mesh(
        tmp_path,
        Loopback(),
        turn=turn,
        changes={"gateway": as_before} if "gateway" in old else {},
        pythons=dict.fromkeys(old, previous),
    )
    with running_mesh(mesh):
        async with talking(mesh) as talk:
            for _ in range(STREAMS):
                await talk.once()
            held = await talk.hold()
            for _ in range(BULK_PINGS):
                await held.ping()
            await held.end()
            count = talk.count + 1
            await mesh.eventually("every stream is logged", lambda: len(mesh.events("relay")) >= count)
        ends = [(line["reason"], line["attempts"], line["route"]) for line in mesh.events("relay")]
        assert ends == [("ok", 1, "turn")] * count
        # Only a gateway of this version writes an epoch into its records. So this checks that the parts have the intended versions.
        protos = [record["spec"].get("proto", []) for record in mesh.records("relay", "allocation")]
        assert all(any(entry.startswith("epoch-") for entry in proto) is ("gateway" not in old) for proto in protos)
    assert mesh.defects() == []
