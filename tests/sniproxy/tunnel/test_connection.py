"""Capsules over a stream: what goes out in one piece, what comes back as events, and what is an error."""

import asyncio
import os
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

import pytest

from sniproxy.engine import CopyDirection, IdleTimer, PipePool
from sniproxy.engine.quantum import QUANTUM_MESSAGES
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.capsules import CapsuleError, CapsuleFlood, CapsuleType, Control, Header, Payload, header
from sniproxy.tunnel.connection import CONTROL_BURST, RECEIVED_BYTES, CapsuleConnection
from sniproxy.tunnel.messages import Finished, Open, Opened, Ping, Ready, Received, Refused
from sniproxy.tunnel.state import Side
from tests.support.streams import pair, read_all

pytestmark = pytest.mark.anyio

OPENED = Opened(IPv4Address("10.1.0.5"), 8443, 1)


@pytest.fixture
def writes() -> list[bytes]:
    """Return the list that gets what each write of either side has written."""
    return []


@pytest.fixture
async def both(writes: list[bytes]) -> AsyncIterator[tuple[CapsuleConnection, CapsuleConnection]]:
    """Both sides of one stream, not opened yet."""
    one, other = await pair(writes=writes)
    yield CapsuleConnection(one, Side.RELAY), CapsuleConnection(other, Side.GATEWAY)
    one.close()
    other.close()


async def opened(relay: CapsuleConnection, gateway: CapsuleConnection) -> None:
    await gateway.send(Ready())
    await gateway.send(OPENED)
    assert await relay.next_message() == Ready()
    assert await relay.next_message() == OPENED


async def test_preamble_and_first_data_leave_in_one_write(
    both: tuple[CapsuleConnection, CapsuleConnection], writes: list[bytes]
) -> None:
    relay, gateway = both
    await relay.begin(b"preamble", b"hello")
    assert writes == [b"preamble" + header(CapsuleType.DATA, 5) + b"hello"]
    assert await gateway.stream.recv() == writes[0]
    assert relay.sent == 21


async def test_messages_and_data_leave_in_one_write(
    both: tuple[CapsuleConnection, CapsuleConnection], writes: list[bytes]
) -> None:
    """As a stream begins on a warm connection."""
    relay, gateway = both
    relay.ends.warm = gateway.ends.warm = True
    await gateway.send(Ready())
    assert await relay.next_message() == Ready()
    writes.clear()
    ping, opening = Ping(bytes(8)), Open(b"preamble")
    await relay.send(ping, opening, data=b"hello")
    assert writes == [ping.pack() + opening.pack() + header(CapsuleType.DATA, 5) + b"hello"]
    assert relay.sent == len(writes[0])
    assert [await gateway.next_message(), await gateway.next_message()] == [ping, opening]
    assert [type(event) for event in await gateway.read()] == [Header, Payload]


