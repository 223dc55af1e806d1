"""The sockets to an upstream, and its state."""

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator

import pytest

from discovery.pacing.backoff import Backoff
from dnsgw.upstream.exchange import Failure
from dnsgw.upstream.limits import UPSTREAM_LIMITS, UpstreamLimits
from tests.dnsgw.upstream.test_forwarder import RECORDS, asking, silent
from tests.support.dns_authority import Authority, serving
from tests.support.dns_servers import free_port
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving(RECORDS) as authority:
        yield authority


async def test_sockets_are_given_up_after_a_while(upstream: Authority) -> None:
    async with asking(upstream.port, limits=UpstreamLimits(pool=1, max_uses=3)) as asker:
        for n in range(9):
            await asker.ask(f"n{n}.example.test").answer()
        ports = [asked.source[1] for asked in upstream.asked]
        assert [len(set(ports[n : n + 3])) for n in (0, 3, 6)] == [1, 1, 1]
        assert len(set(ports)) == 3


async def test_an_upstream_that_comes_back_is_used_again() -> None:
    """After an ICMP error uvloop stops watching the socket, so it must not be used again."""
    port = free_port()
    async with asking(port, attempt_s=20, total_s=40, limits=UpstreamLimits(pool=1)) as asker:
        for n in range(3):
            assert await asker.ask(f"n{n}.example.test").result() is Failure.UNREACHABLE
        async with serving(RECORDS, port=port) as upstream:
            assert await asker.ask().answer() == upstream.asked[0].answer


async def test_descriptors_are_bounded_and_ports_change(upstream: Authority) -> None:
    """Some questions get no answer, so their sockets must be kept."""
    limits = UpstreamLimits(pool=4, max_retired=8)
    upstream.script = lambda asked: [] if re.match(r"n\d*0\.", asked.name) else [asked.answer]
    async with asking(upstream.port, attempt_s=20, total_s=40, limits=limits) as asker:
        before = len(os.listdir("/proc/self/fd"))
        for n in range(1, 600):
            waiting = asker.ask(f"n{n}.example.test")
            if n % 10:
                await waiting.answer()
        assert len(os.listdir("/proc/self/fd")) - before <= 4 + 8
    ports: dict[int, int] = {}
    async with asking(upstream.port, limits=limits) as asker:
        upstream.script = None
        upstream.asked.clear()
        for n in range(300):
            await asker.ask(f"m{n}.example.test").answer()
        for asked in upstream.asked:
            ports[asked.source[1]] = ports.get(asked.source[1], 0) + 1
        assert max(ports.values()) <= UPSTREAM_LIMITS.max_uses


async def test_a_socket_is_closed_when_it_is_old(upstream: Authority) -> None:
    async with asking(upstream.port, limits=UpstreamLimits(pool=1, max_age_s=0.05)) as asker:
        before = len(os.listdir("/proc/self/fd"))
        await asker.ask("n1.example.test").answer()
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)
        await asker.ask("n2.example.test").answer()
        first, second = (asked.source for asked in upstream.asked)
        assert first != second


def test_the_kernel_draws_ports_from_its_whole_range() -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        low, high = map(int, file.read().split())
    seen = []
    for _ in range(512):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("127.0.0.1", 9))
            seen.append(sock.getsockname()[1])
    eighths = {(port - low) * 8 // (high + 1 - low) for port in seen}
    assert eighths == set(range(8))
    assert len({port & 1 for port in seen}) == 2
    assert len(set(seen)) > 400


async def test_a_down_upstream_is_tried_again_by_a_single_question(upstream: Authority) -> None:
    limits = UpstreamLimits(down=Backoff(0.0, 30.0))
    async with serving(RECORDS) as first:
        first.script = silent
        async with asking(first.port, upstream.port, race_s=0.2, limits=limits) as asker:
            for n in range(3):
                await asker.ask(f"n{n}.example.test").answer()
            first.script = None
            async with asyncio.timeout(5):
                while (answer := await asker.ask("www.example.test").answer()) != first.asked[-1].answer:
                    assert answer
            before = len(upstream.asked)
            await asker.ask("n9.example.test").answer()
            assert len(upstream.asked) == before
