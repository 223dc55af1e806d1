"""Upstreams over TLS and HTTPS, with real certificates."""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address

import dns.message
import dns.rcode
import pytest
import trustme
from aiohttp import web

from dnsgw import Outcome
from dnsgw.metrics import UpstreamOutcome
from dnsgw.upstream.address import UpstreamAddress, UpstreamProtocol
from dnsgw.upstream.exchange import Pending
from dnsgw.upstream.https_client import HttpsClient
from dnsgw.upstream.server import Upstream
from tests.support.dns_authority import Authority
from tests.support.dns_meshes import DOMAIN, mesh, relay
from tests.support.dns_packets import opt, query
from tests.support.dns_servers import Client, address, running
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

VIEW = mesh(relay("10.0.0.9"))
LOOPBACK = ip_address("127.0.0.1")
WWW = "www.example.test"
RECORDS = {(f"{prefix}{WWW}", "A"): ["192.0.2.1"] for prefix in ("", *(f"n{n}." for n in range(20)))}


@dataclass
class Secret:
    """A server over TLS or HTTPS."""

    authority: Authority
    port: int
    connections: int = 0
    status: int = 200
    close_after: int | None = None
    """Number of answers over TLS after which a connection is closed."""
    hold: asyncio.Event | None = None
    """Answers over HTTPS wait for it."""


@pytest.fixture(scope="module")
def signer() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca(signer: trustme.CA) -> str:
    return signer.cert_pem.bytes().decode()


def context(signer: trustme.CA, *names: str) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    signer.issue_cert(*names).configure_cert(made)
    return made


@contextlib.asynccontextmanager
async def serving_tls(tls: ssl.SSLContext) -> AsyncIterator[Secret]:
    secret = Secret(Authority(records=dict(RECORDS)), 0)

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        secret.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            answered = 0
            while secret.close_after is None or answered < secret.close_after:
                answered += 1
                packet = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
                for answer in secret.authority.packets(packet, ("", 0), tcp=True):
                    writer.write(len(answer).to_bytes(2, "big") + answer)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, ssl=tls)
    secret.port = server.sockets[0].getsockname()[1]
    try:
        yield secret
    finally:
        server.close()


@contextlib.asynccontextmanager
async def serving_https(tls: ssl.SSLContext) -> AsyncIterator[Secret]:
    secret = Secret(Authority(records=dict(RECORDS)), 0)

    async def post(request: web.Request) -> web.Response:
        assert request.content_type == "application/dns-message"
        packet = await request.read()
        assert packet[:2] == b"\0\0"
        (answer,) = secret.authority.packets(packet, ("", 0), tcp=True)
        if secret.hold is not None:
            await secret.hold.wait()
        return web.Response(body=answer, status=secret.status, content_type="application/dns-message")

    app = web.Application()
    app.router.add_post("/dns-query", post)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    secret.port = runner.addresses[0][1]
    try:
        yield secret
    finally:
        await runner.cleanup()


SERVING = {UpstreamProtocol.TLS: serving_tls, UpstreamProtocol.HTTPS: serving_https}


def destination(way: UpstreamProtocol, port: int, name: str = "dns.example") -> UpstreamAddress:
    return UpstreamAddress(LOOPBACK, port, way, name, "/dns-query" if way is UpstreamProtocol.HTTPS else "")


@pytest.mark.parametrize("name", ["dns.example", ""], ids=["by name", "by address"])
@pytest.mark.parametrize("way", SERVING)
async def test_questions_go_in_secret_and_padded(signer: trustme.CA, ca: str, way: UpstreamProtocol, name: str) -> None:
    async with SERVING[way](context(signer, name or "127.0.0.1")) as secret:
        upstream = (destination(way, secret.port, name),)
        async with running(VIEW, upstream=upstream, upstream_ca=ca) as server:
            with Client(address(server)) as client:
                for packet in (query(WWW), query(WWW, flags=0x0110), query(WWW, edns=opt(do=True))):
                    reply = await client.ask(packet)
                    assert dns.message.from_wire(reply).answer
                    assert (dns.message.from_wire(reply).edns >= 0) == (packet[11] == 1)
        assert [len(asked.packet) % 128 for asked in secret.authority.asked] == [0, 0, 0]
        options = [asked.message.options[-1].otype for asked in secret.authority.asked]
        assert options == [12, 12, 12]


@pytest.mark.parametrize("way", SERVING)
async def test_many_at_once(signer: trustme.CA, ca: str, way: UpstreamProtocol) -> None:
    async with SERVING[way](context(signer, "dns.example")) as secret:
        async with running(VIEW, upstream=(destination(way, secret.port),), upstream_ca=ca) as server:
            with Client(address(server)) as client:
                for n in range(20):
                    client.send(query(f"n{n}.{WWW}", ident=n))
                replies = [await client.receive() for _ in range(20)]
        assert {int.from_bytes(reply[:2], "big") for reply in replies} == set(range(20))
        assert all(dns.message.from_wire(reply).answer for reply in replies)
        if way is UpstreamProtocol.TLS:
            assert secret.connections == 1


