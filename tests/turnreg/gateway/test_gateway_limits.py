"""Limits of a gateway, and how streams and the gateway end."""

import asyncio
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import pytest

from sniproxy.engine.staggered_connect import Endpoint, FirstConnected, connect_first
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.messages import Ready
from sniproxy.tunnel.preamble import SigningKey
from tests.support.gateways import ALLOCATION, Visit, a_gateway
from tests.support.hellos import client_hello
from tests.support.preambles import KEY, preamble
from tests.support.streams import read_all, until_reset
from tests.support.waiting import later
from turnreg.gateway.limits import GatewayLimits

pytestmark = pytest.mark.anyio

NAME = "orders.shop.example"
HELLO = client_hello(NAME)
KEY_CB = SigningKey(id="cb-1", secret=bytes(range(128, 160)), from_network="c", to_network="b")


async def test_overloaded() -> None:
    async with a_gateway(max_streams=1) as running:
        service = await running.service()
        strangers = [await running.connect() for _ in range(5)]
        first = await running.visit(preamble(service.target, HELLO), HELLO)
        await first.opened()
        second = await running.visit(preamble(service.target, HELLO), HELLO)
        assert (await second.refused()).reason == "overloaded"
        first.stream.reset()
        await running.ended(2)
        third = await running.visit(preamble(service.target, HELLO), HELLO)
        await third.opened()
        for visit in [*strangers, third]:
            visit.stream.close()


async def test_a_full_gateway_ends_the_longest_idle_stream_of_the_network_that_holds_most() -> None:
    async with a_gateway(max_streams=4, limits=GatewayLimits(min_idle_s=0), keys=(KEY, KEY_CB)) as running:
        service = await running.service()

        async def visit(stream: int, key: SigningKey = KEY) -> Visit:
            asked = preamble(service.target, HELLO, from_network=key.from_network, key_id=key.id)
            made = await running.visit(replace(asked, stream_id=bytes([stream] * 16)), HELLO, key=key)
            await made.opened()
            await later()  # so that no two streams have moved at the same time
            return made

        # The first one of the network that holds less has been idle for longest of all.
        visits = [await visit(1, KEY_CB), await visit(2), await visit(3), await visit(4)]
        await visits[1].connection.send_data(b"and more")
        await service.reach(lambda service: sum(map(len, service.got)) == 4 * len(HELLO) + 8)
        visits.append(await visit(5, KEY_CB))
        (line,) = await running.ended()
        assert (line["reason"], line["stream"]) == ("evicted", "03" * 16)
        assert "to make room" in str(line["detail"])
        await until_reset(visits[2].stream)
        await service.reach(lambda service: service.ends == ["reset"])
        for each in visits:
            each.stream.close()


async def test_a_full_gateway_with_an_idle_limit_ends_nothing() -> None:
    async with a_gateway(max_streams=1, idle_timeout_s=3600, limits=GatewayLimits(min_idle_s=0)) as running:
        service = await running.service()
        first = await running.visit(preamble(service.target, HELLO), HELLO)
        await first.opened()
        second = await running.visit(preamble(service.target, HELLO), HELLO)
        assert (await second.refused()).reason == "overloaded"
        for visit in (first, second):
            visit.stream.close()


async def test_strangers_make_room_for_relays() -> None:
    """The oldest connection without a preamble is closed, not the new one."""
    async with a_gateway(limits=GatewayLimits(max_unproven=3)) as running:
        service = await running.service()
        strangers = [await running.connect() for _ in range(6)]
        visit = await running.visit(preamble(service.target, HELLO), HELLO)
        await visit.opened()
        lines = await running.ended(4)
        assert {line["reason"] for line in lines} == {"overloaded"}
        for stranger in strangers[:4]:
            assert await stranger.stream.recv() == b""
        for gone in [*strangers, visit]:
            gone.stream.close()


async def test_a_stranger_behind_a_turn_server_costs_no_local_port() -> None:
    """A close would keep the port for a minute (TIME_WAIT)."""
    async with a_gateway() as running:
        stranger = await running.bound()
        await stranger.stream.send(b"GET / HTTP/1.1\r\n\r\n")
        await until_reset(stranger.stream)
        stranger.stream.close()


