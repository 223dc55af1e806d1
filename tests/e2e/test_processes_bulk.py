"""Bulk transfers through real processes on loopback; `make soak` uses a gigabyte in each direction."""

from pathlib import Path

import pytest

from tests.support import bulk
from tests.support.processes import TURNS, Loopback, Mesh, running_mesh
from tests.support.traffic import BULK_TIMEOUT_S

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(2 * BULK_TIMEOUT_S + 30)]


@pytest.mark.slow
@pytest.mark.parametrize("turn", TURNS)
async def test_bulk_arrives_as_it_was_sent(tmp_path: Path, turn: str) -> None:
    """One stream at full speed in both directions at once, then two hundred at different paces."""
    with running_mesh(Mesh(tmp_path, Loopback(), turn=turn)) as mesh:
        await bulk.one_stream(mesh)
        await bulk.many_streams(mesh)
