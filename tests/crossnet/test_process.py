"""What a process sets up before its roles start."""

import gc
import resource
from collections.abc import Iterator

import pytest

from crossnet.process import COLLECT_AT, leaves, raise_open_files, spare_collections


@pytest.fixture
def collector() -> Iterator[tuple[int, int, int]]:
    thresholds = gc.get_threshold()
    yield thresholds
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def test_leaves_of_a_group() -> None:
    group = ExceptionGroup("x", [ValueError("1"), ExceptionGroup("y", [OSError("2")])])
    assert [str(error) for error in leaves(group)] == ["1", "2"]


def test_open_files_are_as_many_as_may_be() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        assert raise_open_files() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert raise_open_files() == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_garbage_collection_skips_objects_from_the_start(collector: tuple[int, int, int]) -> None:
    spare_collections()
    assert gc.get_freeze_count() > 1000
    assert gc.get_threshold() == (COLLECT_AT, *collector[1:])