async def test_refused_relays_that_linger_do_not_count_as_streams() -> None:
    async with a_gateway(max_streams=1, limits=GatewayLimits(max_lingering=3)) as running:
        service = await running.service()
        lingering = [await running.visit(preamble("192.0.2.1:1", HELLO), HELLO) for _ in range(1)]
        await running.ended(1)
        for _ in range(9):
            lingering.append(await running.visit(preamble("192.0.2.1:1", HELLO), HELLO))
            await running.ended(len(lingering))
        assert running.gateway._lingering == 3
        visit = await running.visit(preamble(service.target, HELLO), HELLO)
        await visit.opened()
        for gone in [*lingering, visit]:
            gone.stream.close()


async def test_a_relay_that_disconnects_while_we_dial() -> None:
    """The service sees a reset."""
    gone = asyncio.Event()

    async def slow(endpoints: Iterator[Endpoint], **limits: Any) -> FirstConnected | None:
        connected = await connect_first(endpoints, **limits)
        await gone.wait()
        return connected

    async with a_gateway(dial=slow) as running:
        service = await running.service()
        visit = await running.visit(preamble(service.target, HELLO), HELLO)
        assert await visit.answer() == Ready()
        await service.reach(lambda service: service.streams)
        visit.stream.reset()
        gone.set()
        assert (await running.ended())[0]["reason"] == "truncated"
        await service.reach(lambda service: service.ends)
        assert service.ends == ["reset"]
        assert service.got[0] in (b"", HELLO)


async def test_a_gateway_that_drains_says_so_and_serves_what_is_open() -> None:
    async with a_gateway() as running:
        service = await running.service()
        open_one = await running.visit(preamble(service.target, HELLO), HELLO)
        await open_one.opened()
        running.gateway.close()
        late = await running.visit(preamble(service.target, HELLO, addressee=ALLOCATION), HELLO, behind_turn=True)
        assert (await late.refused()).reason == "draining"
        await open_one.connection.send_data(b"and more")
        await service.received(len(HELLO) + 8)
        open_one.stream.reset()
        await running.ended(2)


async def test_streams_are_accepted_only_while_it_runs() -> None:
    async with a_gateway() as running:
        gateway = running.gateway
        gateway.close()
        await running.stopped()
        late = await running.bound()
        assert await late.stream.recv() == b"", "the last stream has ended, nobody is there to say anything"
        late.stream.close()
    after = await running.bound()
    assert await after.stream.recv() == b""
    after.stream.close()


@pytest.mark.parametrize("steps", [0, 1, 3])
async def test_cancelling_closes_every_stream_in_every_state(steps: int) -> None:
    """Also a stream whose task has not taken its first step."""
    before = len(os.listdir("/proc/self/fd"))
    async with a_gateway() as running:
        service = await running.service()
        visits = [await running.connect(), await running.bound()]
        visits.append(await running.visit(preamble(service.target, HELLO), HELLO[:-1]))
        visits.append(await running.visit(preamble(service.target, HELLO), HELLO))
        await visits[-1].opened()
        visits.append(await running.bound())
        for _ in range(steps):
            await asyncio.sleep(0)
    for visit in visits:
        try:
            await read_all(visit.stream)
        except ConnectionResetError:
            pass
        visit.stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("behind_turn", [False, True])
async def test_a_defect_in_one_stream_ends_that_stream_alone(
    behind_turn: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenKeys(dict[str, SigningKey]):
        def get(self, *arguments: object, **options: object) -> NoReturn:
            raise ZeroDivisionError("a defect of ours")

    async with a_gateway() as running:
        service = await running.service()
        addressee = ALLOCATION if behind_turn else "gw-1"
        asked = preamble(service.target, HELLO, addressee=addressee)
        open_one = await running.visit(asked, HELLO, behind_turn=behind_turn)
        await open_one.opened()
        running.gateway.reconfigure(running.gateway.config, BrokenKeys({KEY.id: KEY}))
        with caplog.at_level(logging.ERROR):
            hit = await running.visit(replace(asked, stream_id=bytes(16)), HELLO, behind_turn=behind_turn)
            with pytest.raises((ConnectionResetError, EOFError)):
                await hit.answer()
            hit.stream.close()
        assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]
        await open_one.connection.send_data(b"still there?")
        await service.received(len(HELLO) + 12)
        open_one.stream.reset()
        assert [line["reason"] for line in await running.ended(2)] == ["other", "truncated"]


async def test_every_reason_is_there_from_the_start() -> None:
    async with a_gateway() as running:
        for reason in Reason:
            assert running.registry.get_sample_value("crossnet_gateway_streams_total", {"reason": reason.value}) == 0
