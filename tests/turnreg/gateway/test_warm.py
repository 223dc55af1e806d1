"""Warm streams at the gateway: OPEN is verified like a preamble, and the number of waiting connections is limited."""

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from sniproxy.tunnel.capsules import CapsuleType, header
from sniproxy.tunnel.messages import Message, Open, Opened, Ping, Pong, Ready, Refused
from sniproxy.tunnel.preamble import SigningKey, WarmPreamble, sign
from tests.support.gateways import KEY, Running, Visit, a_gateway, data  # type: ignore[attr-defined]
from tests.support.hellos import client_hello
from tests.support.preambles import preamble
from tests.support.streams import until_reset
from turnreg.gateway.limits import GatewayLimits

pytestmark = pytest.mark.anyio

HELLO = client_hello("orders.shop.example")
TOKEN = b"12345678"


def warm_preamble(**changes: object) -> WarmPreamble:
    like = preamble("127.0.0.1:1", HELLO)
    made = WarmPreamble(
        nonce=secrets.token_bytes(16),
        from_network=like.from_network,
        to_network=like.to_network,
        addressee=like.addressee,
        key_id=like.key_id,
        time_ms=like.time_ms,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


async def warm(running: Running, **changes: object) -> Visit:
    """Open a connection that waits for a stream."""
    visit = await running.connect()
    visit.connection.ends.warm = True
    await visit.stream.send(sign(warm_preamble(**changes), KEY.secret))
    assert await visit.answer() == Ready()
    return visit


async def say(visit: Visit, *messages: Message) -> None:
    for message in messages:
        await visit.connection.send(message)


def opening(target: str) -> Open:
    return Open(sign(preamble(target, HELLO), KEY.secret))


def waiting(running: Running) -> int:
    """How many connections wait for a stream."""
    value = running.registry.get_sample_value("crossnet_gateway_warm_streams")
    assert value is not None
    return int(value)


async def test_pings_are_answered_and_a_stream_comes_through() -> None:
    async with a_gateway() as running:
        service = await running.service()
        visit = await warm(running)
        assert waiting(running) == 1
        assert len(running.gateway.ledger) == 0
        for number in range(3):
            await say(visit, Ping(bytes([number] * 8)))
            assert await visit.answer() == Pong(bytes([number] * 8))
        await say(visit, Ping(TOKEN), opening(service.target))
        await visit.stream.send(data(HELLO))
        assert await visit.answer() == Pong(TOKEN)
        assert isinstance(await visit.answer(), Opened)
        assert len(running.gateway.ledger) == 1
        assert waiting(running) == 0
        visit.stream.reset()
        (line,) = await running.ended()
        assert (line["warm"], line["target"]) == (True, service.target)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key_id": "zz-1"}, "bad_signature"),
        ({"to_network": "c"}, "bad_signature"),
        ({"addressee": "gw-2"}, "replay"),
        ({"time_ms": 1}, "clock_skew"),
        ({"epoch": bytes(16)}, "stale_epoch"),
    ],
)
async def test_a_warm_preamble_that_is_not_right(changes: dict[str, object], reason: str) -> None:
    async with a_gateway() as running:
        visit = await running.connect()
        await visit.stream.send(sign(warm_preamble(**changes), KEY.secret))
        assert (await visit.refused()).reason == reason


async def test_pings_without_end_are_cut_with_a_reason() -> None:
    async with a_gateway() as running:
        visit = await warm(running)
        await visit.stream.send(Ping(TOKEN).pack() * 1000)
        with suppress(ConnectionResetError):
            while await visit.stream.recv():
                pass
        assert running.registry.get_sample_value("crossnet_gateway_connections_refused_total", {"reason": "flood"}) == 1
        assert waiting(running) == 0
        visit.stream.close()


async def test_one_network_cannot_take_all_places() -> None:
    other = SigningKey(id="cb-1", secret=bytes(range(128, 160)), from_network="c", to_network="b")
    async with a_gateway(keys=(KEY, other), limits=GatewayLimits(max_warm=4)) as running:
        kept = [await warm(running) for _ in range(2)]
        third = await running.connect()
        await third.stream.send(sign(warm_preamble(), KEY.secret))
        refused = await third.refused()
        assert (refused.reason, "network 'a'" in refused.detail) == ("overloaded", True)
        fourth = await running.connect()
        await fourth.stream.send(sign(warm_preamble(key_id="cb-1", from_network="c"), other.secret))
        assert await fourth.answer() == Ready()
        for visit in (*kept, fourth):
            visit.stream.close()


