"""A path to a TURN server that starts to drop all packets, between two network namespaces: the gateway detects it in time."""

import asyncio
import subprocess
import time

import pytest
import uvloop

from tests.support.embedded_turn import embedded
from tests.support.hosts import Namespace
from tests.support.registered import ID, registrar, relay, turn
from tests.support.turn_servers import RunningServer
from tests.support.two_hosts import RULES, THERE, blackhole, two_hosts
from tests.support.waiting import eventually
from turnreg.client.allocation import Timing

BENCHMARKING = ("198.18.0.0/15",)
PATIENCE_S = 30.0
"""A gateway must detect the dead path within this time."""


@pytest.mark.netns
@pytest.mark.needs("netns", "nft")
@pytest.mark.parametrize("lost", RULES)
def test_a_dead_path_is_detected_and_left(lost: str) -> None:
    """With shorter timings than the defaults, which are checked below. The reason is in the metrics."""
    timing = Timing(keepalive_s=0.5, transaction_s=0.3, connect_s=0.5, close_s=0.2)

    async def main(server: RunningServer, there: Namespace) -> None:
        relays = relay({"turn-1": [THERE]})
        async with registrar(turn(server), relays, allowed=BENCHMARKING, timing=timing) as ours:
            await ours.publishes(ID)
            await asyncio.sleep(0.6)  # until a keep-alive has been answered, which sends no event
            await asyncio.to_thread(blackhole, there, lost)
            began = time.monotonic()
            await eventually(lambda: ours.count("registrations_total", reason="timeout") > 0)
            assert not ours.discovery.published
            await eventually(lambda: ours.count("registrations_total", reason="connect_failed") > 0)
            assert time.monotonic() - began < PATIENCE_S
            await asyncio.to_thread(restore, there)
            await ours.publishes(ID)

    def restore(there: Namespace) -> None:
        with there.entered():
            subprocess.run(["nft", "delete", "table", "ip", "t"], check=True, timeout=10)

    with two_hosts() as (here, there):
        with there.entered():
            serving = embedded(address=THERE, relay_addresses=(THERE,), allowed_peers=BENCHMARKING)
            server = serving.__enter__()  # its thread stays in this namespace
        try:
            with here.entered():
                uvloop.run(main(RunningServer(server.address, server.port), there))
        finally:
            serving.__exit__(None, None, None)


def test_the_default_timings_detect_it_in_time() -> None:
    timing = Timing()
    assert timing.keepalive_s + timing.transaction_s * (1 + timing.tries) < PATIENCE_S
    assert timing.user_timeout_s + timing.keepalive_s <= PATIENCE_S
