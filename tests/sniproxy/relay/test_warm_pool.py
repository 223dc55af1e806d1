"""The pool of warm connections: filled by use; emptied by use, age, silence and loss; never over its limits."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from discovery.pacing.backoff import Backoff
from sniproxy.engine import SocketStream
from sniproxy.relay.warm_pool import Fate, WarmPool, WarmTiming
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate, Traits
from sniproxy.transport.errors import DialError
from sniproxy.transport.turn import TURN
from sniproxy.tunnel.capsules import CapsuleError
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Ping, Pong, Ready, Refused
from sniproxy.tunnel.state import Side
from tests.support.streams import pair, until_reset
from tests.support.waiting import eventually
from turnreg.gateway.warm import WarmStreams

pytestmark = pytest.mark.anyio

RESTLESS = replace(TURN, idle_limit_s=0.02)
"""A transport with a very short idle limit."""

Far = Callable[[CapsuleConnection], Awaitable[object]]
"""What the gateway's end of a connection does."""


def way(name: str = "gw-1", port: int = 50000, traits: Traits = TURN) -> Candidate:
    return Candidate(traits=traits, network="b", target="10.1.0.5:8443", address="10.0.0.7", port=port, addressee=name)


class Running:
    """A pool over connections to the test's own gateways."""

    def __init__(self, size: int, far: Far, timing: WarmTiming) -> None:
        self.pool = WarmPool(self._dial, size=size, count=self._count, timing=timing)
        self.fates: Counter[Fate] = Counter()
        self.dialled = 0
        self.refusing = False
        self.fars: list[CapsuleConnection] = []
        self.group: asyncio.TaskGroup | None = None
        self._far = far

    def _count(self, fate: Fate) -> None:
        self.fates[fate] += 1

    async def _dial(self, _candidate: Candidate) -> CapsuleConnection:
        self.dialled += 1
        if self.refusing:
            raise DialError(Reason.DIAL_FAILED, "said the test")
        near, far = await pair()
        gateway = CapsuleConnection(far, Side.GATEWAY)
        self.fars.append(gateway)
        assert self.group is not None
        self.group.create_task(self._run_far(gateway))
        connection = CapsuleConnection(near, Side.RELAY)
        connection.ends.warm = True
        try:
            assert await connection.next_message() == Ready()
        except CapsuleError as error:
            near.close()
            raise DialError(Reason.PROTOCOL_ERROR, "said the test") from error
        except BaseException:
            near.close()
            raise
        return connection

    async def _run_far(self, gateway: CapsuleConnection) -> None:
        await self._far(gateway)


async def kept(gateway: CapsuleConnection) -> None:
    """Behaves as the real gateway."""
    await WarmStreams().wait(gateway, "a")


async def mute(gateway: CapsuleConnection) -> None:
    """READY, and never a PONG."""
    gateway.ends.warm = True
    await gateway.send(Ready())
    await gateway.stream.flushed(5)


@asynccontextmanager
async def a_pool(size: int = 2, far: Far = kept, **timing: Any) -> AsyncIterator[Running]:
    running = Running(size, far, WarmTiming(retry=Backoff(0.001, 0.002), **timing))
    async with asyncio.TaskGroup() as running.group:
        task = running.group.create_task(running.pool.run())
        await asyncio.sleep(0)
        yield running
        running.pool.close()
        await task
        assert running.pool.ready == 0
        for gateway in running.fars:
            gateway.stream.close()


async def test_nothing_is_kept_before_the_first_use() -> None:
    async with a_pool() as running:
        assert await running.pool.take(way()) is None
        assert running.dialled == 0


async def test_a_taken_connection_is_replaced() -> None:
    async with a_pool() as running:
        running.pool.used(way())
        await eventually(lambda: running.pool.ready == 2)
        connection = await running.pool.take(way())
        assert connection is not None
        await eventually(lambda: running.pool.ready == 2)
        assert running.dialled == 3
        assert running.fates == {Fate.TAKEN: 1}
        assert await running.pool.take(way("gw-2")) is None, "another allocation's"
        await connection.send(Ping(b"12345678"))
        assert await connection.next_message() == Pong(b"12345678"), "nobody else reads there any more"
        connection.stream.close()


async def test_a_pool_of_size_zero() -> None:
    async with a_pool(0) as running:
        running.pool.used(way())
        await asyncio.sleep(0)
        assert running.dialled == 0


async def test_use_does_not_make_more_than_its_size() -> None:
    async with a_pool() as running:
        for _ in range(50):
            running.pool.used(way())
        await eventually(lambda: running.pool.ready == 2)
        assert running.dialled == 2


async def test_the_total_is_bounded() -> None:
    async with a_pool(max_warm=3) as running:
        for number in range(10):
            running.pool.used(way(f"gw-{number}"))
        await eventually(lambda: running.pool.ready == 3)
        assert running.dialled == 3


async def test_signs_of_life_are_asked_for() -> None:
    async with a_pool(1) as running:
        running.pool.used(way(traits=RESTLESS))
        await eventually(lambda: bool(running.fars) and running.fars[0].sent > 20 * 16)
        assert running.fates == {}
        assert running.dialled == 1


async def test_one_that_does_not_answer_is_replaced() -> None:
    async with a_pool(1, mute, pong_s=0.01) as running:
        running.pool.used(way(traits=RESTLESS))
        await eventually(lambda: running.fates[Fate.LOST] >= 2)
        assert running.dialled >= 2


