"""A host that vanishes tells nobody: no FIN, no RST. What goes on without it."""

import asyncio
from pathlib import Path

import pytest

from tests.support.hosts import hosts
from tests.support.processes import TURNS, Mesh, standing
from tests.support.talk import talking

pytestmark = [pytest.mark.anyio, pytest.mark.netns, pytest.mark.needs("netns", "ip", "nft", "tc"), pytest.mark.slow]


@pytest.mark.parametrize("turn", TURNS)
async def test_a_second_gateway_takes_what_comes_when_the_firsts_host_is_off_the_net(tmp_path: Path, turn: str) -> None:
    """The TURN server still takes connections for the one that is gone: the relay has to see that nobody answers."""
    with hosts() as ground, standing(Mesh(tmp_path, ground, turn=turn, gateways=2)) as mesh:
        async with talking(mesh) as talk:
            await talk.at_once(40)
            await mesh.eventually("both take streams", lambda: mesh.events("gateway") and mesh.events("gateway-2"))
            await mesh.eventually("the relay has told of them", lambda: len(mesh.events("relay")) == 40)
            ground.cut("gateway")
            async with asyncio.timeout(20):
                await talk.at_once(20)
            await mesh.eventually("the relay has told of them, too", lambda: len(mesh.events("relay")) == 60)
        ends = mesh.events("relay")[40:]
        assert {event["reason"] for event in ends} == {"ok"}
        assert {event["candidate"].partition(".")[0] for event in ends} == {"turn:gw-2"}
        assert {event["attempts"] for event in ends} == {1, 2}, "some had to look further"
