"""A connection that receives faster than it is read lets everything else run: timers, other connections, our own close."""

import asyncio
import itertools
import socket

import pytest

from sniproxy.engine import SocketStream
from sniproxy.engine.copy import fill
from sniproxy.engine.pipes import Pipe, PipePool
from sniproxy.engine.quantum import QUANTUM_BYTES, QUANTUM_MESSAGES, Quantum, RoundRobin, round_robin
from tests.support.streams import pair

pytestmark = pytest.mark.anyio

FLOOD = 2000
"""Messages of one byte that are already in the kernel, so that no read ever has to wait."""


async def flooded(count: int = FLOOD) -> tuple[SocketStream, SocketStream]:
    """Return a stream that bytes wait for, and its other end."""
    peer, stream = await pair()
    await peer.send(bytes(count))
    return stream, peer


async def read_one_by_one(stream: SocketStream, got: list[int], who: int) -> None:
    for _ in range(FLOOD):
        await stream.recv(1)
        got.append(who)


async def test_others_run_after_each_quantum_of_messages() -> None:
    stream, peer = await flooded()
    got: list[int] = []
    at_each_pass = []
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read_one_by_one(stream, got, 0))
        while not reading.done():
            at_each_pass.append(len(got))
            await asyncio.sleep(0)
    steps = [after - before for before, after in itertools.pairwise(at_each_pass)]
    assert max(steps) <= QUANTUM_MESSAGES
    assert len(steps) >= FLOOD / QUANTUM_MESSAGES
    stream.close()
    peer.close()


async def test_many_that_are_flooded_take_one_quantum_a_pass_together() -> None:
    streams = [await flooded() for _ in range(16)]
    got: list[int] = []
    at_each_pass = []
    async with asyncio.TaskGroup() as group:
        reading = [group.create_task(read_one_by_one(stream, got, who)) for who, (stream, _) in enumerate(streams)]
        while not all(task.done() for task in reading):
            at_each_pass.append(len(got))
            await asyncio.sleep(0)
    steps = [after - before for before, after in itertools.pairwise(at_each_pass)]
    # The first pass has everybody's first quantum; from then on they take turns.
    assert max(steps[2:]) <= QUANTUM_MESSAGES
    # Fair: when the first one has finished, the last one has come nearly as far.
    first_done = max(index for index, who in enumerate(got) if who == 0)
    assert got[: first_done + 1].count(15) >= FLOOD - 2 * QUANTUM_MESSAGES
    for stream, peer in streams:
        stream.close()
        peer.close()


async def test_timers_fire_beside_a_flood() -> None:
    stream, peer = await flooded()
    fired: list[int] = []
    got: list[int] = []
    asyncio.get_running_loop().call_later(0, lambda: fired.append(len(got)))
    await read_one_by_one(stream, got, 0)
    assert fired
    assert fired[0] < FLOOD
    stream.close()
    peer.close()


async def test_a_reader_that_never_waits_finds_out_that_its_time_is_over() -> None:
    stream, peer = await flooded()
    asyncio.get_running_loop().call_soon(stream.expire)
    with pytest.raises(TimeoutError):
        await read_one_by_one(stream, [], 0)
    stream.close()
    peer.close()


async def test_a_reader_that_never_waits_finds_out_that_we_closed() -> None:
    stream, peer = await flooded()
    asyncio.get_running_loop().call_soon(stream.close)
    with pytest.raises(OSError, match="closed on our side"):
        await read_one_by_one(stream, [], 0)
    peer.close()


async def test_bytes_that_were_given_back_count_too() -> None:
    stream, peer = await pair()
    ran = 0
    async with asyncio.TaskGroup() as group:

        async def other() -> None:
            nonlocal ran
            while True:
                ran += 1
                await asyncio.sleep(0)

        others = group.create_task(other())
        for _ in range(10 * QUANTUM_MESSAGES):
            stream.unread(b"again")
            await stream.recv()
        others.cancel()
    assert ran >= 9
    stream.close()
    peer.close()


