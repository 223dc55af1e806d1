"""One stream: what it reads and writes, who waits, and how it ends. Everything on real sockets."""

import asyncio
import os
import socket
import struct

import pytest

from sniproxy.engine import SocketStream, StreamClosed
from sniproxy.engine.socket_stream import plain_address
from tests.support.streams import pair, read_all, until_reset
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio


async def fill_up(stream: SocketStream) -> int:
    """Write until the socket takes no more; return how much it took."""
    sent = 0
    while taken := stream.try_send((bytes(1 << 20),)):
        sent += taken
    return sent


# --- reading --------------------------------------------------------------------------------------------------------


async def test_what_was_given_back_comes_first_and_within_the_limit() -> None:
    one, other = await pair()
    await other.send(b"fresh")
    one.unread(b"world ")
    one.unread(bytearray(b"hello "))
    assert one.holds_unread
    assert await one.recv(3) == b"hel"
    assert await one.recv_exactly(9) == b"lo world "
    assert not one.holds_unread
    assert await one.recv() == b"fresh"  # type: ignore[unreachable]
    one.unread(b"again")
    assert (one.take_unread(), one.take_unread()) == (b"again", b"")
    one.close()
    other.close()


async def test_recv_exactly_takes_not_one_byte_more() -> None:
    one, other = await pair()
    for byte in b"abcdef":
        await other.send(bytes([byte]))
    assert await one.recv_exactly(4) == b"abcd"
    await other.send(b"gh")
    other.shutdown_write()
    assert await one.recv_exactly(2) == b"ef"
    assert await one.recv_exactly(0) == b"", "nothing is there at once, also at the end of the stream"
    with pytest.raises(EOFError, match="1 bytes short of 3"):
        await one.recv_exactly(3)
    one.close()
    other.close()


async def test_reading_zero_bytes_does_not_wait() -> None:
    one, other = await pair()
    await other.send(b"x")
    assert await one.recv() == b"x"  # a short read: the stream knows that the socket is empty
    async with asyncio.timeout(5):
        assert await one.recv_exactly(0) == b""
    one.close()
    other.close()


async def test_one_end_reads_while_it_writes() -> None:
    """A reader and a writer wait on the same stream; each is woken by its own readiness."""
    one, other = await pair()
    sent = await fill_up(one)
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(one.recv())
        writing = group.create_task(one.send(b"the last bytes"))
        await asyncio.sleep(0)
        await other.send(b"answer")
        assert await reading == b"answer"
        assert not writing.done()
        received = 0
        while received < sent + 14:
            received += len(await other.recv(1 << 20))
        await writing
    one.close()
    other.close()


async def test_a_second_reader_is_an_assertion_error() -> None:
    one, other = await pair()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(one.recv())
        await asyncio.sleep(0)
        with pytest.raises(AssertionError, match="one reader"):
            await one.recv()
        await other.send(b"for the first")
        assert await first == b"for the first"
    one.close()
    other.close()


async def test_the_reader_after_a_cancelled_one_is_woken() -> None:
    one, other = await pair()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(one.recv())
        await asyncio.sleep(0)
        first.cancel()
        second = group.create_task(one.recv())
        await asyncio.sleep(0)
        await other.send(b"x")
        async with asyncio.timeout(5):
            assert await second == b"x"
    one.close()
    other.close()


async def test_bytes_that_nobody_waits_for_do_not_spin() -> None:
    """Level-triggered readiness without a reader: the descriptor is unwatched, and watched again by the next read."""
    one, other = await pair()
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(one.recv())
        await asyncio.sleep(0)
        await other.send(b"first")
        await reading
    assert one._reading
    await other.send(b"second")
    await eventually(lambda: not one._reading)
    assert await one.recv() == b"second"
    one.close()
    other.close()


async def test_a_reader_that_needs_more_is_not_woken_for_less() -> None:
    """Checks what is asked of the kernel, which may still wake us earlier if it is short of socket memory."""

    def low() -> int:
        return one._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)

    one, other = await pair()
    for wanted in (4, 4, 9, 1, 2):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(one.recv(low=wanted))
            await asyncio.sleep(0)
            assert low() == wanted
            await other.send(bytes(wanted))
        assert task.result() == bytes(wanted)
    # The next reader is woken for a byte, without a word; so is whoever waits only.
    one.try_recv()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(one.readable())
        await asyncio.sleep(0)
        assert (low(), waiting.done()) == (1, False)
        await other.send(b"e")
    assert await one.recv(low=100) == b"e", "what is there is not waited for"
    one.close()
    other.close()


async def test_a_reader_that_needs_more_is_woken_where_more_cannot_come() -> None:
    one, other = await pair()
    asyncio.get_running_loop().call_soon(other.shutdown_write)
    assert await one.recv(low=16_640) == b""
    one.close()
    other.close()
    one, other = await pair()
    asyncio.get_running_loop().call_soon(other.reset)
    with pytest.raises(ConnectionResetError):
        await one.recv(low=16_640)
    one.close()
    one, other = await pair()
    one._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    asyncio.get_running_loop().call_soon(other.try_send, [bytes(1 << 20)])
    assert await one.recv(low=1 << 20), "the kernel's buffer is smaller"
    one.close()
    other.close()