async def test_a_connection_over_tls_that_is_closed_is_no_verdict_on_its_questions(signer: trustme.CA, ca: str) -> None:
    async with serving_tls(context(signer, "dns.example")) as secret:
        secret.close_after = 1
        async with running(VIEW, upstream=(destination(UpstreamProtocol.TLS, secret.port),), upstream_ca=ca) as server:
            with Client(address(server)) as client:
                for n in range(10):
                    client.send(query(f"n{n}.{WWW}", ident=n))
                replies = [await client.receive() for _ in range(10)]
        assert all(dns.message.from_wire(reply).answer for reply in replies)


@pytest.mark.parametrize("way", SERVING)
async def test_a_certificate_for_somebody_else_is_no_upstream(
    signer: trustme.CA, ca: str, way: UpstreamProtocol
) -> None:
    async with SERVING[way](context(signer, "other.example")) as secret:
        async with running(VIEW, upstream=(destination(way, secret.port),), upstream_ca=ca) as server:
            with Client(address(server)) as client:
                reply = dns.message.from_wire(await client.ask(query(WWW, edns=opt())))
                assert reply.rcode() == dns.rcode.SERVFAIL
                assert [int(option.code) for option in reply.options] == [23]
            assert server.metrics.queries[Outcome.UPSTREAM_FAILED] == 1
        assert not secret.authority.asked


async def test_an_answer_that_is_no_answer_is_a_failure(signer: trustme.CA, ca: str) -> None:
    async with serving_https(context(signer, "dns.example")) as secret:
        secret.status = 500
        async with running(
            VIEW, upstream=(destination(UpstreamProtocol.HTTPS, secret.port),), upstream_ca=ca
        ) as server:
            with Client(address(server)) as client:
                assert (await client.ask(query(WWW)))[3] & 15 == dns.rcode.SERVFAIL


@pytest.mark.parametrize("way", [UpstreamProtocol.TLS, UpstreamProtocol.HTTPS])
async def test_another_authority_counts_at_once(signer: trustme.CA, ca: str, way: UpstreamProtocol) -> None:
    """As when the file of certificates is renewed under the same path."""
    other = trustme.CA().cert_pem.bytes().decode()
    async with (
        SERVING[way](context(signer, "dns.example")) as secret,
        running(VIEW, upstream=(destination(way, secret.port),), upstream_ca=other) as server,
    ):
        with Client(address(server)) as client:
            for n, authority in enumerate((other, other + ca, other, ca)):
                server.reconfigure(replace(server.config, upstream_ca=authority))
                reply = await client.ask(query(f"n{n}.{WWW}"))
                assert reply[3] & 15 == (dns.rcode.NOERROR if ca in authority else dns.rcode.SERVFAIL)


# Servers that write HTTP in other ways, or lie.

TYPE = b"Content-Type: application/dns-message\r\n"
OK = b"HTTP/1.1 200 OK\r\n" + TYPE


@contextlib.asynccontextmanager
async def writing(
    tls: ssl.SSLContext, write: Callable[[bytes], Iterator[bytes]], *, reads_on: bool = False
) -> AsyncIterator[Secret]:
    """A server that answers the first request of each connection with the bytes that `write` makes of the good answer.

    Then it closes the connection, with `reads_on` not before the next request.
    """
    secret = Secret(Authority(records=dict(RECORDS)), 0)

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        secret.connections += 1
        with contextlib.suppress(OSError, EOFError):
            head = await reader.readuntil(b"\r\n\r\n")
            (length,) = re.findall(rb"Content-Length: (\d+)", head)
            (answer,) = secret.authority.packets(await reader.readexactly(int(length)), ("", 0), tcp=True)
            for part in write(answer):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)  # after an abort, `drain` neither waits nor raises until the loop has run
            if reads_on:
                await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, ssl=tls)
    secret.port = server.sockets[0].getsockname()[1]
    try:
        yield secret
    finally:
        server.close()


def in_chunks(answer: bytes) -> Iterator[bytes]:
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
    for n in range(0, len(answer), 7):
        part = answer[n : n + 7]
        yield b"%X;x=y\r\n%s\r\n" % (len(part), part)
    yield b"0\r\n\r\n"


def to_the_end(answer: bytes) -> Iterator[bytes]:
    yield OK + b"\r\n" + answer


def behind_hints(answer: bytes) -> Iterator[bytes]:
    yield b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 2
    yield OK + b"content-length:%d\r\n\r\n" % len(answer) + answer


def answers(*heads: bytes, times: int = 1) -> Callable[[bytes], Iterator[bytes]]:
    def write(answer: bytes) -> Iterator[bytes]:
        for _ in range(times):
            for head in heads:
                yield head.replace(b"ANSWER", answer).replace(b"SIZE", b"%d" % len(answer))

    return write


