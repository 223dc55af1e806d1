"""A host that disappears without FIN or RST: what continues without it."""

import asyncio
from pathlib import Path

import pytest

from tests.support.hosts import hosts
from tests.support.processes import TURNS, Mesh, running_mesh
from tests.support.talk import talking

pytestmark = [pytest.mark.anyio, pytest.mark.netns, pytest.mark.needs("netns", "ip", "nft", "tc"), pytest.mark.slow]


@pytest.mark.parametrize("turn", TURNS)
async def test_a_second_gateway_takes_new_streams_when_the_firsts_host_is_cut_off(tmp_path: Path, turn: str) -> None:
    """The TURN server still accepts connections for the lost gateway, so the relay has to notice that nobody answers."""
    with hosts() as ground, running_mesh(Mesh(tmp_path, ground, turn=turn, gateways=2)) as mesh:
        async with talking(mesh) as talk:
            await talk.at_once(40)
            await mesh.eventually(
                "both gateways take streams", lambda: mesh.events("gateway") and mesh.events("gateway-2")
            )
            await mesh.eventually("the relay has logged the streams", lambda: len(mesh.events("relay")) == 40)
            ground.cut("gateway")
            async with asyncio.timeout(20):
                await talk.at_once(20)
            await mesh.eventually("the relay has logged the new streams", lambda: len(mesh.events("relay")) == 60)
        ends = mesh.events("relay")[40:]
        assert {event["reason"] for event in ends} == {"ok"}
        assert {event["candidate"].partition(".")[0] for event in ends} == {"turn:gw-2"}
        assert {event["attempts"] for event in ends} == {1, 2}, "some needed a second attempt"
