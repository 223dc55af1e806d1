"""Fixtures that every test file shares."""

import pytest


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run async tests on uvloop, the loop that crossnet runs on."""
    return ("asyncio", {"use_uvloop": True})