# --- writing --------------------------------------------------------------------------------------------------------


async def test_send_waits_for_a_slow_reader_and_loses_nothing() -> None:
    one, other = await pair()
    head, payload = b"head ", os.urandom(12 << 20)
    async with asyncio.TaskGroup() as group:

        async def send() -> None:
            await one.send(head, memoryview(payload), b" tail")
            one.shutdown_write()

        group.create_task(send())
        assert await read_all(other) == head + payload + b" tail"
    one.close()
    other.close()


async def test_sending_nothing_is_nothing() -> None:
    one, other = await pair()
    await one.send()
    await one.send(b"", b"")
    one.shutdown_write()
    assert await read_all(other) == b""
    one.close()
    other.close()


async def test_flushed_returns_whether_the_peer_has_it() -> None:
    one, other = await pair()
    await one.send(b"small")
    assert await one.flushed(5)
    await fill_up(one)
    assert not await one.flushed(0.05), "the peer reads nothing"
    one.close()
    assert not await one.flushed(5)
    other.close()


# --- ends -----------------------------------------------------------------------------------------------------------


async def test_closing_wakes_reader_and_writer() -> None:
    one, other = await pair()
    await fill_up(one)
    async with asyncio.TaskGroup() as group:

        async def wait(what: str) -> None:
            with pytest.raises(StreamClosed):
                await (one.recv() if what == "read" else one.send(b"x"))

        group.create_task(wait("read"))
        group.create_task(wait("write"))
        await asyncio.sleep(0)
        one.close()
    other.close()


async def test_a_closed_stream_takes_nothing_and_can_be_closed_again() -> None:
    one, other = await pair()
    one.close()
    one.close()
    one.reset()
    one.shutdown_write()
    assert one.fd == -1, "the number may be another socket's by now"
    for use in (one.recv(), one.send(b"x"), one.readable(), one.writable()):
        with pytest.raises(OSError, match=r"Bad file|closed on our side"):
            await use
    await one.drain_and_close()
    assert "closed" in repr(one)
    other.close()


async def test_reset_is_a_reset_and_close_an_end() -> None:
    one, other = await pair()
    await one.send(b"x")
    one.reset()
    await until_reset(other)
    other.close()
    one, other = await pair()
    await one.send(b"x")
    one.close()
    assert await read_all(other) == b"x"
    other.close()


async def test_a_reset_after_a_fin_is_still_a_reset() -> None:
    """A stream that was cut after one side had ended must not look complete to the side that still writes."""
    one, other = await pair()
    one.shutdown_write()
    assert await other.recv() == b""
    one.reset()
    with pytest.raises(OSError, match=r"."):
        async with asyncio.timeout(5):
            while True:
                await other.send(b"x")
                await other.writable()
    other.close()


async def test_a_fin_to_a_peer_that_has_reset_is_no_error() -> None:
    one, other = await pair()
    other.reset()
    with pytest.raises(ConnectionResetError):
        await one.recv()
    one.shutdown_write()
    one.close()


async def test_a_stream_knows_a_peer_that_is_gone() -> None:
    """The peer may reset between connect and accept. Then getpeername(2) fails, but the log still needs the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        address = client.getsockname()
        client.sendall(b"last words")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        sock, peer = server.accept()
    with pytest.raises(OSError, match=r"."):
        sock.getpeername()
    stream = SocketStream(sock, peer)
    assert stream.peer == address
    stream.close()


# --- alerts arrive --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [0, 1000, 1 << 20])
async def test_drain_and_close_delivers_the_last_words_although_the_client_still_sends(behind: int) -> None:
    """Closing with unread bytes would be a reset, and a client that begins to read only then would get nothing."""
    one, other = await pair()
    async with asyncio.TaskGroup() as group:

        async def client() -> bytes:
            try:
                await other.send(bytes(behind))
            except OSError:
                pass  # more than anybody reads from a client that is refused
            answer = await other.recv()
            other.close()
            return answer

        answered = group.create_task(client())
        await one.send(b"alert")
        await one.drain_and_close()
    assert answered.result() == b"alert"
    assert one.closed


async def test_drain_and_close_ends_with_a_fin() -> None:
    one, other = await pair()
    await other.send(bytes(60_000))
    async with asyncio.TaskGroup() as group:
        group.create_task(one.drain_and_close())
        assert await other.recv() == b"", "the FIN comes first, before the peer has ended"
        other.close()
    assert one.closed


async def test_drain_and_close_waits_no_longer_than_told() -> None:
    one, other = await pair()
    one.unread(b"never looked at")
    async with asyncio.timeout(5):
        await one.drain_and_close(limit_s=0.01)
    assert one.closed
    other.close()


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("fe80::1%eth0", "fe80::1"), ("::1", "::1")],
)
def test_plain_addresses(text: str, plain: str) -> None:
    assert plain_address(text) == plain
