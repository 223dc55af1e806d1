"""Second connections: matched by network and stream id, replaced until taken, and always closed in the end."""

import asyncio
import secrets
from dataclasses import replace

import pytest

from sniproxy.engine import SocketStream
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.state import Side
from tests.support.preambles import preamble
from tests.support.streams import pair
from turnreg.gateway.second_connection import SecondConnections

pytestmark = pytest.mark.anyio

STREAM = preamble("10.1.0.5:8443")


async def connection() -> tuple[CapsuleConnection, SocketStream]:
    """A second connection, and its far end."""
    near, far = await pair()
    return CapsuleConnection(near, Side.GATEWAY), far


async def test_brought_then_taken() -> None:
    continuations = SecondConnections()
    framed, far = await connection()
    with continuations.expected(STREAM) as take:
        assert continuations.awaits(STREAM)
        assert continuations.bring(STREAM, framed)
        assert await take() is framed
        assert not continuations.awaits(STREAM)
        assert not framed.stream.closed
    assert framed.stream.closed
    far.close()  # type: ignore[unreachable]


async def test_waited_for() -> None:
    continuations = SecondConnections()
    framed, far = await connection()
    with continuations.expected(STREAM) as take:
        async with asyncio.TaskGroup() as group:
            taking = group.create_task(take())  # type: ignore[arg-type,var-annotated]
            await asyncio.sleep(0)
            assert continuations.bring(replace(STREAM, attempt=7), framed)
        assert taking.result() is framed
    far.close()


async def test_a_second_one_replaces_the_first_until_one_is_taken() -> None:
    """The relay did not get READY on the first one and dialled again: it will use the last one."""
    continuations = SecondConnections()
    (first, far_1), (second, far_2), (third, far_3) = [await connection() for _ in range(3)]
    with continuations.expected(STREAM) as take:
        assert continuations.bring(STREAM, first)
        assert continuations.bring(STREAM, second)
        assert first.stream.closed
        assert await take() is second
        assert not continuations.bring(STREAM, third), "there is no third one"
        assert not third.stream.closed, "it stays whose it was"
        assert not second.stream.closed
    for wire in (third.stream, far_1, far_2, far_3):
        wire.close()


async def test_only_the_stream_of_that_network() -> None:
    continuations = SecondConnections()
    framed, far = await connection()
    with continuations.expected(STREAM):
        for other in (replace(STREAM, from_network="c"), replace(STREAM, stream_id=secrets.token_bytes(16))):
            assert not continuations.awaits(other)
            assert not continuations.bring(other, framed)
    assert not continuations.bring(STREAM, framed), "nor one that has ended"
    framed.stream.close()
    far.close()


async def test_two_attempts_at_one_stream_do_not_undo_each_other() -> None:
    """A relay gave up the first attempt just as it was opened here. Its end must not affect the second attempt."""
    continuations = SecondConnections()
    framed, far = await connection()
    with continuations.expected(STREAM):
        inner = continuations.expected(replace(STREAM, attempt=2))
        take = inner.__enter__()
    assert continuations.bring(STREAM, framed)
    assert await take() is framed
    inner.__exit__(None, None, None)
    assert not continuations.awaits(STREAM)
    assert framed.stream.closed
    far.close()


async def test_cancelled_while_it_waits() -> None:
    continuations = SecondConnections()
    with continuations.expected(STREAM) as take:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await take()
        framed, far = await connection()
        assert continuations.bring(STREAM, framed)
        assert await take() is framed
    far.close()
