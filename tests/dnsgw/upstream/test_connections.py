"""Upstreams that end connections: after an answer, after a number of them, or because there are too many."""

from collections.abc import AsyncIterator

import pytest

from dnsgw.metrics import UpstreamOutcome
from dnsgw.upstream.connections import CONNECTION_LIMITS, ConnectionLimits
from dnsgw.upstream.exchange import Failure
from dnsgw.upstream.limits import UpstreamLimits
from tests.dnsgw.upstream.test_forwarder import RECORDS, Asker, asking, silent
from tests.support.dns_authority import Authority, serving
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

PATIENT = {"attempt_s": 20, "total_s": 40}
QUIET = UpstreamLimits(connections=ConnectionLimits(quiet_s=0.0))
"""Any connection that is open counts as one that the server keeps open."""


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving(RECORDS) as authority:
        yield authority


async def at_once(asker: Asker, count: int, tag: str = "") -> None:
    """Ask so many questions at once; all are answered."""
    waiting = [asker.ask(f"n{n}{tag}.example.test", tcp=True) for n in range(count)]
    for one in waiting:
        await one.answer()


@pytest.mark.parametrize("count", [5, 20, 100])
@pytest.mark.parametrize("share", [1, 2, 7])
async def test_a_close_is_no_verdict_on_a_question(upstream: Authority, share: int, count: int) -> None:
    upstream.close_after = share
    async with asking(upstream.port, **PATIENT) as asker:
        await at_once(asker, count)
        assert asker.count(UpstreamOutcome.UNREACHABLE) == 0
        # What a connection takes is known now: no question is sent to one that will not answer it.
        before = len(upstream.asked), upstream.connections
        await at_once(asker, count, "x")
        assert len(upstream.asked) - before[0] == count
        assert upstream.connections - before[1] >= count // share


async def test_there_are_several_connections_but_not_too_many(upstream: Authority) -> None:
    upstream.close_after = 1
    async with asking(upstream.port, **PATIENT) as asker:
        await at_once(asker, 5)
        upstream.script = silent
        upstream.connections = 0
        upstream.close_after = None
        for n in range(60):
            asker.ask(f"m{n}.example.test", tcp=True)
        await eventually(lambda: upstream.connections == CONNECTION_LIMITS.most)
        assert len(upstream.writers) == CONNECTION_LIMITS.most


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("share", [1, 3, None])
async def test_connections_above_the_servers_limit_are_no_verdict_either(
    upstream: Authority, share: int | None, most: int
) -> None:
    upstream.close_after, upstream.most_open = share, most
    async with asking(upstream.port, **PATIENT) as asker:
        await at_once(asker, 40)
        await at_once(asker, 40, "x")
        assert asker.count(UpstreamOutcome.UNREACHABLE) == 0


async def test_a_share_that_was_misjudged_grows_again(upstream: Authority) -> None:
    upstream.close_after = 1
    async with asking(upstream.port, limits=QUIET, **PATIENT) as asker:
        await at_once(asker, 5)
        upstream.close_after = None  # it had been stopped, and runs again
        for n in range(20):
            await asker.ask(f"m{n}.example.test", tcp=True).answer()
        before = upstream.connections
        await at_once(asker, 10, "x")
        assert upstream.connections - before <= 1


@pytest.mark.parametrize("count", [1, 2, 50])
async def test_a_server_that_answers_nothing_is_given_up_soon(upstream: Authority, count: int) -> None:
    upstream.close_after = 0
    async with asking(upstream.port, **PATIENT) as asker:
        waiting = [asker.ask(f"n{n}.example.test", tcp=True) for n in range(count)]
        for one in waiting:
            assert await one.result() is Failure.UNREACHABLE
        assert upstream.connections <= 3 * count + 1


async def test_a_server_that_stops_answering_is_given_up(upstream: Authority) -> None:
    limits = UpstreamLimits(connections=ConnectionLimits(alive_s=0.1))
    async with asking(upstream.port, limits=limits, **PATIENT) as asker:
        await at_once(asker, 5)
        upstream.close_after = 0
        upstream.hang_up()
        waiting = [asker.ask(f"m{n}.example.test", tcp=True) for n in range(30)]
        for one in waiting:
            assert await one.result() is Failure.UNREACHABLE


async def test_after_a_connection_without_answers_questions_use_the_next_one(upstream: Authority) -> None:
    upstream.script = lambda asked: [] if len(upstream.writers) == 1 else [asked.answer]
    async with asking(upstream.port, attempt_s=0.05, total_s=20) as asker:
        await asker.ask("first.example.test", tcp=True).answer()
        before = len(upstream.asked)
        for n in range(5):
            await asker.ask(f"n{n}.example.test", tcp=True).answer()
        assert len(upstream.asked) - before == 5
        assert upstream.connections == 2


async def test_connections_from_another_address_are_given_up(upstream: Authority) -> None:
    upstream.script = silent
    async with asking(upstream.port, **PATIENT) as asker:
        waiting = [asker.ask(f"n{n}.example.test", tcp=True) for n in range(5)]
        await upstream.heard(5)
        (server,) = asker.forwarder.upstreams
        server.renew()
        assert upstream.connections == 1  # the address is the same
        upstream.script = None
        server._connections.renew(b"\x7f\0\0\x02")
        for one in waiting:
            await one.answer()
        assert upstream.connections == 2
        assert asker.count(UpstreamOutcome.UNREACHABLE) == 0


async def test_questions_that_wait_for_a_connection_end_in_time(upstream: Authority) -> None:
    upstream.close_after = 1
    async with asking(upstream.port, attempt_s=0.1, total_s=0.3) as asker:
        await at_once(asker, 3)
        upstream.script = silent
        waiting = [asker.ask(f"m{n}.example.test", tcp=True) for n in range(60)]
        for one in waiting:
            assert await one.result() is Failure.TIMEOUT
        upstream.script = None
        await asker.ask("again.example.test", tcp=True).answer()


async def test_closing_ends_the_questions_that_wait(upstream: Authority) -> None:
    upstream.close_after = 1
    async with asking(upstream.port, **PATIENT) as asker:
        await at_once(asker, 3)
        upstream.script = silent
        waiting = [asker.ask(f"m{n}.example.test", tcp=True) for n in range(60)]
        await upstream.heard(5)
        asker.forwarder.close()
        assert {await one.result() for one in waiting} == {Failure.CLOSED}


async def test_an_idle_connection_that_the_server_closes_costs_no_answer(upstream: Authority) -> None:
    async with asking(upstream.port, **PATIENT) as asker:
        for tag in "abc":
            await at_once(asker, 5, tag)
            upstream.hang_up()
            await at_once(asker, 5, tag * 2)
        assert asker.count(UpstreamOutcome.UNREACHABLE) == 0