async def test_spliced_bytes_count() -> None:
    """`fill` moves them past `recv`."""
    stream, peer = await pair()
    pool = PipePool()
    pipe = pool.take()
    assert isinstance(pipe, Pipe)
    stream.quantum.spend(QUANTUM_BYTES)
    await peer.send(b"some")
    passed: list[bool] = []
    asyncio.get_running_loop().call_soon(passed.append, True)
    assert await fill(stream, pipe) == 4
    assert passed
    pool.give_back(pipe)
    stream.close()
    peer.close()


async def test_a_connection_that_waits_gets_a_free_message() -> None:
    """An exchange of small messages, in which each waits for the other side, never queues."""
    quantum = Quantum()
    for _ in range(10 * QUANTUM_MESSAGES):
        quantum.waited()
        quantum.spend(100)
        assert not quantum.used_up
    for _ in range(QUANTUM_MESSAGES):
        quantum.spend(100)
    assert quantum.used_up
    await quantum.renew()
    assert not quantum.used_up


async def test_one_that_is_cancelled_while_it_queues_keeps_nobody_up() -> None:
    queue = RoundRobin(asyncio.get_running_loop())
    order: list[int] = []

    async def wait(number: int) -> None:
        await queue.turn()
        order.append(number)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(wait(number)) for number in range(4)]
        await asyncio.sleep(0)
        assert len(queue) == 4
        tasks[0].cancel()
        tasks[2].cancel()
    assert order == [1, 3]
    assert not len(queue)


async def test_callbacks_and_tasks_take_turns_in_one_queue() -> None:
    order: list[str] = []
    quanta = [Quantum() for _ in range(3)]
    for quantum in quanta:
        quantum.spend(0, QUANTUM_MESSAGES)

    async def renew() -> None:
        await quanta[1].renew()
        order.append("task")

    quanta[0].renew_then(lambda: order.append("first"))
    async with asyncio.TaskGroup() as group:
        group.create_task(renew())
        await asyncio.sleep(0)
        done = asyncio.Event()
        quanta[2].renew_then(lambda: (order.append("last"), done.set())[0])  # type: ignore[func-returns-value]
        assert not order
        await done.wait()
    assert order == ["first", "task", "last"]
    assert not any(quantum.used_up for quantum in quanta)


async def test_a_callback_that_fails_costs_the_others_nothing() -> None:
    loop = asyncio.get_running_loop()
    told: list[object] = []
    loop.set_exception_handler(lambda _, context: told.append(context.get("exception")))
    Quantum().renew_then(lambda: 1 // 0)  # type: ignore[arg-type]
    done = asyncio.Event()
    Quantum().renew_then(done.set)
    await done.wait()
    loop.set_exception_handler(None)
    assert [type(each) for each in told] == [ZeroDivisionError]


async def test_one_turn_in_each_pass_of_the_loop() -> None:
    """Timers, sockets and all other tasks run between two turns, however many wait for a turn."""
    went: list[int] = []
    for number in range(20):
        Quantum().renew_then(lambda number=number: went.append(number))  # type: ignore[misc]
    for passes in range(1, 25):
        await asyncio.sleep(0)
        assert len(went) <= passes
    assert went == list(range(20))


async def test_one_queue_for_each_loop() -> None:
    assert round_robin() is round_robin()

    async def of_another_loop() -> RoundRobin:
        return round_robin()

    other = await asyncio.to_thread(asyncio.run, of_another_loop())
    assert other is not round_robin()


async def test_a_stream_of_a_flood_leaves_no_descriptor_behind() -> None:
    """A queued reader that is cancelled owns its stream to the end."""
    ours, theirs = socket.socketpair()
    stream = SocketStream(ours)
    theirs.sendall(bytes(FLOOD))
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read_one_by_one(stream, [], 0))
        await asyncio.sleep(0)
        reading.cancel()
    stream.close()
    theirs.settimeout(5)
    with pytest.raises(ConnectionResetError):  # unread bytes: the kernel tells the peer of a cut
        while theirs.recv(1):
            pass
    theirs.close()