async def test_a_captured_warm_preamble_is_of_no_use() -> None:
    async with a_gateway() as running:
        captured = sign(warm_preamble(), KEY.secret)
        first = await running.connect()
        await first.stream.send(captured)
        assert await first.answer() == Ready()
        second = await running.connect()
        await second.stream.send(captured)
        assert (await second.refused()).reason == "replay"
        first.stream.close()


@pytest.mark.parametrize(
    ("brought", "reason"),
    [
        (lambda: b"garbage", "protocol_error"),
        (lambda: sign(warm_preamble(), KEY.secret), "protocol_error"),
        (lambda: sign(preamble("127.0.0.1:1", HELLO, continues=True), KEY.secret), "protocol_error"),
        (lambda: sign(preamble("127.0.0.1:1", HELLO, addressee="gw-2"), KEY.secret), "replay"),
        (lambda: sign(preamble("127.0.0.1:1", HELLO), bytes(32)), "bad_signature"),
        (lambda: sign(preamble("192.0.2.1:1", HELLO), KEY.secret), "wrong_target"),
    ],
)
async def test_invalid_preambles_in_open(brought: Callable[[], bytes], reason: str) -> None:
    async with a_gateway() as running:
        visit = await warm(running)
        await say(visit, Open(brought()))
        await visit.stream.send(data(HELLO))
        answer = await visit.answer()
        assert isinstance(answer, Refused)
        assert answer.reason == reason
        (line,) = await running.ended()
        assert line["reason"] == reason
        visit.stream.close()


async def test_a_captured_open_is_of_no_use_on_another_connection() -> None:
    async with a_gateway() as running:
        service = await running.service()
        captured = opening(service.target)
        first, second = await warm(running), await warm(running)
        await say(first, captured)
        await first.stream.send(data(HELLO))
        assert isinstance(await first.answer(), Opened)
        await say(second, captured)
        answer = await second.answer()
        assert isinstance(answer, Refused)
        assert answer.reason == "replay"
        for visit in (first, second):
            visit.stream.close()


async def test_data_before_open_ends_it() -> None:
    async with a_gateway() as running:
        visit = await warm(running)
        await visit.stream.send(header(CapsuleType.DATA, 5) + b"hello")
        answer = await visit.answer()
        assert isinstance(answer, Refused)
        assert answer.reason == "protocol_error"
        assert waiting(running) == 0
        visit.stream.close()


async def test_a_silent_warm_connection_is_closed() -> None:
    async with a_gateway(limits=GatewayLimits(warm_silence_s=0.05)) as running:
        visit = await warm(running)
        assert await visit.stream.recv() == b""
        assert running.log.events == [], "no stream, no line"
        visit.stream.close()


async def test_the_number_of_warm_connections_is_limited() -> None:
    async with a_gateway(limits=GatewayLimits(max_warm=2)) as running:
        kept = [await warm(running) for _ in range(2)]
        third = await running.connect()
        await third.stream.send(sign(warm_preamble(), KEY.secret))
        assert (await third.refused()).reason == "overloaded"
        for visit in kept:
            visit.stream.close()


async def test_draining_closes_warm_connections() -> None:
    async with a_gateway() as running:
        visit = await warm(running)
        late = await running.connect()
        running.gateway.close()
        await until_reset(visit.stream)  # a close would keep the port of a gateway that has dialled it (TIME_WAIT)
        for gone in (visit, late):
            gone.stream.close()
        await running.stopped()
        assert waiting(running) == 0


async def test_warm_connections_do_not_count_as_streams() -> None:
    async with a_gateway(max_streams=1) as running:
        service = await running.service()
        first, second = await warm(running), await warm(running)
        await say(first, opening(service.target))
        await first.stream.send(data(HELLO))
        assert isinstance(await first.answer(), Opened)
        await say(second, opening(service.target))
        answer = await second.answer()
        assert isinstance(answer, Refused)
        assert answer.reason == "overloaded"
        for visit in (first, second):
            visit.stream.close()


async def test_no_network_takes_the_others_share() -> None:
    async with a_gateway(max_streams_per_network=1) as running:
        service = await running.service()
        first = await running.visit(preamble(service.target, HELLO), HELLO)
        await first.opened()
        second = await running.visit(preamble(service.target, HELLO), HELLO)
        assert (await second.refused()).reason == "overloaded"
        first.stream.reset()
        await running.ended(2)
        third = await running.visit(preamble(service.target, HELLO), HELLO)
        await third.opened()
        third.stream.close()
