"""Transactions on the control connection, with a scripted server that behaves in unusual ways."""

import asyncio
import random
import socket
from collections.abc import Callable

import pytest

from sniproxy.engine import SocketStream
from tests.support.scripted_turn import KEY, RELAYED, Answer, allocated, error, good, scripted, signed
from tests.support.turn_servers import LOGIN, RunningServer, allocation_on, held
from tests.support.waiting import eventually
from turnreg.client.allocation import Timing, TurnError, TurnReason
from turnreg.client.control_connection import ControlConnection
from turnreg.stun.message import Attribute, Message, MessageClass, Method

pytestmark = pytest.mark.anyio

QUICK = Timing(transaction_s=0.3, tries=2)


async def outcome(*answers: Answer, method: Method = Method.ALLOCATE, timing: Timing = QUICK) -> TurnError | None:
    """Run an allocation with a server that answers `method` so: None if it got ready, else why not."""
    async with scripted({method: list(answers)}) as server:
        allocation = allocation_on(RunningServer(server.address, server.port), asyncio.Queue(), [], timing=timing)
        ready = asyncio.Event()

        async def until_ready() -> None:
            await ready.wait()
            await allocation.close()

        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(until_ready())
            try:
                async with asyncio.timeout(10):
                    await allocation.run(ready.set)
            except TurnError as exc:
                return exc
            finally:
                if not ready.is_set():
                    waiting.cancel()
        assert allocation.relayed == RELAYED
        assert allocation.mapped == ("192.0.2.1", 1234)
        return None


async def test_a_good_server() -> None:
    assert await outcome(good) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (300, TurnReason.REDIRECTED),
        (400, TurnReason.BAD_REQUEST),
        (401, TurnReason.UNAUTHORIZED),
        (403, TurnReason.FORBIDDEN),
        (420, TurnReason.REJECTED),
        (437, TurnReason.MISMATCH),
        (440, TurnReason.FAMILY),
        (441, TurnReason.WRONG_CREDENTIALS),
        (442, TurnReason.UNSUPPORTED_TRANSPORT),
        (486, TurnReason.QUOTA),
        (500, TurnReason.REJECTED),
        (508, TurnReason.CAPACITY),
    ],
)
async def test_unsigned_errors_count(code: int, reason: TurnReason) -> None:
    got = await outcome(error(code))
    assert got is not None
    assert (got.reason, got.code) == (reason, code)
    assert got.detail == f"the server answered {code} as told"


async def test_signed_errors_count_and_forged_ones_do_not() -> None:
    got = await outcome(lambda request: signed(request.refused(486, "")))
    assert got is not None
    assert got.reason is TurnReason.QUOTA
    got = await outcome(lambda request: signed(request.refused(486, ""), b"another key"))
    assert got is not None
    assert got.reason is TurnReason.TIMEOUT


@pytest.mark.parametrize(
    "forged",
    [
        lambda request: signed(allocated(request), b"another key"),
        lambda request: allocated(request).pack(),
        lambda request: allocated(Message(request.method, request.message_class, bytes(12))).pack(integrity_key=KEY),
        lambda request: signed(Message(Method.REFRESH, MessageClass.SUCCESS, request.transaction_id)),
        lambda request: signed(Message(request.method, MessageClass.REQUEST, request.transaction_id)),
    ],
    ids=["bad integrity", "no integrity", "another transaction", "another method", "a request"],
)
async def test_what_is_no_answer_is_ignored(forged: Answer) -> None:
    got = await outcome(forged)
    assert got is not None
    assert got.reason is TurnReason.TIMEOUT
    assert "ALLOCATE" in got.detail
    assert await outcome(lambda request: forged(request) + good(request) + good(request)) is None


async def test_stale_nonces() -> None:
    assert await outcome(error(438, nonce="n1"), error(438, nonce="n2"), good) is None
    got = await outcome(error(438, nonce="n1"))
    assert got is not None
    assert got.reason is TurnReason.STALE_NONCE
    got = await outcome(error(438))
    assert got is not None
    assert got.reason is TurnReason.BAD_ANSWER


