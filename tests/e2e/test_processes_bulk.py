"""Many bytes through real processes on loopback; `make soak` asks for a gigabyte each way."""

from pathlib import Path

import pytest

from tests.support import bulk
from tests.support.processes import TURNS, Loopback, Mesh, standing
from tests.support.traffic import BULK_TIMEOUT_S

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(2 * BULK_TIMEOUT_S + 30)]


@pytest.mark.slow
@pytest.mark.parametrize("turn", TURNS)
async def test_bulk_arrives_as_it_was_sent(tmp_path: Path, turn: str) -> None:
    """One stream flat out both ways at once, then two hundred at any pace."""
    with standing(Mesh(tmp_path, Loopback(), turn=turn)) as mesh:
        await bulk.one_stream(mesh)
        await bulk.many_streams(mesh)
