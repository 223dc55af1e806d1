"""Somebody forges upstream's answers while many ask for the name: nothing false may get into the cache (RFC 5452)."""

import asyncio
import random
from collections.abc import Iterator

import dns.message
import pytest

from dnsgw.metrics import UpstreamOutcome
from tests.dnsgw.forger import Forger
from tests.support.dns_authority import Asked, serving
from tests.support.dns_meshes import mesh, relay
from tests.support.dns_packets import RD, opt, option, query
from tests.support.dns_servers import Client, address, running
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

TRIALS = 20
QUESTIONS = 200
DELAY_S = 0.25
"""Upstream takes so long to answer: the time that a forger has."""
TRUE, FALSE = "192.0.2.1", "192.0.2.66"


def varied(name: str) -> Iterator[bytes]:
    """Questions that differ in all that does not change their answer."""
    for n in range(QUESTIONS):
        subnet = option(8, bytes((0, 1, 24, 0, 10, n, 0)))
        edns = [
            opt(1000 + n),
            opt(z=n + 1),
            opt(options=subnet),
            opt(options=option(65001, n.to_bytes(2, "big"))),
            opt(options=option(10, random.randbytes(8))),
        ][n % 5]
        yield query(name, ident=n, flags=RD, edns=edns)


def addresses(reply: bytes) -> list[str]:
    return [str(item) for rrset in dns.message.from_wire(reply).answer for item in rrset]


async def test_questions_with_one_answer_are_one_packet() -> None:
    async with serving({("www.example.test", "A"): [TRUE]}) as upstream:
        held: list[Asked] = []
        upstream.script = lambda asked: held.append(asked) or []  # type: ignore[func-returns-value]
        async with running(mesh(relay("10.0.0.9")), upstream.port) as server:
            with Client(address(server)) as client:
                for packet in varied("www.example.test"):
                    client.send(packet)
                await upstream.heard(1)
                await eventually(lambda: server.metrics.in_flight() == QUESTIONS)
                upstream.send(held[0].answer, held[0].source)
                replies = {(await client.receive())[:2] for _ in range(QUESTIONS)}
            assert len(replies) == QUESTIONS
            assert len(upstream.asked) == 1


@pytest.mark.timeout(60)
async def test_forged_answers_poison_nothing() -> None:
    names = [f"w{n}.shop.example.test" for n in range(TRIALS)]
    async with serving({(name, "A"): [TRUE] for name in names}) as upstream:
        loop = asyncio.get_running_loop()

        def slow(asked: Asked) -> list[bytes]:
            if asked.tcp:
                return [asked.answer]
            loop.call_later(DELAY_S, upstream.send, asked.answer, asked.source)
            return []

        upstream.script = slow
        assert upstream.transport is not None
        poisoned, forged = 0, 0
        async with running(mesh(relay("10.0.0.9")), upstream.port) as server:
            with Forger(upstream.transport.get_extra_info("socket"), upstream.port) as forger:
                for name in names:
                    forger.forge(name, FALSE)
                    with Client(address(server)) as client:
                        for packet in varied(name):
                            client.send(packet)
                        replies = [await client.receive() for _ in range(QUESTIONS)]
                        forged += forger.stop()
                        replies.append(await client.ask(query(name)))
                    poisoned += any(addresses(reply) != [TRUE] for reply in replies)
        assert server.metrics.upstream[UpstreamOutcome.WRONG_ID] >= TRIALS, f"only {forged} packets were forged"
        assert poisoned == 0, f"{poisoned} of {TRIALS} trials"