async def test_the_new_nonce_is_the_one_that_signs() -> None:
    script = {Method.ALLOCATE: [error(438, nonce="n1"), good]}
    async with scripted(script) as server, held(RunningServer(server.address, server.port)):
        nonces = [request.text(Attribute.NONCE) for request in server.requests]
        assert nonces == [None, "n0", "n1", "n1"]
        assert server.requests[-1].method == Method.CREATE_PERMISSION
        assert all(request.verify_integrity(KEY) for request in server.requests[1:])


def without(attribute: Attribute) -> Answer:
    def answer(request: Message) -> bytes:
        whole = allocated(request)
        rest = tuple((kind, value) for kind, value in whole.attributes if kind != attribute)
        return signed(Message(whole.method, whole.message_class, whole.transaction_id, rest))

    return answer


@pytest.mark.parametrize(
    "bad",
    [
        without(Attribute.XOR_RELAYED_ADDRESS),
        without(Attribute.LIFETIME),
        lambda request: signed(request.success().with_bytes(Attribute.XOR_RELAYED_ADDRESS, b"short")),
        lambda request: signed(allocated(request).with_bytes(0x7ABC, b"")),
        lambda request: Message(request.method, MessageClass.ERROR, request.transaction_id).pack(),
        lambda request: (
            Message(request.method, MessageClass.ERROR, request.transaction_id)
            .with_bytes(Attribute.ERROR_CODE, b"\0\0\xff\xff")
            .pack()
        ),
    ],
    ids=["no address", "no lifetime", "short address", "unknown attribute", "no code", "bad code"],
)
async def test_answers_that_do_not_answer(bad: Answer) -> None:
    got = await outcome(bad)
    assert got is not None
    assert got.reason is TurnReason.BAD_ANSWER


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x01\x03\xff\xfc\x21\x12\xa4\x42",
        b"\x01\x03\x00\x08\x21\x12\xa4\x42" + bytes(12) + b"\x00\x16\x00\x40\x00\x00\x00\x00",
    ],
    ids=["http", "tls", "too long", "attribute too long"],
)
async def test_what_is_not_stun_ends_the_connection(data: bytes) -> None:
    got = await outcome(lambda _: data)
    assert got is not None
    assert got.reason is TurnReason.MALFORMED


async def test_silence() -> None:
    got = await outcome(lambda _: b"")
    assert got is not None
    assert (got.reason, got.detail) == (TurnReason.TIMEOUT, "no answer to ALLOCATE within 0.3 s")


async def test_an_unanswered_permission_is_asked_for_again() -> None:
    assert await outcome(lambda _: b"", good, method=Method.CREATE_PERMISSION) is None
    got = await outcome(lambda _: b"", method=Method.CREATE_PERMISSION)
    assert got is not None
    assert got.reason is TurnReason.TIMEOUT


async def test_a_permission_for_another_allocation_ends_ours() -> None:
    got = await outcome(error(437), method=Method.CREATE_PERMISSION)
    assert got is not None
    assert got.reason is TurnReason.MISMATCH


async def test_refusing_every_permission_leaves_the_allocation() -> None:
    assert await outcome(error(403), method=Method.CREATE_PERMISSION) is None


def lifetime(seconds: int) -> Answer:
    return lambda request: signed(
        request.success()
        .with_xor_address(Attribute.XOR_RELAYED_ADDRESS, RELAYED)
        .with_number(Attribute.LIFETIME, seconds)
    )


async def test_the_lifetime_is_refreshed_at_half_of_it() -> None:
    script = {Method.ALLOCATE: [lifetime(1)], Method.REFRESH: [lambda _: b"", lifetime(600), good]}
    async with scripted(script) as server:
        async with held(RunningServer(server.address, server.port), timing=QUICK) as holding:
            assert holding.allocation.lifetime_s == 1
            await eventually(lambda: holding.allocation.lifetime_s == 600)
            asked = [request for request in server.requests if request.method == Method.REFRESH]
            assert [request.number(Attribute.LIFETIME) for request in asked] == [600, 600]
        assert server.requests[-1].method == Method.REFRESH
        assert server.requests[-1].number(Attribute.LIFETIME) == 0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (error(437), TurnReason.MISMATCH),
        (error(401, nonce="n1"), TurnReason.UNAUTHORIZED),
        (lifetime(0), TurnReason.BAD_ANSWER),
        (lambda _: b"", TurnReason.TIMEOUT),
    ],
)
async def test_a_refresh_that_fails_ends_the_allocation(answer: Answer, reason: TurnReason) -> None:
    async with scripted({Method.ALLOCATE: [lifetime(1)], Method.REFRESH: [answer]}) as server:
        allocation = allocation_on(RunningServer(server.address, server.port), asyncio.Queue(), [], timing=QUICK)
        with pytest.raises(TurnError) as raised:
            async with asyncio.timeout(10):
                await allocation.run()
        assert raised.value.reason is reason


