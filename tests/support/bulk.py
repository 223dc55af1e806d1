"""Bulk transfers in both directions through a mesh: one stream at full speed, or two hundred at different paces."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

from sniproxy.engine import SocketStream
from tests.support.hellos import client_hello
from tests.support.processes import Mesh
from tests.support.traffic import (
    BULK_BYTES,
    BULK_TIMEOUT_S,
    FLAT_OUT,
    HESITANT,
    MANY_BYTES,
    SLOW,
    Pace,
    Sum,
    receive,
    send,
)

STREAMS = 200
MEAN_SHARES = 0.6
"""Mean size of a stream's direction, in shares."""
UP, DOWN = 1, 2
"""Seeds of the two directions of the one stream."""


async def one_stream(mesh: Mesh, size: int = BULK_BYTES) -> None:
    """Send `size` bytes in each direction of one stream at the same time, and check that they arrive."""
    seen: dict[str, Sum] = {}

    async def service(wire: SocketStream) -> None:
        await wire.recv_exactly(len(client_hello(name)))
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(send(wire, size, DOWN))
            seen["up"] = await receive(wire)
        seen["down"] = sending.result()

    began = time.monotonic()
    async with mesh.serving(service) as port, asyncio.timeout(BULK_TIMEOUT_S):
        name = mesh.name(port)
        client = await mesh.dial(name)
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(send(client, size, UP))
            down = await receive(client)
        await mesh.eventually("the service has read to the end", lambda: len(seen) == 2)
        client.close()
    took_s = time.monotonic() - began
    print(f"{mesh.turn}: {size} bytes each way at once in {took_s:.1f} s, {2 * size * 8e-6 / took_s:.0f} Mb/s in all")
    assert seen == {"up": sending.result(), "down": down}


class Order:
    """The behaviour of one of many streams. Client and service derive it from its number."""

    def __init__(self, number: int, share: int) -> None:
        self.number = number
        dice = random.Random(number)
        sizes = (0, 1, 3000, share, 2 * share)
        self.up, self.down = dice.choice(sizes), dice.choice(sizes)
        self.kind = dice.choice(("both at once", "answer after the question", "question after the answer"))
        self.paces: dict[str, Pace] = {
            direction: dice.choice((FLAT_OUT, HESITANT, SLOW))
            for direction in ("client sends", "client reads", "service sends", "service reads")
        }


async def many_streams(mesh: Mesh, size: int = MANY_BYTES) -> None:
    """Run two hundred streams at once with about `size` bytes per direction in total. Every byte and every end must arrive.

    The streams differ in sizes, pauses, slow readers and the order of their half-closes.
    """
    orders = [Order(number, share=int(size / STREAMS / MEAN_SHARES)) for number in range(STREAMS)]
    at_service: dict[int, tuple[Sum, Sum]] = {}
    before = {part: len(mesh.events(part)) for part in ("relay", "gateway")}

    async def service(wire: SocketStream) -> None:
        await wire.recv_exactly(len(client_hello(name)))
        order = orders[int.from_bytes(await wire.recv_exactly(2), "big")]
        got, sent = await _play(
            order.kind == "question after the answer",
            order.kind == "answer after the question",
            lambda: send(wire, order.down, 2 * order.number, order.paces["service sends"]),
            lambda: receive(wire, order.number, order.paces["service reads"]),
        )
        at_service[order.number] = got, sent

    async def stream(order: Order) -> None:
        client = await mesh.dial(name, behind=order.number.to_bytes(2, "big"))
        got, sent = await _play(
            order.kind == "answer after the question",
            order.kind == "question after the answer",
            lambda: send(client, order.up, 2 * order.number + 1, order.paces["client sends"]),
            lambda: receive(client, order.number, order.paces["client reads"]),
        )
        at_client[order.number] = sent, got
        client.close()

    at_client: dict[int, tuple[Sum, Sum]] = {}
    began = time.monotonic()
    async with mesh.serving(service) as port, asyncio.timeout(BULK_TIMEOUT_S):
        name = mesh.name(port)
        async with asyncio.TaskGroup() as group:
            for order in orders:
                group.create_task(stream(order))
        await mesh.eventually("every service has read to its end", lambda: len(at_service) == STREAMS)
    took_s = time.monotonic() - began
    up, down = (sum(getattr(order, way) for order in orders) for way in ("up", "down"))
    print(f"{mesh.turn}: {STREAMS} streams at once, {up} bytes up and {down} down in {took_s:.1f} s")
    assert at_service == at_client
    await _all_ended_well(mesh, before)


async def _play(
    first: bool,
    last: bool,
    sends: Callable[[], Coroutine[Any, Any, Sum]],
    reads: Callable[[], Coroutine[Any, Any, Sum]],
) -> tuple[Sum, Sum]:
    """Send and read, one after the other or at the same time. Returns the sums of what was read and sent."""
    if first:
        sent = await sends()
        return await reads(), sent
    if last:
        got = await reads()
        return got, await sends()
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(sends())
        got = await reads()
    return got, sending.result()


async def _all_ended_well(mesh: Mesh, before: dict[str, int]) -> None:
    def ends(part: str) -> list[str]:
        # An event without a name is a second connection that the relay dropped before it sent anything.
        return [event["reason"] for event in mesh.events(part)[before[part] :] if "sni" in event]

    await mesh.eventually("every end is logged", lambda: min(len(ends(part)) for part in before) >= STREAMS)
    assert {part: set(ends(part)) for part in before} == {part: {"ok"} for part in before}
