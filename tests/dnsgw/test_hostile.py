"""Upstreams that lie, are silent or slow, and clients with unusual questions: a real server between real sockets."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from dnsgw import Outcome
from dnsgw.message.question import Qtype
from dnsgw.metrics import UpstreamOutcome
from tests.support.dns_authority import Asked, Authority, serving
from tests.support.dns_meshes import DOMAIN, imports, mesh, relay
from tests.support.dns_packets import header, name, opt, query, question
from tests.support.dns_servers import Client, address, connected, free_port, running

pytestmark = pytest.mark.anyio

WWW = "www.example.test"
ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
VIEW = mesh(relay("10.0.0.9"))
SERVFAIL, NXDOMAIN, NOERROR = dns.rcode.SERVFAIL, dns.rcode.NXDOMAIN, dns.rcode.NOERROR


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving({(WWW, "A"): ["192.0.2.1"], ("mail.example.test", "A"): ["192.0.2.2"]}) as authority:
        yield authority


def read(reply: bytes) -> dns.message.Message:
    return dns.message.from_wire(reply)


def data(reply: bytes) -> list[str]:
    return [str(item) for rrset in read(reply).answer for item in rrset]


def errors(reply: bytes) -> list[int]:
    return [int(error.code) for error in read(reply).extended_errors()]


# What upstream sends.


@pytest.mark.parametrize("tcp", [False, True], ids=["UDP", "TCP"])
async def test_the_one_true_answer_is_found_among_lies(upstream: Authority, tcp: bool) -> None:
    def lies(asked: Asked) -> list[bytes]:
        good = asked.answer
        bad = good.replace(b"\xc0\0\x02\x01", b"\xc0\0\x02\x42")
        assert bad != good
        other_id = bytes((bad[0] ^ 0x80,)) + bad[1:]
        other_name = bad[:13] + b"x" + bad[14:]
        stop = 12 + len(asked.question)
        other_type = bad[: stop - 3] + b"\x1c" + bad[stop - 2 :]
        two_questions = bad[:5] + b"\2" + bad[6:]
        a_query = bad[:2] + bytes((bad[2] & 0x7F,)) + bad[3:]
        return [other_id, other_name, other_type, two_questions, a_query, good, bad]

    upstream.script = lies
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        with Client(address(server)) as client:
            for _ in range(2):
                assert data(await (connection.ask if tcp else client.ask)(query(WWW))) == ["192.0.2.1"]
        counts = server.metrics.upstream
        kinds = (UpstreamOutcome.UNWANTED, UpstreamOutcome.WRONG_ID, UpstreamOutcome.WRONG_QUESTION)
        assert sum(counts[kind] for kind in kinds) >= 5
        assert server.metrics.queries[Outcome.ERROR] == 0


async def test_an_answer_cut_anywhere_is_none(upstream: Authority) -> None:
    """Where it is cut is in the name. What is too short to have the question is waited on for as long as nothing had come."""
    upstream.records.clear()
    begin, end = 35, 51  # the end of the question, and of the answer
    upstream.records.update({(f"n{n}.example.test", "A"): ["192.0.2.1"] for n in range(begin, end + 3)})
    upstream.script = lambda asked: [asked.answer[: int(asked.name[1:3])]]
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        for n in range(begin, end + 3):
            reply = await connection.ask(query(f"n{n}.example.test", edns=opt()))
            whole = n >= len(upstream.asked[-1].answer)
            assert data(reply) == (["192.0.2.1"] if whole else [])
            assert read(reply).rcode() == (NOERROR if whole else SERVFAIL)
            assert errors(reply) == ([] if whole else [23])
        assert server.metrics.queries[Outcome.UPSTREAM_FAILED] > 10
        assert server.metrics.queries[Outcome.ERROR] == 0


async def test_an_answer_that_is_cut_and_cannot_be_had_over_tcp(upstream: Authority) -> None:
    """The client is told to come over TCP; there it learns that upstream is not."""

    def cut(asked: Asked) -> list[bytes]:
        reply = dns.message.make_response(asked.message)
        reply.flags |= dns.flags.TC
        return [reply.to_wire()]

    upstream.script = cut
    upstream.close_after = 0
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        with Client(address(server)) as client:
            for _ in range(2):
                reply = read(await client.ask(query(WWW)))
                assert reply.flags & dns.flags.TC
                assert not reply.answer
            reply_tcp = await connection.ask(query(WWW, edns=opt()))
            assert read(reply_tcp).rcode() == SERVFAIL
            assert errors(reply_tcp) == [23]


async def test_aliases_that_go_on_for_ever_end_here(upstream: Authority) -> None:
    """Every name is an alias of another one that is imported, so that each is asked about in turn."""

    def onwards(asked: Asked) -> list[bytes]:
        reply = dns.message.make_response(asked.message)
        number = int("".join(filter(str.isdigit, asked.name)) or 0)
        target = f"n{number + 1}.shop.svc.cluster.local."
        reply.answer.append(dns.rrset.from_text(asked.name + ".", 300, "IN", "CNAME", target))
        return [reply.to_wire()]

    upstream.script = onwards
    async with running(VIEW, upstream.port, imports=imports("local")) as server:
        with Client(address(server)) as client:
            reply = read(await client.ask(query("n0.example.test")))
            assert 1 <= len(reply.answer) <= 6
            assert len(upstream.asked) <= 8
            assert data(await client.ask(query(ADDRESS))) == ["10.0.0.9"]


@pytest.mark.parametrize("tcp", [False, True], ids=["UDP", "TCP"])
async def test_an_upstream_that_is_silent_costs_others_nothing(upstream: Authority, tcp: bool) -> None:
    upstream.script = lambda asked: [] if asked.name == WWW else [asked.answer]
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        with Client(address(server)) as client:
            send = connection.send if tcp else client.send
            receive = connection.receive if tcp else client.receive
            send(query(WWW, ident=1, edns=opt()))
            await upstream.heard(1)
            send(query(ADDRESS, ident=2))
            assert data(await receive()) == ["10.0.0.9"]
            send(query("mail.example.test", ident=3))
            assert data(await receive()) == ["192.0.2.2"]
            reply = await receive()
            assert (read(reply).id, read(reply).rcode(), errors(reply)) == (1, SERVFAIL, [22])


async def test_an_upstream_that_sends_a_byte_now_and_then_is_one_that_is_silent() -> None:
    """Over TCP: neither the question nor the connection is held for longer than any question is."""
    ended = asyncio.Event()

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readexactly(2)
            writer.write(b"\xff\xff")
            async with asyncio.timeout(5):
                while not ended.is_set():
                    writer.write(b"\0")
                    await writer.drain()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await ended.wait()
        writer.close()

    listening = await asyncio.start_server(trickle, "127.0.0.1", 0)
    async with running(VIEW, listening.sockets[0].getsockname()[1]) as server, connected(server) as connection:
        reply = await connection.ask(query(WWW, edns=opt()))
        assert (read(reply).rcode(), errors(reply)) == (SERVFAIL, [22])
        assert server.metrics.in_flight() == 0
        ended.set()
    listening.close()


async def test_a_late_answer_is_dropped(upstream: Authority) -> None:
    upstream.script = lambda _: []
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            assert read(await client.ask(query(WWW))).rcode() == SERVFAIL
            for asked in upstream.asked:
                upstream.send(asked.answer, asked.source)
            upstream.script = None
            assert data(await client.ask(query("mail.example.test"))) == ["192.0.2.2"]
            assert server.metrics.upstream[UpstreamOutcome.UNWANTED] == len(upstream.asked) - 1
            assert server.metrics.queries[Outcome.FORWARDED] == 1


async def test_nothing_listens_there_at_all() -> None:
    async with running(VIEW, free_port()) as server, connected(server) as connection:
        reply = await connection.ask(query(WWW, edns=opt()))
        assert (read(reply).rcode(), errors(reply)) == (SERVFAIL, [23])


async def test_a_ttl_of_zero_is_passed_on_and_not_cached(upstream: Authority) -> None:
    def fleeting(asked: Asked) -> list[bytes]:
        reply = dns.message.from_wire(asked.answer)
        reply.answer[0].ttl = 0
        return [reply.to_wire()]

    upstream.script = fleeting
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            for count in range(1, 4):
                assert read(await client.ask(query(WWW))).answer[0].ttl == 0
                assert len(upstream.asked) == count
        assert server.metrics.cache_entries() == 0


async def test_the_longest_message_goes_through_over_tcp(upstream: Authority) -> None:
    """65,535 bytes: from upstream, through the cache, to the client."""
    head = header(0, 0x8180, (1, 255, 0, 0)) + question("big.example.test", 16)
    room = 65535 - len(head)
    sizes = [room // 255 - 12] * 254
    sizes.append(room - sum(sizes) - 255 * 12)
    body = b"".join(
        b"\xc0\x0c" + bytes.fromhex("0010 0001 0000012c") + size.to_bytes(2, "big") + (b"\0" * size) for size in sizes
    )
    assert len(head + body) == 65535
    upstream.script = lambda asked: [asked.packet[:2] + (head + body)[2:]]
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        for _ in range(2):
            reply = await connection.ask(query("big.example.test", 16))
            assert reply[2:] == (head + body)[2:]
        with Client(address(server)) as client:
            reply = await client.ask(query("big.example.test", 16, edns=opt(4096)))
            assert read(reply).flags & dns.flags.TC
            assert len(reply) < 100
        assert len(upstream.asked) <= 2


# What clients send.

ODD = {
    "UPDATE": (query("example.test", 6, flags=5 << 11), dns.rcode.NOTIMP),
    "NOTIFY": (query("example.test", 6, flags=4 << 11), dns.rcode.NOTIMP),
    "STATUS": (query("example.test", 6, flags=2 << 11), dns.rcode.NOTIMP),
    "AXFR": (query("example.test", Qtype.AXFR), dns.rcode.REFUSED),
    "IXFR": (
        header(counts=(1, 0, 1, 0))
        + question("example.test", Qtype.IXFR)
        + name("example.test")
        + bytes.fromhex("0006 0001 00000000 0016 00 00 00000001 00000001 00000001 00000001 00000001"),
        dns.rcode.REFUSED,
    ),
    "AXFR with a serial": (
        header(counts=(1, 0, 1, 0))
        + question("example.test", Qtype.AXFR)
        + name("example.test")
        + bytes.fromhex("0006 0001 00000000 0016 00 00 00000001 00000001 00000001 00000001 00000001"),
        dns.rcode.FORMERR,
    ),
    "IXFR without a serial": (query("example.test", Qtype.IXFR), dns.rcode.REFUSED),
    "no question": (header(counts=(0, 0, 0, 0)), dns.rcode.FORMERR),
    "no question, EDNS": (header(counts=(0, 0, 0, 1)) + opt(), dns.rcode.FORMERR),
    "two questions": (header(counts=(2, 0, 0, 0)) + question(WWW) + question(ADDRESS), dns.rcode.FORMERR),
    "65,535 questions": (header(counts=(65535, 0, 0, 0)) + question(WWW), dns.rcode.FORMERR),
    "65,535 additional records": (header(counts=(1, 0, 0, 65535)) + question(WWW), dns.rcode.FORMERR),
    "class CH": (query("version.bind", 16, qclass=3), dns.rcode.REFUSED),
    "EDNS version 1": (query(WWW, edns=opt(version=1)), dns.rcode.BADVERS),
}


@pytest.mark.parametrize("tcp", [False, True], ids=["UDP", "TCP"])
@pytest.mark.parametrize("which", ODD)
async def test_what_nobody_asks(upstream: Authority, which: str, tcp: bool) -> None:
    packet, rcode = ODD[which]
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        with Client(address(server)) as client:
            ask = connection.ask if tcp else client.ask
            reply = read(await ask(packet))
            assert reply.rcode() == rcode
            assert reply.id == 0x1234
            assert not reply.answer
            assert data(await ask(query(ADDRESS))) == ["10.0.0.9"]
    assert not upstream.asked


async def test_a_client_that_sends_a_byte_now_and_then_is_idle() -> None:
    """RFC 7766 section 6.2.3: what counts is a whole question, so that nobody holds a connection with a byte a second."""
    async with running(VIEW, tcp_idle_timeout_s=0.2) as server:
        reader, writer = await asyncio.open_connection(*address(server))
        packet = query("a" * 60 + ".example.test")
        sent = 0
        async with asyncio.timeout(10):
            for byte in (len(packet) + 1000).to_bytes(2, "big") + packet * 20:
                writer.write(bytes((byte,)))
                sent += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        assert await reader.read() == b""
                        break
        assert sent < 1000
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert server.metrics.tcp_connections() == 0


@pytest.mark.parametrize("size", [4097, 65535])
async def test_a_question_that_is_no_question_by_its_length_alone(size: int) -> None:
    async with running(VIEW) as server, connected(server) as connection:
        connection.writer.write(size.to_bytes(2, "big") + query(ADDRESS) + bytes(1000))
        assert await connection.ended() == b""


async def test_a_datagram_of_the_largest_size_is_met_with_silence_or_an_error() -> None:
    async with running(VIEW) as server:
        with Client(address(server)) as client:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            client.send(query(WWW) + bytes(65507 - len(query(WWW))))
            client.send(query(ADDRESS, ident=7))
            while (reply := await client.receive())[:2] != b"\0\7":
                assert read(reply).rcode() == dns.rcode.FORMERR
            assert data(reply) == ["10.0.0.9"]
