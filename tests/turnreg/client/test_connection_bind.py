"""Binding announced peers, with a scripted server that behaves in unusual ways."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.scripted_turn import KEY, Answer, Scripted, error, good, scripted, signed
from tests.support.turn_servers import Holding, RunningServer, held
from tests.support.waiting import eventually
from turnreg.client.allocation import BindResult, Timing
from turnreg.client.connection_bind import LOGGED_PER_PERIOD
from turnreg.stun.message import Attribute, Message, MessageClass, Method

pytestmark = pytest.mark.anyio

FRESH = 1e9
"""A nonce never grows old."""


@asynccontextmanager
async def announcing(
    *binds: Answer, timing: Timing | None = None, **script: list[Answer]
) -> AsyncIterator[tuple[Scripted, Holding]]:
    """Hold an allocation on a server that answers binds as given."""
    told = {Method.CONNECTION_BIND: list(binds) or [good]}
    told |= {Method[name.upper()]: answers for name, answers in script.items()}
    timing = timing or Timing(nonce_fresh_s=FRESH)
    async with (
        scripted(told) as server,
        held(RunningServer(server.address, server.port), timing=timing) as holding,
    ):
        yield server, holding


async def results(holding: Holding, count: int = 1) -> list[BindResult]:
    await eventually(lambda: len(holding.results) >= count)
    return holding.results


@pytest.mark.parametrize(
    "answer",
    [good, lambda request: request.success().pack()],
    ids=["signed", "not signed, as pion does"],
)
async def test_success(answer: Answer) -> None:
    async with announcing(lambda request: answer(request) + b"payload") as (server, holding):
        server.announce(7)
        bound = await holding.stream()
        assert await bound.stream.recv_exactly(7) == b"payload"
        assert bound.peer == ("127.0.0.1", 40_000)
        bind = server.requests[-1]
        assert bind.number(Attribute.CONNECTION_ID) == 7
        assert bind.verify_integrity(KEY)


async def test_nothing_is_sent_behind_the_bind_before_its_answer() -> None:
    async with announcing() as (server, holding):
        server.bind_delay_s = 0.1
        server.announce(7)
        await holding.stream()
        assert server.stray == b""


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (error(400), BindResult.REJECTED),
        (lambda request: signed(request.success(), b"another key"), BindResult.REJECTED),
        (lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n", BindResult.MALFORMED),
        (lambda _: Message(Method.CONNECTION_BIND, MessageClass.SUCCESS, bytes(12)).pack(), BindResult.MALFORMED),
        (lambda _: b"\xff" * 20, BindResult.MALFORMED),
    ],
    ids=["400", "bad integrity", "http", "another transaction", "not stun"],
)
async def test_a_bind_that_fails_ends_nothing_else(answer: Answer, result: BindResult) -> None:
    async with announcing(answer, good) as (server, holding):
        server.announce(7)
        assert await results(holding) == [result]
        server.announce(8)
        await holding.stream()


async def test_silence_ends_a_bind() -> None:
    timing = Timing(bind_s=0.2, nonce_fresh_s=FRESH)
    async with announcing(lambda _: b"", timing=timing) as (server, holding):
        server.announce(7)
        assert await results(holding) == [BindResult.TIMEOUT]


@pytest.mark.parametrize("code", [401, 438])
async def test_a_refusal_for_the_nonce_is_tried_again_with_a_proved_one(code: int) -> None:
    script = {"create_permission": [good, error(438, nonce="n1"), good]}
    async with announcing(error(code, nonce="useless"), good, **script) as (server, holding):  # type: ignore[arg-type]
        server.announce(7)
        await holding.stream()
        binds = [request for request in server.requests if request.method == Method.CONNECTION_BIND]
        assert [bind.text(Attribute.NONCE) for bind in binds] == ["n0", "n1"]
    async with announcing(error(code, nonce="useless")) as (server, holding):
        server.announce(7)
        assert await results(holding) == [BindResult.REJECTED]
        assert server.count(Method.CONNECTION_BIND) == 2


async def test_one_proof_of_the_nonce_serves_all_who_wait_for_it() -> None:
    async with announcing(timing=Timing(nonce_fresh_s=-1)) as (server, holding):
        before = server.count(Method.CREATE_PERMISSION)
        for number in range(50):
            server.announce(number, ("127.0.0.1", 40_000 + number))
        for _ in range(50):
            await holding.stream()
        assert 1 <= server.count(Method.CREATE_PERMISSION) - before < 25


async def test_a_nonce_that_cannot_be_proved_is_used_all_the_same() -> None:
    timing = Timing(nonce_fresh_s=0, transaction_s=0.1)
    async with announcing(timing=timing, create_permission=[good, lambda _: b""]) as (server, holding):
        server.announce(7)
        await holding.stream()


async def test_strangers_and_nonsense_are_not_bound() -> None:
    async with announcing() as (server, holding):
        server.announce(1, ("127.0.0.9", 40_000))
        attempt = Message(Method.CONNECTION_ATTEMPT, MessageClass.INDICATION, bytes(12))
        server.indicate(attempt)
        server.indicate(attempt.with_bytes(Attribute.CONNECTION_ID, b"12345"))
        server.indicate(attempt.with_number(Attribute.CONNECTION_ID, 1).with_bytes(Attribute.XOR_PEER_ADDRESS, b"x"))
        server.indicate(attempt.with_bytes(0x7ABC, b""))  # not understood: ignored unseen (RFC 8489, section 6.3.2)
        server.indicate(Message(Method.DATA, MessageClass.INDICATION, bytes(12)))
        server.announce(2)
        await holding.stream()
        assert holding.results == [
            BindResult.NOT_ALLOWED,
            BindResult.MALFORMED,
            BindResult.MALFORMED,
            BindResult.MALFORMED,
            BindResult.OK,
        ]
        assert server.count(Method.CONNECTION_BIND) == 1


async def test_a_peer_announced_twice_is_bound_once() -> None:
    async with announcing() as (server, holding):
        server.bind_delay_s = 0.1
        server.announce(7)
        server.announce(7)
        await holding.stream()
        server.announce(8)
        await holding.stream()
        assert server.count(Method.CONNECTION_BIND) == 2


async def test_bounds() -> None:
    timing = Timing(max_binds=2, max_waiting=4, nonce_fresh_s=FRESH)
    async with announcing(timing=timing) as (server, holding):
        server.bind_delay_s = 0.1
        for number in range(6):
            server.announce(number, ("127.0.0.1", 40_000 + number))
        for _ in range(4):
            await holding.stream()
        assert holding.results == [BindResult.OVERLOADED] * 2 + [BindResult.OK] * 4


async def test_who_has_waited_for_too_long_is_left_to_its_end() -> None:
    """Its relay has given up by then; the peers queued after it are bound instead."""
    timing = Timing(max_binds=1, max_queued_s=0.15, bind_s=0.3, nonce_fresh_s=FRESH)
    async with announcing(lambda _: b"", good, timing=timing) as (server, holding):
        for number in range(3):
            server.announce(number, ("127.0.0.1", 40_000 + number))
        await results(holding, 3)
        assert sorted(holding.results) == [BindResult.OVERLOADED] * 2 + [BindResult.TIMEOUT]
        assert server.count(Method.CONNECTION_BIND) == 1
        server.announce(1)  # nothing is left of the earlier one
        await holding.stream()


async def test_an_allocation_that_ends_with_peers_in_its_queue() -> None:
    timing = Timing(max_binds=1, nonce_fresh_s=FRESH)
    async with announcing(lambda _: b"", timing=timing) as (server, holding):
        for number in range(20):
            server.announce(number, ("127.0.0.1", 40_000 + number))
        await eventually(lambda: server.count(Method.CONNECTION_BIND) == 1)
    assert not holding.results
    assert server.count(Method.CONNECTION_BIND) == 1


async def test_a_data_connection_that_cannot_be_opened() -> None:
    async with announcing(timing=Timing(nonce_fresh_s=FRESH)) as (server, holding):
        holding.allocation.port = 1
        server.announce(7)
        assert await results(holding) == [BindResult.CONNECT_FAILED]


async def test_failures_are_logged_so_often_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    count = LOGGED_PER_PERIOD + 50
    async with announcing() as (server, holding):
        for number in range(count):
            server.announce(number, ("127.0.0.9", 1))
        assert await results(holding, count) == [BindResult.NOT_ALLOWED] * count
        assert caplog.text.count("bind_failed") == LOGGED_PER_PERIOD
