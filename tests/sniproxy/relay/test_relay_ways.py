"""Several ways to one network: one that fails is logged, avoided, and left out for a while."""

import logging
import socket

import pytest

from discovery.model.addresses import TargetList
from discovery.model.mesh import GatewaySpec, Kind, ServiceSpec
from discovery.model.spec import HealthCheck
from sniproxy.relay.health import FAILURES
from tests.support.fixed_discovery import record
from tests.support.path import LogLines
from tests.support.relays import DOMAIN, Running, a_relay
from tests.support.scripted_gateways import opens, refuses, scripted
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

NAME = f"p8443-10-1-0-5.b.{DOMAIN}"


async def stream(running: Running) -> dict[str, object]:
    """Open one stream by any way, and return its log line."""
    count = len(running.log.events)
    client = await running.dial(NAME)
    await running.opened()
    client.reset()
    return (await running.ended(count + 1))[-1]


async def test_a_way_that_fails_is_reported_and_left_out_for_a_while() -> None:
    lines, logger = LogLines(), logging.getLogger("sniproxy.relay.upstream_metrics")
    logger.addHandler(lines)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()[1]
    try:
        async with scripted(opens, addressee="gw-2") as good, a_relay(zone="near") as running:
            spec = GatewaySpec(address=f"127.0.0.1:{dead}", zone="near")
            running.discovery.put(record(Kind.GATEWAY, "b", "gw-1", spec))
            running.add(good, name="gw-2")
            seen = [await stream(running) for _ in range(FAILURES + 2)]
            assert running.sample("crossnet_relay_ways_left_out") == 1
            assert running.sample("crossnet_relay_dials_total", route="direct", result="dial_failed") == FAILURES
            assert running.sample("crossnet_relay_dials_total", route="direct", result="ok") == FAILURES + 2
    finally:
        logger.removeHandler(lines)
    assert [line["candidate"] for line in seen] == ["direct:gw-2"] * (FAILURES + 2)
    assert [line["attempts"] for line in seen] == [2] * FAILURES + [1, 1]
    assert [(line["way"], line["failures"], line["left_out_s"]) for line in lines.events] == [
        ("direct:gw-1", 1, 0),
        ("direct:gw-1", FAILURES, 5.0),
    ]


async def test_where_all_ways_fail_all_are_tried_every_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()[1]
    async with a_relay() as running:
        for name in ("gw-1", "gw-2"):
            running.discovery.put(record(Kind.GATEWAY, "b", name, GatewaySpec(address=f"127.0.0.1:{dead}")))
        for count in range(1, 2 * FAILURES):
            client = await running.dial(NAME)
            line = (await running.ended(count))[-1]
            assert (line["reason"], line["attempts"]) == ("dial_failed", 2)
            client.close()


@pytest.mark.parametrize("reason", ["bad_signature", "clock_skew", "replay"])
async def test_a_way_whose_gateway_does_not_trust_us_is_left_out_and_says_why(reason: str) -> None:
    lines, logger = LogLines(), logging.getLogger("sniproxy.relay.upstream_metrics")
    logger.addHandler(lines)
    try:
        async with (
            scripted(refuses(reason)) as stern,
            scripted(opens, addressee="gw-2") as good,
            a_relay(zone="near") as running,
        ):
            running.add(stern, zone="near")
            running.add(good, name="gw-2")
            seen = [await stream(running) for _ in range(FAILURES + 1)]
            assert running.sample("crossnet_relay_ways_left_out") == 1
    finally:
        logger.removeHandler(lines)
    assert [line["attempts"] for line in seen] == [2] * FAILURES + [1]
    assert {line["reason"] for line in lines.events} == {reason}
    assert lines.events[0]["detail"] == "the gateway refused: said the test"


async def test_endpoints_of_the_own_network_are_checked_where_their_record_asks_for_it() -> None:
    async with a_relay(deliver=TargetList.parse(["127.0.0.0/8:1"])) as running:
        health = HealthCheck(check="tcp", interval_s=1)
        spec = ServiceSpec(name="orders.shop.example", ports={"8443": ["127.0.0.1:1", "127.0.0.1:2"]}, health=health)
        running.discovery.put(record(Kind.SERVICE, "a", "orders", spec))
        await eventually(lambda: running.sample("crossnet_relay_endpoints_left_out"))
        assert [line["endpoint"] for line in running.relay.endpoints.status()] == ["127.0.0.1:1"]
