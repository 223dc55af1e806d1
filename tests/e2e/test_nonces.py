"""Nonces that end all the time, which coturn says to a bind by a bare reset."""

import asyncio
import random

import pytest

from sniproxy.engine import Wire
from tests.e2e.path import a_path, name_of

pytestmark = [pytest.mark.anyio, pytest.mark.interop]


async def echo(wire: Wire) -> None:
    while piece := await wire.recv():
        await wire.send(piece)
    wire.shutdown_write()


@pytest.mark.needs("turnserver")
async def test_no_stream_is_lost_at_whatever_moment_of_a_nonces_life_it_comes() -> None:
    """About as many nonces end as in an hour of coturn's default. A bind that meets the very end is lost, and its relay comes again."""
    dice = random.Random(6062)
    async with a_path("coturn", coturn_options=("--stale-nonce=1",)) as path:
        name = name_of(await path.serve(echo))

        async def stream(after_s: float) -> None:
            await asyncio.sleep(after_s)  # nothing to wait for: it is the moment that counts
            client = await path.dial(name)
            assert (await client.recv())[:1] == b"\x16"
            client.shutdown_write()
            while await client.recv():
                pass
            client.close()

        async with asyncio.TaskGroup() as group:
            for _ in range(60):
                group.create_task(stream(dice.uniform(0, 6)))
        relay, gateway = await path.ended(60)
        assert [line["reason"] for line in (*relay, *gateway)] == ["ok"] * 120
