"""One time limit for many streams."""

import asyncio

import pytest

from sniproxy.engine import Deadlines, SocketStream
from sniproxy.engine.deadlines import EXPIRED_A_TURN
from tests.support.streams import pair

pytestmark = pytest.mark.anyio


async def ends(stream: SocketStream) -> str:
    """Read to the end, and return which one it was."""
    try:
        while await stream.recv():
            pass
    except TimeoutError:
        return "time"
    return "end"


async def test_a_stream_whose_time_is_over_is_read_no_more() -> None:
    deadlines = Deadlines(0.05)
    one, other = await pair()
    deadlines.begin(one)
    await other.send(b"late")
    assert await ends(one) == "time"
    with pytest.raises(TimeoutError):
        await one.recv()
    assert not one.closed
    assert len(deadlines) == 0
    one.close()
    other.close()


async def test_data_from_before_the_deadline_is_still_read() -> None:
    one, other = await pair()
    await other.send(b"in time")
    await one.readable()
    one.expire()
    assert await one.recv() == b"in time"
    assert one.try_recv() == b""
    with pytest.raises(TimeoutError):
        await one.recv()
    await other.send(b"later")
    assert await other.flushed(5)
    assert one.try_recv() == b"later"
    one.close()
    other.close()


async def test_a_stream_that_was_in_time_is_left_alone() -> None:
    deadlines = Deadlines(0.05)
    late, last, fine = [await pair() for _ in range(3)]
    for one, _ in (late, fine, last):
        deadlines.begin(one)
    deadlines.end(fine[0])
    deadlines.end(fine[0])
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ends(one)) for one, _ in (late, last, fine)]
        await asyncio.wait(tasks[:2])
        await fine[1].send(b"more")
        fine[1].shutdown_write()
    assert [task.result() for task in tasks] == ["time", "time", "end"]
    for stream in (*late, *last, *fine):
        stream.close()


async def test_it_begins_again_after_it_had_nothing_to_watch() -> None:
    deadlines = Deadlines(0.02)
    for _ in range(2):
        one, other = await pair()
        deadlines.begin(one)
        assert await ends(one) == "time"
        one.close()
        other.close()


async def test_streams_that_fall_due_together_expire_a_few_per_turn() -> None:
    """Other tasks run between these turns."""
    deadlines = Deadlines(0.01)
    streams = [await pair() for _ in range(3 * EXPIRED_A_TURN)]
    for one, _ in streams:
        deadlines.begin(one)
    left: list[int] = []
    async with asyncio.TaskGroup() as group:
        for one, _ in streams:
            group.create_task(ends(one))
        while len(deadlines):
            await asyncio.sleep(0)
            if not left or left[-1] != len(deadlines):
                left.append(len(deadlines))
    steps = [before - after for before, after in zip([len(streams), *left], left, strict=False) if before != after]
    assert sum(steps) == len(streams)
    assert max(steps) <= 2 * EXPIRED_A_TURN, "a turn of ours may see two of the loop's"
    for one, other in streams:
        one.close()
        other.close()
