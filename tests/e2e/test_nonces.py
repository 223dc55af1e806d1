"""Nonces that expire often. coturn answers a bind with an expired nonce by a bare reset."""

import asyncio

import pytest

from sniproxy.engine import SocketStream
from tests.support.path import a_path, name_of

pytestmark = [pytest.mark.anyio, pytest.mark.interop]


async def echo(stream: SocketStream) -> None:
    while piece := await stream.recv():
        await stream.send(piece)
    stream.shutdown_write()


@pytest.mark.needs("turnserver")
async def test_many_streams_after_a_nonce_has_expired_are_all_bound() -> None:
    """The expired nonce is detected while the first connections open, so none of them is lost."""
    async with a_path("coturn", coturn_options=("--stale-nonce=2",)) as path:
        name = name_of(await path.serve(echo))

        async def stream() -> None:
            client = await path.dial(name)
            assert (await client.recv())[:1] == b"\x16"
            client.shutdown_write()
            while await client.recv():
                pass
            client.close()

        await asyncio.sleep(3.1)  # there is no event: the server does not announce that a nonce has expired
        async with asyncio.TaskGroup() as group:
            for _ in range(30):
                group.create_task(stream())
        relay, gateway = await path.ended(30)
        assert [line["reason"] for line in (*relay, *gateway)] == ["ok"] * 60
        assert {line["attempts"] for line in relay} == {1}
