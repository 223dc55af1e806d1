"""Meshes on hosts of their own, one for each kind of TURN server, shared by the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.support.hosts import hosts
from tests.support.processes import TURNS, Mesh, running_mesh

LATE_S = 0.4
"""Delay of a gateway's bind, as from another continent over TLS."""


@pytest.fixture(scope="module", params=TURNS)
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh over shaped links."""
    with hosts() as ground, running_mesh(Mesh(tmp_path_factory.mktemp("mesh"), ground, turn=request.param)) as mesh:
        yield mesh


@pytest.fixture(scope="module", params=TURNS)
def late_mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The same, with every bind delayed by 0.4 s."""
    folder = tmp_path_factory.mktemp("late")
    with hosts() as ground, running_mesh(Mesh(folder, ground, turn=request.param, late_s=LATE_S)) as mesh:
        yield mesh
