"""Fixtures and marks shared by all test files."""

import os

import pytest
from hypothesis import settings

from tests import requirements

# No deadline per example: on a busy machine it would fail by chance. Each test has pytest's timeout.
settings.register_profile("crossnet", deadline=None)
settings.load_profile("crossnet")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "needs(program, ...): programs (or 'netns', 'userns', 'namespaces') without which it is skipped, or fails with CI=true",
    )
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{requirements.SBIN}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for requirement in mark.args:
            reason = requirements.lacking(requirement)
            if reason is None:
                continue
            if os.environ.get("CI") == "true":
                pytest.fail(f"{reason} (with CI=true this is a failure, not a skip)", pytrace=False)
            pytest.skip(reason)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run async tests on uvloop, the loop that crossnet runs on."""
    return ("asyncio", {"use_uvloop": True})
