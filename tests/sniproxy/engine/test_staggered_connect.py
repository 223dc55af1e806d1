"""Several endpoints, of which some answer, refuse, or say nothing: who wins, who is told of, and what stays open."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sniproxy.engine.staggered_connect import MAX_OUTSTANDING, Endpoint, FirstConnected, connect_first
from tests.support.streams import silent_listener

pytestmark = pytest.mark.anyio

LONG_S = 30.0
STAGGER_S = 0.02


@contextmanager
def answering() -> Iterator[Endpoint]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


@contextmanager
def silent() -> Iterator[Endpoint]:
    with silent_listener() as port:
        yield "127.0.0.1", port


@contextmanager
def refusing() -> Iterator[Endpoint]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        yield bound.getsockname()


class Failures(list[tuple[Endpoint, type[OSError]]]):
    def __call__(self, endpoint: Endpoint, error: OSError) -> None:
        self.append((endpoint, type(error)))


async def first_of(
    *endpoints: Endpoint,
    failures: Failures,
    timeout_s: float = LONG_S,
    limit_s: float = LONG_S,
    stagger_s: float = STAGGER_S,
) -> FirstConnected | None:
    before = len(os.listdir("/proc/self/fd"))
    found = await connect_first(
        iter(endpoints), timeout_s=timeout_s, limit_s=limit_s, head_start_s=lambda _: stagger_s, on_failed=failures
    )
    if found is not None:
        found.stream.close()
    assert len(os.listdir("/proc/self/fd")) == before
    return found


async def test_the_first_one_is_taken_where_it_answers() -> None:
    failures = Failures()
    with answering() as good, answering() as other:
        found = await first_of(good, other, failures=failures, stagger_s=LONG_S)
    assert found is not None
    assert (found.endpoint, found.attempts, failures) == (good, 1, [])


async def test_the_next_one_is_dialled_at_once_where_one_refuses() -> None:
    failures = Failures()
    with answering() as good, refusing() as bad, refusing() as worse:
        found = await first_of(bad, worse, good, failures=failures, stagger_s=LONG_S)
    assert found is not None
    assert (found.endpoint, found.attempts) == (good, 3)
    assert failures == [(bad, ConnectionRefusedError), (worse, ConnectionRefusedError)]


async def test_the_next_one_is_dialled_beside_a_silent_one_which_has_failed_then() -> None:
    failures = Failures()
    with answering() as good, silent() as bad:
        found = await first_of(bad, good, failures=failures)
    assert found is not None
    assert (found.endpoint, found.attempts) == (good, 2)
    assert failures == [(bad, TimeoutError)]


async def test_the_slow_one_may_still_win() -> None:
    failures = Failures()

    def endpoints(slow: Endpoint, server: socket.socket, queued: list[socket.socket]) -> Iterator[Endpoint]:
        yield slow
        for waiting in queued:  # room in its queue: the SYN that is sent again will be answered
            server.accept()[0].close()
            waiting.close()
        yield from ()

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        queued = [socket.create_connection(server.getsockname())]
        slow = server.getsockname()
        found = await connect_first(
            endpoints(slow, server, queued),
            timeout_s=LONG_S,
            limit_s=LONG_S,
            head_start_s=lambda _: STAGGER_S,
            on_failed=failures,
        )
        assert found is not None
        found.stream.close()
    assert (found.endpoint, found.attempts, failures) == (slow, 1, [])


async def test_nobody_answers() -> None:
    failures = Failures()
    with silent() as bad, refusing() as worse:
        assert await first_of(bad, worse, failures=failures, timeout_s=0.1) is None
    assert failures == [(worse, ConnectionRefusedError), (bad, TimeoutError)]


async def test_the_time_for_all_is_limited() -> None:
    failures = Failures()
    with silent() as bad, silent() as worse:
        assert await first_of(bad, worse, failures=failures, limit_s=0.1) is None
    assert failures == [(bad, TimeoutError), (worse, TimeoutError)]


async def test_no_endpoint_is_no_connection() -> None:
    assert await first_of(failures=Failures()) is None


async def test_what_cannot_be_dialled_is_a_failure_and_the_next_one_is_tried() -> None:
    failures = Failures()
    with answering() as good:
        found = await first_of(("127.0.0.1", 0), ("::1", 70000), good, failures=failures)
    assert found is not None
    assert found.endpoint == good
    assert [endpoint for endpoint, _ in failures] == [("127.0.0.1", 0), ("::1", 70000)]


async def test_so_many_are_waited_for_and_no_more() -> None:
    failures = Failures()
    outstanding = 0

    def endpoints(bad: Endpoint, good: Endpoint) -> Iterator[Endpoint]:
        nonlocal outstanding
        idle = len(os.listdir("/proc/self/fd"))
        for _ in range(MAX_OUTSTANDING + 4):
            outstanding = max(outstanding, len(os.listdir("/proc/self/fd")) - idle)
            yield bad
        yield good

    with answering() as good, silent() as bad:
        found = await connect_first(
            endpoints(bad, good), timeout_s=LONG_S, limit_s=LONG_S, head_start_s=lambda _: 0.001, on_failed=failures
        )
        assert found is not None
        found.stream.close()
    assert outstanding == MAX_OUTSTANDING
    assert failures == [(bad, TimeoutError)] * (MAX_OUTSTANDING + 4)


async def test_the_next_one_is_not_asked_for_before_its_time() -> None:
    asked = []

    def endpoints(*them: Endpoint) -> Iterator[Endpoint]:
        for endpoint in them:
            asked.append(endpoint)
            yield endpoint

    with answering() as good, answering() as other:
        found = await connect_first(
            endpoints(good, other),
            timeout_s=LONG_S,
            limit_s=LONG_S,
            head_start_s=lambda _: LONG_S,
            on_failed=Failures(),
        )
        assert found is not None
        found.stream.close()
    assert asked == [good]


async def test_nothing_stays_open_where_it_is_cancelled() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with silent() as bad, silent() as worse:
        opened = len(os.listdir("/proc/self/fd"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await first_of(bad, worse, failures=Failures())
        assert len(os.listdir("/proc/self/fd")) == opened
    assert len(os.listdir("/proc/self/fd")) == before


async def test_it_reaches_ipv6() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        found = await first_of(("::1", port), failures=Failures())
    assert found is not None
    assert found.stream.peer == ("::1", port)