GOOD = [in_chunks, to_the_end, behind_hints]
ENDLESS = 1 << 20
BAD = {
    "interim for ever": answers(b"HTTP/1.1 100 Continue\r\n\r\n" * 2000, times=ENDLESS),
    "chunks of one byte for ever": answers(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n" * 5000] * 500, times=1
    ),
    "a head without end": answers(b"HTTP/1.1 200 OK\r\n", *[b"X: " + b"y" * 5000 + b"\r\n"] * 200),
    "a content without end": answers(OK + b"\r\n", *[bytes(50_000)] * 200),
    "two lengths": answers(OK + b"Content-Length: SIZE\r\nTransfer-Encoding: chunked\r\n\r\nANSWER"),
    "a wrong length": answers(OK + b"Content-Length: 5, 6\r\n\r\nANSWER"),
    "too much": answers(OK + b"Content-Length: 70000\r\n\r\n" + bytes(70000)),
    "too little": answers(OK + b"Content-Length: 500\r\n\r\nANSWER"),
    "another type": answers(b"HTTP/1.1 200 OK\r\nContent-Length: SIZE\r\n\r\nANSWER"),
    "compressed": answers(OK + b"Content-Encoding: gzip\r\nContent-Length: SIZE\r\n\r\nANSWER"),
    "elsewhere": answers(b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"),
    "not HTTP": answers(b"SSH-2.0-x\r\n\r\n"),
    "a bad chunk": answers(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nANSWER\r\n0\r\n\r\n"),
    "a bad field": answers(OK + b" folded\r\n\r\nANSWER"),
    "nothing": answers(),
}


@pytest.mark.parametrize("write", GOOD)
async def test_other_ways_to_write_an_answer(
    signer: trustme.CA, ca: str, write: Callable[[bytes], Iterator[bytes]]
) -> None:
    async with (
        writing(context(signer, "dns.example"), write) as secret,
        running(VIEW, upstream=(destination(UpstreamProtocol.HTTPS, secret.port),), upstream_ca=ca) as server,
    ):
        with Client(address(server)) as client:
            for n in range(3):
                assert dns.message.from_wire(await client.ask(query(f"n{n}.{WWW}"))).answer


async def test_a_kept_connection_that_ends_without_a_response_is_no_verdict(signer: trustme.CA, ca: str) -> None:
    async with (
        writing(context(signer, "dns.example"), in_chunks, reads_on=True) as secret,
        running(VIEW, upstream=(destination(UpstreamProtocol.HTTPS, secret.port),), upstream_ca=ca) as server,
    ):
        with Client(address(server)) as client:
            for tag in "abc":
                for n in range(5):
                    client.send(query(f"{tag}{n}.{WWW}", ident=n))
                replies = [await client.receive() for _ in range(5)]
                assert {reply[3] & 15 for reply in replies} == {dns.rcode.NXDOMAIN}
        assert server.metrics.upstream[UpstreamOutcome.UNREACHABLE] == 0


async def test_connections_from_another_address_are_given_up(signer: trustme.CA, ca: str) -> None:
    """Both one that is idle and one that waits for its response."""
    answered: dict[int, bytes] = {}
    async with serving_https(context(signer, "dns.example")) as secret, asyncio.TaskGroup() as tasks:
        place = destination(UpstreamProtocol.HTTPS, secret.port)
        upstream = Upstream(
            place, asyncio.get_running_loop(), received=lambda *_: None, lost=lambda _: None, moved=lambda _: None
        )

        def received(packet: bytes, pending: Pending) -> None:
            answered[packet[1]] = packet
            pending.clear()

        client = HttpsClient(place, ssl.create_default_context(cadata=ca), received=received, lost=lambda _: None)
        secret.hold = asyncio.Event()
        asking = [
            tasks.create_task(client.post(Pending(upstream, stream=True), n, query(f"n{n}.{WWW}")[2:]))
            for n in range(4)
        ]
        await eventually(lambda: len(secret.authority.asked) == 4)
        client.renew(ip_address("127.0.0.1").packed)
        await asyncio.sleep(0)
        assert len(secret.authority.asked) == 4
        client.renew(ip_address("127.0.0.2").packed)
        await eventually(lambda: len(secret.authority.asked) == 8)
        secret.hold.set()
        for one in asking:
            await one
        assert sorted(answered) == [0, 1, 2, 3]
        client.renew(ip_address("127.0.0.2").packed)  # idle ones
        await client.post(Pending(upstream, stream=True), 9, query(f"n9.{WWW}")[2:])
        assert 9 in answered
        await client.close()


@pytest.mark.parametrize("case", BAD)
async def test_an_invalid_response_is_a_failure_and_blocks_nothing(signer: trustme.CA, ca: str, case: str) -> None:
    own = f"p8443-10-1-0-5.b.{DOMAIN}"
    async with (
        writing(context(signer, "dns.example"), BAD[case]) as secret,
        running(VIEW, upstream=(destination(UpstreamProtocol.HTTPS, secret.port),), upstream_ca=ca) as server,
    ):
        with Client(address(server)) as one, Client(address(server)) as other:
            for n in range(10):
                one.send(query(f"n{n}.{WWW}", ident=n))
            for _ in range(10):
                assert dns.message.from_wire(await other.ask(query(own))).answer
            for _ in range(10):
                assert (await one.receive())[3] & 15 == dns.rcode.SERVFAIL
        assert server.metrics.queries[Outcome.ERROR] == 0