async def test_the_server_closes() -> None:
    async with scripted() as server:
        allocation = allocation_on(RunningServer(server.address, server.port), asyncio.Queue(), [])

        def hang_up() -> None:
            assert server.control is not None
            server.control.write(b"\x01\x04\x00")  # the beginning of a message
            server.control.close()

        with pytest.raises(TurnError) as raised:
            async with asyncio.timeout(10):
                await allocation.run(hang_up)
        assert raised.value.reason is TurnReason.CONNECTION_LOST


async def test_closing_is_bounded_where_the_server_is_silent() -> None:
    async with scripted({Method.REFRESH: [lambda _: b""]}) as server:
        async with asyncio.timeout(5):
            async with held(RunningServer(server.address, server.port), timing=Timing(close_s=0.1)):
                pass
        assert server.count(Method.REFRESH) == 1


async def with_control(work: Callable[[ControlConnection, socket.socket], object]) -> TurnError:
    """Run a Control over a socket pair and return what it ended with."""
    ours, theirs = socket.socketpair()
    with theirs:
        stream = SocketStream(ours)
        control = ControlConnection(stream, LOGIN, timeout_s=5)
        work(control, theirs)
        with pytest.raises(TurnError) as raised:
            async with asyncio.timeout(10):
                await control.run(lambda _: None)
        stream.close()
    return raised.value


async def test_garbage_ends_it_in_one_way_only() -> None:
    generator = random.Random(6062)
    message = allocated(Message(Method.ALLOCATE, MessageClass.REQUEST, bytes(12))).pack()
    for _ in range(300):
        data = bytearray(message * 2)
        for _ in range(generator.randrange(1, 8)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        cut = generator.randrange(len(data))

        def send(_: ControlConnection, theirs: socket.socket, data: bytes = bytes(data[:cut])) -> None:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)

        assert (await with_control(send)).reason in (TurnReason.MALFORMED, TurnReason.CONNECTION_LOST)


async def test_asking_after_the_end_says_why_it_ended() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    stream = SocketStream(ours)
    control = ControlConnection(stream, LOGIN)
    with pytest.raises(TurnError) as first:
        await control.run(lambda _: None)
    with pytest.raises(TurnError) as second:
        await control.ask(Method.BINDING)
    assert first.value is second.value


async def test_a_server_that_does_not_read_is_given_up_and_not_written_to_again() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        stream = SocketStream(ours)
        while stream.try_send((bytes(65536),)):
            pass
        control = ControlConnection(stream, LOGIN, timeout_s=0.1)
        with pytest.raises(TurnError) as raised:
            await control.ask(Method.BINDING)
        assert raised.value.reason is TurnReason.TIMEOUT
        assert stream.closed  # half a request may be out: another one would be read as its end
        with pytest.raises(TurnError):
            await control.ask(Method.BINDING)


async def test_answers_in_any_cut() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        stream = SocketStream(ours)
        control = ControlConnection(stream, LOGIN)
        indications: list[Message] = []

        async def dribble() -> None:
            request = Message.parse(await loop.sock_recv(theirs, 2048))
            note = Message(Method.CONNECTION_ATTEMPT, MessageClass.INDICATION, bytes(12)).pack()
            answer = request.success().with_xor_address(Attribute.XOR_MAPPED_ADDRESS, ("192.0.2.1", 1))
            for byte in note + note + answer.pack():
                await loop.sock_sendall(theirs, bytes((byte,)))
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            reading = group.create_task(control.run(indications.append))
            group.create_task(dribble())
            answer = await control.ask(Method.BINDING)
            reading.cancel()
        assert answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == ("192.0.2.1", 1)
        assert len(indications) == 2
        stream.close()