async def test_one_that_waits_for_an_answer_is_not_given_away() -> None:
    async with a_pool(1, mute) as running:
        running.pool.used(way(traits=RESTLESS))
        await eventually(lambda: running.pool.ready == 1)
        await eventually(lambda: running.fars[0].stream.holds_unread or _asked(running))
        assert await running.pool.take(way(traits=RESTLESS)) is None


def _asked(running: Running) -> bool:
    return any(ready.asked for shelf in running.pool._shelves.values() for ready in shelf.ready)


@pytest.mark.parametrize("says", [Refused("draining"), Pong(b"12345678")])
async def test_one_that_says_something_else_is_replaced(says: Refused | Pong) -> None:
    async def wrong(gateway: CapsuleConnection) -> None:
        await mute(gateway)
        await gateway.stream.send(says.pack())

    async with a_pool(1, wrong) as running:
        running.pool.used(way())
        await eventually(lambda: running.fates[Fate.LOST] + running.fates[Fate.FAILED] >= 3)


async def test_one_that_is_cut_is_replaced() -> None:
    async with a_pool(1) as running:
        running.pool.used(way())
        await eventually(lambda: running.pool.ready == 1)
        running.fars[0].stream.reset()
        await eventually(lambda: running.dialled == 2 and running.pool.ready == 1)
        assert running.fates == {Fate.LOST: 1}


async def test_old_ones_are_renewed() -> None:
    async with a_pool(1, max_age_s=0.01) as running:
        running.pool.used(way())
        await eventually(lambda: running.fates[Fate.OVER] >= 3)


async def test_an_allocation_that_nobody_uses_is_let_go() -> None:
    async with a_pool(max_age_s=0.01, kept_for_s=0.0) as running:
        running.pool.used(way())
        await eventually(lambda: not running.pool._shelves)
        assert running.pool.ready == 0


async def test_what_is_let_go_keeps_no_local_port() -> None:
    """A close would keep it for a minute (TIME_WAIT)."""
    async with a_pool(1, mute) as running:
        running.pool.used(way())
        await eventually(lambda: running.pool.ready == 1)
        running.pool.keep(lambda _candidate: False)
        await until_reset(running.fars[0].stream)


async def test_where_none_can_be_made_it_is_tried_again_and_again() -> None:
    async with a_pool(1) as running:
        running.refusing = True
        running.pool.used(way())
        await eventually(lambda: running.fates[Fate.FAILED] >= 3)
        running.refusing = False
        await eventually(lambda: running.pool.ready == 1)


async def test_a_record_that_goes_takes_its_connections_along() -> None:
    async with a_pool() as running:
        running.pool.used(way())
        await eventually(lambda: running.pool.ready == 2)
        running.pool.keep(lambda candidate: candidate.addressee == "gw-1")
        assert running.pool.ready == 2
        running.pool.keep(lambda _candidate: False)
        await eventually(lambda: running.fates == {Fate.OVER: 2})
        assert await running.pool.take(way()) is None
        assert running.dialled == 2


async def test_the_others_of_one_that_was_dead_are_not_trusted() -> None:
    async with a_pool() as running:
        running.pool.used(way())
        await eventually(lambda: running.pool.ready == 2)
        running.pool.distrust(way())
        assert running.pool.ready == 0
        await eventually(lambda: running.pool.ready == 2)
        assert running.fates == {Fate.OVER: 2}


async def test_a_smaller_size_counts_when_connections_are_replaced() -> None:
    async with a_pool() as running:
        running.pool.used(way())
        await eventually(lambda: running.pool.ready == 2)
        running.pool.size = 1
        running.pool.distrust(way())
        await eventually(lambda: running.pool.ready == 1 and running.dialled == 3)


async def test_another_size_counts_at_once() -> None:
    async with a_pool(size=3) as running:
        running.pool.used(way())
        await eventually(lambda: running.pool.ready == 3)
        running.pool.resize(1)
        await eventually(lambda: running.fates.get(Fate.OVER) == 2)
        assert running.pool.ready == 1
        running.pool.resize(4)
        await eventually(lambda: running.pool.ready == 4)
        running.pool.resize(0)
        await eventually(lambda: running.fates.get(Fate.OVER) == 6)
        assert running.pool.ready == 0


async def test_many_take_at_once_and_none_is_given_twice() -> None:
    async with a_pool(8) as running:
        running.pool.used(way())
        await eventually(lambda: running.pool.ready == 8)
        taken: list[SocketStream] = []

        async def take() -> None:
            connection = await running.pool.take(way())
            if connection is not None:
                taken.append(connection.stream)  # type: ignore[arg-type]

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(take())
        assert len(taken) == len(set(map(id, taken))) >= 8
        for stream in taken:
            stream.close()


async def test_a_connection_whose_taker_is_cancelled_is_closed() -> None:
    async with a_pool(1) as running:
        running.pool.used(way())
        await eventually(lambda: running.pool.ready == 1)
        assert running.group is not None
        taking = running.group.create_task(running.pool.take(way()))
        await asyncio.sleep(0)
        taking.cancel()
        await eventually(lambda: running.fates[Fate.TAKEN] == 1)
        async with asyncio.timeout(10):
            assert await running.fars[0].stream.recv() == b""
