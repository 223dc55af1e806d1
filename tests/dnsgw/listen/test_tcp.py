"""TCP connections: pipelined, out of order, byte by byte, too many, too slow, cut off."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator

import dns.message
import pytest

from dnsgw.client_limits import packed
from dnsgw.listen.tcp import MAX_PIPELINED, _Connection
from tests.support.dns_authority import Asked, Authority, serving
from tests.support.dns_meshes import DOMAIN, mesh, relay
from tests.support.dns_packets import header, query
from tests.support.dns_servers import Client, Connection, address, connected, running
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
VIEW = mesh(relay("10.0.0.9"))


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving({("www.example.test", "A"): ["192.0.2.1"]}) as authority:
        yield authority


def addresses(reply: bytes) -> list[str]:
    return [str(item) for rrset in dns.message.from_wire(reply).answer for item in rrset]


async def test_one_question_after_the_other(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        for _ in range(3):
            assert addresses(await connection.ask(query(ADDRESS))) == ["10.0.0.9"]
            assert addresses(await connection.ask(query("www.example.test"))) == ["192.0.2.1"]
        assert upstream.connections == 1


async def test_many_questions_at_once() -> None:
    async with running(VIEW) as server, connected(server) as connection:
        connection.send(*(query(f"p8443-10-1-{n // 250}-{n % 250}.b.{DOMAIN}", ident=n) for n in range(1000)))
        seen = [int.from_bytes((await connection.receive())[:2], "big") for _ in range(1000)]
        assert seen == list(range(1000))


async def test_an_answer_that_is_there_does_not_wait_for_one_that_is_not(upstream: Authority) -> None:
    held: list[Asked] = []
    upstream.script = lambda asked: held.append(asked) or []  # type: ignore[func-returns-value]
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        connection.send(query("www.example.test", ident=1), query(ADDRESS, ident=2), query(ADDRESS, ident=3))
        assert (await connection.receive())[:2] == b"\0\2"
        assert (await connection.receive())[:2] == b"\0\3"


async def test_byte_by_byte() -> None:
    async with running(VIEW) as server, connected(server) as connection:
        packet = query(ADDRESS)
        connection.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in (len(packet).to_bytes(2, "big") + packet) * 2:
            connection.writer.write(bytes([byte]))
            await connection.writer.drain()
            await asyncio.sleep(0)
        for _ in range(2):
            assert addresses(await connection.receive()) == ["10.0.0.9"]


async def test_more_questions_than_may_wait_are_read_later(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        count = MAX_PIPELINED + 72
        connection.send(*(query(f"n{n}.example.test", ident=n) for n in range(count)))
        seen = {int.from_bytes((await connection.receive())[:2], "big") for _ in range(count)}
        assert seen == set(range(count))


@pytest.mark.parametrize("size", [0, 1, 11, 4097, 65535])
async def test_a_length_that_no_question_has_ends_the_connection(size: int) -> None:
    async with running(VIEW) as server, connected(server) as connection:
        assert addresses(await connection.ask(query(ADDRESS))) == ["10.0.0.9"]
        connection.writer.write(size.to_bytes(2, "big") + b"x" * min(size, 100))
        assert await connection.ended() == b""


async def test_a_packet_that_gets_no_reply_ends_the_connection() -> None:
    async with running(VIEW) as server, connected(server) as connection:
        connection.send(query(ADDRESS), query(ADDRESS, flags=0x8180), query(ADDRESS))
        assert addresses(await connection.receive()) == ["10.0.0.9"]
        assert await connection.ended() == b""


async def test_a_malformed_question_gets_formerr_and_the_connection_continues() -> None:
    async with running(VIEW) as server, connected(server) as connection:
        assert (await connection.ask(query(ADDRESS) + b"x"))[3] & 15 == 1
        assert addresses(await connection.ask(query(ADDRESS))) == ["10.0.0.9"]


async def test_a_client_that_ends_its_side_still_gets_its_answers(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        connection.send(query("www.example.test", ident=1), query(ADDRESS, ident=2))
        connection.writer.write_eof()
        assert {(await connection.receive())[:2], (await connection.receive())[:2]} == {b"\0\1", b"\0\2"}
        assert await connection.ended() == b""


async def test_an_idle_connection_ends() -> None:
    async with running(VIEW, tcp_idle_timeout_s=0.05) as server, connected(server) as connection:
        connection.writer.write(b"\0")  # half a length is no question
        assert await connection.ended() == b""
        assert server.metrics.tcp_connections() == 0


async def test_time_is_up_for_others_while_one_asks_without_end() -> None:
    """Idle, and with half a question: their timers are heard beside a client that never rests."""
    async with running(VIEW, tcp_idle_timeout_s=0.3) as server:
        stopped = threading.Event()
        packet = query(ADDRESS)
        frames = (len(packet).to_bytes(2, "big") + packet) * 1000

        def ask_without_end() -> None:
            with socket.create_connection(address(server)) as sock:
                sock.setblocking(False)
                at = 0
                while not stopped.is_set():
                    with contextlib.suppress(BlockingIOError):
                        sock.recv(1 << 16)
                    with contextlib.suppress(BlockingIOError):
                        at = (at + sock.send(frames[at:])) % len(frames)

        thread = threading.Thread(target=ask_without_end)
        thread.start()
        try:
            async with connected(server) as idle, connected(server) as half:
                half.writer.write(b"\0\x20x")
                assert await idle.ended() == await half.ended() == b""
            with Client(address(server)) as client:
                assert addresses(await client.ask(packet)) == ["10.0.0.9"]
        finally:
            stopped.set()
            thread.join()


async def test_a_client_that_does_not_read_its_answers_is_cut_off() -> None:
    async with running(VIEW, tcp_idle_timeout_s=0.1) as server, connected(server) as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        packets = query(ADDRESS)
        frame = len(packets).to_bytes(2, "big") + packets
        async with asyncio.timeout(20):
            with pytest.raises(ConnectionError):
                while True:
                    connection.writer.write(frame * 500)
                    await connection.writer.drain()


async def test_unread_answers_are_bounded(upstream: Authority) -> None:
    """Questions that were asked before the first answer came go on being answered, with 60 kB each."""

    def huge(asked: Asked) -> list[bytes]:
        record = b"\xc0\x0c" + struct.pack("!HHIH", 10, 1, 60, 60_000) + bytes(60_000)
        return [asked.packet[:2] + header(flags=0x8180, counts=(1, 1, 0, 0))[2:] + asked.question + record]

    upstream.script = huge
    names = [f"n{n}.big.example.test" for n in range(120)]
    async with running(VIEW, upstream.port, tcp_idle_timeout_s=600) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else the kernel takes it all
            client.connect(address(server))
            for ident, name in enumerate(names):
                packet = query(name, 10, ident=ident)
                client.sendall(len(packet).to_bytes(2, "big") + packet)
            async with asyncio.timeout(5):
                await upstream.heard(1)
            await eventually(lambda: not server.metrics.tcp_connections(), limit_s=30)


async def test_more_connections_than_allowed_are_closed() -> None:
    async with (
        running(VIEW, max_tcp_connections=2) as server,
        connected(server) as one,
        connected(server) as two,
    ):
        for connection in (one, two):
            assert addresses(await connection.ask(query(ADDRESS))) == ["10.0.0.9"]
        async with connected(server) as three:
            assert await three.ended() == b""
        one.writer.close()
        await one.writer.wait_closed()
        await eventually(lambda: server.metrics.tcp_connections() == 1)
        async with connected(server) as four:
            assert addresses(await four.ask(query(ADDRESS))) == ["10.0.0.9"]


async def test_one_client_may_not_take_all_connections() -> None:
    async with running(VIEW, max_tcp_connections_per_client=1) as server, connected(server) as one:
        assert addresses(await one.ask(query(ADDRESS))) == ["10.0.0.9"]
        async with connected(server) as two:
            assert await two.ended() == b""
        reader, writer = await asyncio.open_connection(*address(server), local_addr=("127.0.0.2", 0))
        assert addresses(await Connection(reader, writer).ask(query(ADDRESS))) == ["10.0.0.9"]
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(("other", "admitted"), [("fd00::2", False), ("fd00:0:0:1::1", True), ("10.0.0.1", True)])
async def test_the_connections_of_one_ipv6_network_are_counted_together(other: str, admitted: bool) -> None:
    async with running(VIEW, max_tcp_connections_per_client=1) as server:
        (listener,) = server._tcp
        one, two = (_Connection(listener, asyncio.get_running_loop()) for _ in range(2))
        assert listener.admit(one, packed("fd00::1"))
        assert listener.admit(two, packed(other)) is admitted
        for connection in (one, two):
            listener.forget(connection)
        assert not len(listener)
        assert not listener._clients


async def test_a_client_that_goes_away_leaves_nothing_behind(upstream: Authority) -> None:
    upstream.script = lambda asked: []
    async with running(VIEW, upstream.port) as server:
        async with connected(server) as connection:
            connection.send(query("www.example.test"))
            await upstream.heard(1)
            linger = struct.pack("ii", 1, 0)  # a reset, as from a client that crashed
            connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.writer.transport.abort()
        await eventually(lambda: not server.metrics.tcp_connections())
