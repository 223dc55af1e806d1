"""Pipes: as many as allowed, always large, and reused only if empty."""

import errno
import fcntl
import os
import resource
from collections.abc import Iterator

import pytest

from sniproxy.engine.pipes import PIPE_BYTES, Pipe, PipePool


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Check that the test leaves as many descriptors open as before."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("descriptors")
def test_a_pipe_is_large_and_does_not_block() -> None:
    pipe = Pipe()
    assert fcntl.fcntl(pipe.writer, fcntl.F_GETPIPE_SZ) == PIPE_BYTES
    with pytest.raises(BlockingIOError):
        os.read(pipe.reader, 1)
    assert os.write(pipe.writer, bytes(2 * PIPE_BYTES)) == PIPE_BYTES
    pipe.close()


@pytest.mark.usefixtures("descriptors")
def test_the_pool_has_a_limit_and_counts_whom_it_denied() -> None:
    pool = PipePool(limit=2)
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    assert pool.take() is None
    assert (pool.taken, pool.denied) == (2, 1)
    pool.give_back(first)
    assert pool.take() is first, "an idle one is used again"
    pool.give_back(first)
    pool.give_back(second)
    assert pool.taken == 0
    pool.close()


@pytest.mark.usefixtures("descriptors")
def test_a_pipe_that_holds_bytes_is_never_used_again() -> None:
    """The bytes belong to another stream, and the next one must not deliver them."""
    pool = PipePool(limit=1)
    pipe = pool.take()
    assert pipe is not None
    pipe.held = os.write(pipe.writer, b"somebody's")
    pool.give_back(pipe)
    fresh = pool.take()
    assert fresh is not None
    assert fresh is not pipe
    with pytest.raises(BlockingIOError):
        os.read(fresh.reader, 1)
    pool.give_back(fresh)
    pool.close()


@pytest.mark.usefixtures("descriptors")
def test_where_the_users_pages_are_used_up_there_is_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unprivileged user gets 64 large pipes, then EPERM. A small pipe would cost more than it saves."""

    def denied(*arguments: object) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    pool = PipePool()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", denied)
        assert pool.take() is None
    assert (pool.taken, pool.denied) == (0, 1)
    pipe = pool.take()
    assert pipe is not None, "and later there may be one"
    pool.give_back(pipe)
    pool.close()


@pytest.mark.usefixtures("descriptors")
def test_where_descriptors_are_used_up_there_is_no_pipe() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    pool = PipePool()
    highest = max(map(int, os.listdir("/proc/self/fd")))
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        assert pool.take() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)
    assert (pool.taken, pool.denied) == (0, 1)
