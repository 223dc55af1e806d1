"""Bytes moved between real sockets: counts, ends, resets, back-pressure, bulk through pipes."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sniproxy.engine import End, Moved, PipePool, SocketStream, Splice, splice
from sniproxy.engine.pipes import Pipe
from sniproxy.engine.quantum import Quantum
from tests.support.streams import nothing_large_kept, pair, read_all, turns, until_reset

pytestmark = pytest.mark.anyio

LIMITS: dict[str, Any] = {"idle_timeout_s": 20.0, "half_close_timeout_s": 20.0}


PLAIN = pytest.mark.parametrize("joined", [("plain", "plain")], indirect=True, ids=["plain"])
"""For what only raw descriptors can do."""


@pytest.fixture(params=[("plain", "plain"), ("plain", "tls"), ("tls", "tls")], ids="-".join)
async def joined(
    request: pytest.FixtureRequest,
) -> AsyncIterator[tuple[SocketStream, SocketStream, SocketStream, SocketStream]]:
    """Four streams: `left` speaks to `a`, `right` to `b`; a and b are to be joined by the test."""
    left, a = await pair(request.param[0])
    right, b = await pair(request.param[1])
    yield left, a, b, right
    for stream in (left, a, b, right):
        stream.close()


async def test_bytes_pass_both_ways_and_each_end_passes_alone(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    left, a, b, right = joined
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(splice(a, b, **LIMITS))
        await left.send(b"question")
        left.shutdown_write()
        assert await read_all(right) == b"question"
        await right.send(b"an answer after the end of the question")
        right.shutdown_write()
        assert await read_all(left) == b"an answer after the end of the question"
    assert moving.result() == Moved(a_to_b=8, b_to_a=39, end=End.OK)


@PLAIN
async def test_an_idle_stream_keeps_nothing_of_what_it_moved(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    left, a, b, right = joined
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(splice(a, b, **LIMITS))
        with nothing_large_kept():
            for near, far in ((left, right), (right, left)):
                await near.send(bytes(50_000))
                assert len(await far.recv_exactly(50_000)) == 50_000
                await turns()
        moving.cancel()


async def test_unread_bytes_go_first(joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream]) -> None:
    left, a, b, right = joined
    await left.send(b"second")
    left.shutdown_write()
    a.unread(b"first ")
    right.shutdown_write()
    moved = await splice(a, b, **LIMITS)
    assert await read_all(right) == b"first second"
    assert moved.a_to_b == 12


async def test_a_reset_right_behind_bytes_is_found(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    """The loop stops watching a descriptor with an error, so a task that still waits for it would wait for ever."""
    left, a, b, right = joined
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(splice(a, b, **LIMITS))
        await left.send(b"question")
        assert await right.recv_exactly(8) == b"question"  # both watch now
        await right.send(b"half an ans")
        right.reset()
        assert await left.recv_exactly(11) == b"half an ans"
        await until_reset(left)
    assert moving.result().end is End.B_RESET


async def test_unread_bytes_go_first_also_when_they_are_bulk(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    """Enough to be spliced: the spliced bytes must not overtake those that were given back."""
    left, a, b, right = joined
    first, second = os.urandom(700_001), os.urandom(300_000)
    a.unread(first)
    right.shutdown_write()
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(splice(a, b, **LIMITS))
        group.create_task(_send_and_end(left, second))
        assert await read_all(right) == first + second
    assert moving.result().a_to_b == 1_000_001


async def test_a_reset_is_passed_on_as_a_reset_after_what_was_sent(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    left, a, b, right = joined
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(splice(a, b, **LIMITS))
        await left.send(b"before")
        assert await right.recv_exactly(6) == b"before"
        left.reset()
        await until_reset(right)
    assert moving.result().end is End.A_RESET


async def test_an_answer_sent_before_a_reset_still_arrives(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    """A service that answers and closes while its client still sends: the answer gets through, then the reset."""
    left, a, b, right = joined
    answer = os.urandom(300_000)
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(splice(a, b, **LIMITS))

        async def upload() -> None:
            with pytest.raises(OSError, match=r"."):
                while True:
                    await left.send(bytes(65536))

        uploading = group.create_task(upload())
        await right.recv_exactly(100_000)
        sending = group.create_task(right.send(answer))
        received = await left.recv_exactly(len(answer))
        await sending
        right.reset()
        await uploading
    assert received == answer
    assert moving.result().end is End.B_RESET


@PLAIN
async def test_bulk_goes_through_a_pipe_that_is_given_back(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    left, a, b, right = joined
    used: list[int] = []

    class Noting(PipePool):
        def give_back(self, pipe: Pipe) -> None:
            used.append(pipe.held)
            super().give_back(pipe)

    pool = Noting(limit=2)
    joining = Splice(a, b, **LIMITS, pool=pool)
    payload = os.urandom(1 << 20) * 24
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(joining.run())
        for source in (left, right):
            group.create_task(_send_and_end(source, payload))
        down = group.create_task(_digest(left))
        assert await _digest(right) == hashlib.sha256(payload).digest()
    assert down.result() == hashlib.sha256(payload).digest()
    assert moving.result() == Moved(a_to_b=len(payload), b_to_a=len(payload), end=End.OK)
    assert used, "a pipe was used"
    assert not any(used), "each pipe was empty when given back"
    assert pool.taken == 0
    pool.close()


@PLAIN
async def test_without_a_pipe_bulk_is_copied(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    left, a, b, right = joined
    pool = PipePool(limit=0)
    joining = Splice(a, b, **LIMITS, pool=pool)
    payload = os.urandom(1 << 20) * 8
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(joining.run())
        group.create_task(_send_and_end(left, payload))
        right.shutdown_write()
        assert await _digest(right) == hashlib.sha256(payload).digest()
    assert moving.result().end is End.OK
    assert pool.denied > 0


@pytest.mark.parametrize("joined", [("plain", "tls"), ("tls", "plain"), ("tls", "tls")], indirect=True, ids="-".join)
async def test_bulk_with_tls_at_either_end_never_takes_a_pipe(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    left, a, b, right = joined
    pool = PipePool(limit=0)
    joining = Splice(a, b, **LIMITS, pool=pool)
    payload = os.urandom(1 << 20) * 12
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(joining.run())
        for source in (left, right):
            group.create_task(_send_and_end(source, payload))
        down = group.create_task(_digest(left))
        assert await _digest(right) == hashlib.sha256(payload).digest()
    assert down.result() == hashlib.sha256(payload).digest()
    assert moving.result() == Moved(a_to_b=len(payload), b_to_a=len(payload), end=End.OK)
    assert pool.denied == 0, "none was asked for"


async def test_a_reader_that_stops_stops_the_sender(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    left, a, b, right = joined
    async with asyncio.TaskGroup() as group:
        joining = Splice(a, b, **LIMITS)
        moving = group.create_task(joining.run())
        sent = 0
        chunk = bytes(65536)
        while sent < 1 << 28:
            try:
                async with asyncio.timeout(0.5):
                    await left.writable()
            except TimeoutError:
                break
            sent += left.try_send((chunk,))
        assert 0 < sent < 1 << 26, "the sender was stopped by full buffers, not by the end of its data"
        left.shutdown_write()
        right.shutdown_write()
        received = 0
        while data := await right.recv():
            received += len(data)
        assert received == sent
    assert moving.result() == Moved(a_to_b=sent, b_to_a=0, end=End.OK)


async def test_silence_ends_a_stream(joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream]) -> None:
    left, a, b, right = joined
    moved = await splice(a, b, idle_timeout_s=0.05, half_close_timeout_s=9.0)
    assert moved.end is End.IDLE_TIMEOUT
    await until_reset(left)
    await until_reset(right)


async def test_silence_after_a_half_close_has_its_own_limit(
    joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream],
) -> None:
    left, a, b, _ = joined
    left.shutdown_write()
    moved = await splice(a, b, idle_timeout_s=600.0, half_close_timeout_s=0.05)
    assert moved.end is End.IDLE_TIMEOUT
    await until_reset(left)


async def test_cancelling_closes_both(joined: tuple[SocketStream, SocketStream, SocketStream, SocketStream]) -> None:
    left, a, b, right = joined
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await splice(a, b, **LIMITS)
    assert a.closed
    assert b.closed
    await until_reset(left)
    await until_reset(right)


async def test_a_busy_stream_lets_others_run() -> None:
    """The quantum is counted in bytes, whether or not the kernel ever makes the stream wait."""
    left, a = await pair()
    right, b = await pair()
    a.quantum = Quantum(max_bytes=1)
    ran = 0

    async def other() -> None:
        nonlocal ran
        while True:
            ran += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        others = group.create_task(other())
        group.create_task(_send_and_end(left, bytes(1 << 20)))
        right.shutdown_write()
        group.create_task(splice(a, b, **LIMITS))
        await read_all(right)
        others.cancel()
    assert ran > 4
    left.close()
    right.close()


async def _send_and_end(stream: SocketStream, payload: bytes) -> None:
    await stream.send(payload)
    stream.shutdown_write()


async def _digest(stream: SocketStream) -> bytes:
    digest = hashlib.sha256()
    while data := await stream.recv(1 << 18):
        digest.update(data)
    return digest.digest()