async def test_a_preamble_can_go_alone(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    await relay.begin(b"preamble", b"")
    assert await gateway.stream.recv() == b"preamble"
    assert relay.sent == 8


async def test_events_and_counts(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    await opened(relay, gateway)
    await relay.send_data(b"abc")
    await relay.send_data(b"", final=True)
    events: list[object] = []
    while not gateway.exhausted:
        events += [bytes(event.data) if isinstance(event, Payload) else event for event in await gateway.read()]
    assert events == [Header(CapsuleType.DATA, 3), b"abc", Header(CapsuleType.FINAL_DATA, 0)]
    assert gateway.received == relay.sent == 8 + 3 + 8


async def test_events_that_were_put_back_come_first(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    await opened(relay, gateway)
    await relay.send_data(b"abc", final=True)
    events = await gateway.read()
    gateway.put_back(events[1:])
    assert not gateway.exhausted, "the payload has not been handed out"
    assert gateway.payload_left == 0, "and must not be moved past what is pending"
    assert [type(event) for event in await gateway.read()] == [Payload]
    assert gateway.exhausted


async def test_data_behind_a_message_stays_for_the_next_reader(
    both: tuple[CapsuleConnection, CapsuleConnection],
) -> None:
    relay, gateway = both
    await gateway.stream.send(Ready().pack() + OPENED.pack() + header(CapsuleType.DATA, 2) + b"hi")
    assert await relay.next_message() == Ready()
    assert await relay.next_message() == OPENED
    kinds = [type(event) for event in await relay.read()]
    assert kinds == [Header, Payload]


async def test_data_instead_of_a_message(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    await opened(relay, gateway)
    await gateway.send_data(b"x")
    with pytest.raises(CapsuleError, match="DATA where"):
        await relay.next_message()


@pytest.mark.parametrize(
    "wrong", [header(CapsuleType.DATA, 1) + b"x", OPENED.pack(), Finished().pack(), b"\xff" * 16, Received(0).pack()]
)
async def test_what_may_not_come_now(both: tuple[CapsuleConnection, CapsuleConnection], wrong: bytes) -> None:
    relay, gateway = both
    await gateway.stream.send(wrong)
    with pytest.raises(CapsuleError):
        await relay.next_message()


async def test_unknown_capsules_are_skipped(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    await gateway.stream.send(header(0x1234, 60_000) + bytes(60_000) + Ready().pack())
    assert await relay.next_message() == Ready()


async def test_a_read_that_is_full_of_capsules_is_worked_off_in_pieces(
    both: tuple[CapsuleConnection, CapsuleConnection],
) -> None:
    """Other tasks run between the pieces, and the payload behind them is complete."""
    relay, gateway = both
    await opened(relay, gateway)
    one = header(CapsuleType.DATA, 1) + b"x"
    await gateway.stream.send(one * 1000 + header(CapsuleType.FINAL_DATA, 3) + b"end")
    got, passes, largest = b"", 0, 0

    async def other() -> None:
        nonlocal passes
        while True:
            passes += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        others = group.create_task(other())
        while not relay.exhausted:
            events = await relay.read()
            assert not (relay.payload_left and relay.exhausted)
            largest = max(largest, sum(isinstance(event, Header) for event in events))
            got += b"".join(bytes(event.data) for event in events if isinstance(event, Payload))
        others.cancel()
    assert got == b"x" * 1000 + b"end"
    assert largest <= QUANTUM_MESSAGES
    assert passes >= 1000 / QUANTUM_MESSAGES


@pytest.mark.parametrize(
    "flood",
    [header(CapsuleType.DATA, 0), b"\x21\x00", header(0x1234, 5) + bytes(5)],
    ids=["empty", "unknown-two-bytes", "unknown"],
)
async def test_capsules_without_payload_have_a_limit(
    both: tuple[CapsuleConnection, CapsuleConnection], flood: bytes
) -> None:
    relay, gateway = both
    await opened(relay, gateway)
    await gateway.stream.send(flood * (CONTROL_BURST - 2))  # READY and OPENED were two
    await gateway.send_data(b"fine so far")
    got = b""
    while got != b"fine so far":
        got += b"".join(bytes(event.data) for event in await relay.read() if isinstance(event, Payload))
    await gateway.stream.send(flood * CONTROL_BURST)
    with pytest.raises(CapsuleFlood) as raised:
        while True:
            await relay.read()
    assert raised.value.reason is Reason.FLOOD


@pytest.mark.parametrize("cut", [0, 3, 8])
async def test_the_end_of_the_connection_is_no_end_of_the_stream(
    both: tuple[CapsuleConnection, CapsuleConnection], cut: int
) -> None:
    relay, gateway = both
    await opened(relay, gateway)
    await gateway.stream.send((header(CapsuleType.FINAL_DATA, 4) + b"ab")[:cut])
    gateway.stream.close()
    with pytest.raises(EOFError):
        while True:
            await relay.read()


async def test_control_capsules_never_cut_into_a_payload(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    """Two tasks write: one a payload larger than any buffer, the other capsules that must not wait for its end."""
    relay, gateway = both
    await opened(relay, gateway)
    payload = os.urandom(8 << 20)
    await relay.send_data(bytes(2 * RECEIVED_BYTES))  # what three RECEIVED may be about
    async with asyncio.TaskGroup() as group:
        group.create_task(gateway.send_data(payload))
        await asyncio.sleep(0)
        for count in (1, 2, 3):
            group.create_task(gateway.send(Received(count)))
        got, controls = bytearray(), 0
        while len(got) < len(payload) or controls < 3:
            for event in await relay.read():
                if isinstance(event, Payload):
                    assert not controls
                    got += event.data
                elif isinstance(event, Control):
                    controls += 1
    assert got == payload


async def test_spliced_data_has_its_header(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    await opened(relay, gateway)
    pool = PipePool()
    direction = CopyDirection(IdleTimer(20.0), relay.stream, gateway.stream, pool=pool)
    direction.pipe = pool.take()
    assert direction.pipe is not None
    payload = os.urandom(300_000)
    direction.pipe.held = os.write(direction.pipe.writer, payload)
    before = relay.sent
    async with asyncio.TaskGroup() as group:
        group.create_task(relay.send_spliced(direction))
        data = await gateway.stream.recv_exactly(8 + len(payload))
    assert data == header(CapsuleType.DATA, len(payload)) + payload
    assert relay.sent - before == len(data)
    direction.release()
    pool.close()


async def test_payload_can_bypass_the_reader(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    await opened(relay, gateway)
    await relay.send_data(b"spliced")
    await relay.send_data(b"read")
    events = await gateway.read(exact=True)
    assert events == [Header(CapsuleType.DATA, 7)], "not a byte of the payload was taken along"
    assert gateway.payload_left == 7
    assert await gateway.stream.recv_exactly(7) == b"spliced"
    gateway.skip_payload(7)
    assert gateway.received == 15
    assert [type(event) for event in await gateway.read()] == [Header, Payload]


async def test_a_wrong_order_of_ours_is_an_assertion_error(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    with pytest.raises(AssertionError, match="relay sends FINISHED"):
        await relay.send(Finished())
    with pytest.raises(AssertionError, match="gateway sends DATA: before READY"):
        await gateway.send_data(b"x")
    assert (relay.sent, gateway.sent) == (0, 0), "nothing of it went out"


async def test_discard_reads_until_the_peer_has_seen_it(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    await relay.stream.send(bytes(50_000))
    await gateway.send(Refused("denied", "because"))
    async with asyncio.TaskGroup() as group:
        group.create_task(gateway.discard())
        assert await relay.next_message() == Refused("denied", "because")
        relay.stream.close()
    assert gateway.stream.closed


async def test_discard_does_not_wait_for_ever(both: tuple[CapsuleConnection, CapsuleConnection]) -> None:
    relay, gateway = both
    await gateway.discard(0.01)
    assert gateway.stream.closed
    assert await read_all(relay.stream) == b""
