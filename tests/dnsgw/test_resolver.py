"""From packet to reply, with a real upstream: which clients may ask, which upstream is asked, and in which order."""

import asyncio
from collections.abc import AsyncIterator
from ipaddress import ip_network
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.mesh import Mesh
from dnsgw import DnsConfig, DnsMetrics, Outcome
from dnsgw.client_limits import packed
from dnsgw.message.question import Qtype
from dnsgw.resolver import Resolver, ResolverLimits
from dnsgw.server import ServerTiming
from tests.support.dns_authority import Asked, Authority, serving
from tests.support.dns_meshes import DOMAIN, ORDERS, imports, mesh, relay
from tests.support.dns_packets import AD, CD, RD, header, opt, option, query, question
from tests.support.dns_servers import Client, address, connected, running

pytestmark = pytest.mark.anyio

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
VIEW = mesh(relay("10.0.0.9", "fd00::9"))
RECORDS = {
    ("www.example.test", "A"): ["192.0.2.1"],
    ("www.example.test", "AAAA"): ["2001:db8::1"],
    ("big.example.test", "TXT"): [f"{n}-{'x' * 200}" for n in range(12)],
}


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving(dict(RECORDS)) as authority:
        yield authority


def read(reply: bytes) -> dns.message.Message:
    return dns.message.from_wire(reply)


def addresses(reply: bytes) -> list[str]:
    return [str(item) for rrset in read(reply).answer for item in rrset]


def error(reply: bytes) -> tuple[int, str]:
    (extended,) = read(reply).extended_errors()
    return int(extended.code), extended.text or ""


def limits(**changes: Any) -> ServerTiming:
    return ServerTiming(resolver=ResolverLimits(**changes))


def silent(asked: Asked) -> list[bytes]:
    return []


# What is forwarded.


async def test_a_foreign_name_is_upstreams_with_our_clients_id_and_spelling(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            asked = query("WwW.example.TEST", ident=0xBEEF, flags=RD | AD | CD, edns=opt(1232, do=True))
            reply = await client.ask(asked)
        (seen,) = upstream.asked
        assert seen.question.lower() == asked[12:34].lower()
        # But for the flags, OPT, which is for one hop, and the spelling, it is upstream's answer byte for byte.
        whole = asked[:2] + b"\x81\x90" + seen.answer[4:12] + asked[12:34] + seen.answer[34:]
        assert reply[: -len(opt())] == whole[: len(reply) - 11]
        assert reply.endswith(opt(1232, do=True))
        assert addresses(reply) == ["192.0.2.1"]
        assert server.metrics.queries[Outcome.FORWARDED] == 1


QR, AA, RA, Z = 0x8000, 0x0400, 0x0080, 0x0040
UPSTREAMS = {
    "authoritative": QR | AA,
    "authoritative, with all bits": QR | AA | RD | RA | Z | AD | CD,
    "recursive": QR | RD | RA,
    "validating": QR | RD | RA | AD,
}
CLIENTS = {
    "libc": (RD, b""),
    "AD": (RD | AD, b""),
    "CD": (RD | CD, b""),
    "EDNS": (RD, opt()),
    "DO": (RD, opt(do=True)),
    "DO, CD": (RD | CD, opt(do=True)),
}


@pytest.mark.parametrize(("client_flags", "edns"), CLIENTS.values(), ids=CLIENTS)
@pytest.mark.parametrize("bits", UPSTREAMS.values(), ids=UPSTREAMS)
async def test_the_flags_are_a_recursive_resolvers_whatever_upstream_is(
    upstream: Authority, bits: int, client_flags: int, edns: bytes
) -> None:
    def with_bits(asked: Asked) -> list[bytes]:
        rcode = asked.answer[3] & 0xF if asked.name != "failed.example.test" else dns.rcode.REFUSED
        return [asked.answer[:2] + (bits | rcode).to_bytes(2, "big") + asked.answer[4:]]

    upstream.script = with_bits
    wants_ad = client_flags & AD or edns == opt(do=True)
    expected = QR | RA | RD | client_flags & CD | (bits & AD if wants_ad else 0)
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            for name, qtype, rcode in (
                ("www.example.test", Qtype.A, 0),
                ("www.example.test", 65, 0),
                ("nope.example.test", Qtype.A, 3),
                ("failed.example.test", Qtype.A, 5),
            ):
                # From upstream, from the cache, and from what is prepared of it.
                for _ in range(3):
                    reply = await client.ask(query(name, qtype, flags=client_flags, edns=edns))
                    assert int.from_bytes(reply[2:4], "big") == expected | rcode
            reply = await client.ask(query("www.example.test", flags=client_flags & ~RD, edns=edns))
            assert int.from_bytes(reply[2:4], "big") == expected & ~RD  # a question for upstream's own data


async def test_a_truncated_answer_that_cannot_be_read_has_our_flags(upstream: Authority) -> None:
    upstream.script = lambda asked: [
        asked.answer[:2] + header(flags=QR | AA | 0x0200, counts=(1, 9, 0, 0))[2:] + asked.question
    ]
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            reply = await client.ask(query("www.example.test", ident=7, edns=opt()))
            assert reply == header(7, QR | RA | RD | 0x0200, (1, 0, 0, 1)) + question("www.example.test") + opt()


async def test_two_spellings_at_once_are_one_question_and_two_replies(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as one, Client(address(server)) as two:
            one.send(query("WWW.example.test", ident=1))
            two.send(query("www.EXAMPLE.test", ident=2))
            first, second = await one.receive(), await two.receive()
        assert first[:2] + first[12:34] == b"\0\x01" + question("WWW.example.test")
        assert second[:2] + second[12:34] == b"\0\x02" + question("www.EXAMPLE.test")
        assert len(upstream.asked) == 1


async def test_nxdomain_and_nodata_of_upstream_are_passed_on(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            assert read(await client.ask(query("nope.example.test"))).rcode() == dns.rcode.NXDOMAIN
            nodata = read(await client.ask(query("www.example.test", 65)))
            assert (nodata.rcode(), nodata.answer, len(nodata.authority)) == (dns.rcode.NOERROR, [], 1)


async def test_cookies_stay_here(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            reply = await client.ask(query("www.example.test", edns=opt(4096, options=option(10, b"12345678"))))
        assert b"12345678" not in upstream.asked[0].packet
        assert read(reply).edns == 0
        assert read(reply).options[0].to_wire()[:8] == b"12345678"  # the client's, with our half, and not upstream's


async def test_a_big_answer_is_truncated_over_udp_and_whole_over_tcp(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            reply = await client.ask(query("big.example.test", 16, edns=opt(4096)))
            assert reply[2] & 2
            assert len(reply) < 512
            upstream.script = lambda asked: [asked.answer[:2] + long_answer(asked)[2:]]
            reply = await client.ask(query("big.example.test", 16, ident=9, edns=opt(1232)))
            assert reply == header(9, 0x8380, (1, 0, 0, 1)) + question("big.example.test", 16) + opt()
        upstream.script = None
        async with connected(server) as connection:
            assert len(addresses(await connection.ask(query("big.example.test", 16)))) == 12
        assert upstream.asked[-1].tcp


def long_answer(asked: Asked) -> bytes:
    """More than was asked for, as an upstream might send that minds no size."""
    record = b"\xc0\x0c" + bytes.fromhex("0010 0001 00000000 0514") + b"\0" * 0x514
    return asked.packet[:2] + header(flags=0x8180, counts=(1, 1, 0, 0))[2:] + asked.question + record


async def test_silence_of_upstream_is_servfail_and_says_so(upstream: Authority) -> None:
    upstream.script = silent
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            reply = await client.ask(query("www.example.test", edns=opt()))
        assert read(reply).rcode() == dns.rcode.SERVFAIL
        assert error(reply) == (22, "no upstream answered in time")
        assert len(upstream.asked) == 3
        assert server.metrics.queries[Outcome.UPSTREAM_FAILED] == 1


async def test_without_upstream_foreign_names_are_servfail_and_ours_are_not() -> None:
    async with running(VIEW) as server:
        with Client(address(server)) as client:
            reply = await client.ask(query("www.example.test", edns=opt()))
            assert read(reply).rcode() == dns.rcode.SERVFAIL
            assert error(reply) == (22, "no upstream is configured")
            assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]


async def test_the_questions_of_one_client_are_bounded(upstream: Authority) -> None:
    upstream.script = silent
    async with running(VIEW, upstream.port, max_in_flight=8) as server:
        with Client(address(server)) as client, Client(address(server), "127.0.0.2") as other:
            client.send(query("n1.example.test"))
            client.send(query("n2.example.test"))
            await upstream.heard(2)
            # One client has a fourth of what may wait.
            reply = await client.ask(query("n3.example.test", ident=3, edns=opt()))
            assert (reply[:2], read(reply).rcode()) == (b"\0\x03", dns.rcode.REFUSED)
            assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]
            other.send(query("n4.example.test"))
            await upstream.heard(3)
        assert server.metrics.queries[Outcome.OVERLOADED] == 1


async def test_the_questions_of_all_clients_together_are_bounded(upstream: Authority) -> None:
    upstream.script = silent
    async with running(VIEW, upstream.port, max_in_flight=2) as server:
        with (
            Client(address(server)) as one,
            Client(address(server), "127.0.0.2") as two,
            Client(address(server), "127.0.0.3") as three,
        ):
            one.send(query("n1.example.test"))
            two.send(query("n2.example.test"))
            await upstream.heard(2)
            assert read(await three.ask(query("n3.example.test"))).rcode() == dns.rcode.REFUSED


# Who may ask.


async def test_strangers_are_refused() -> None:
    async with running(VIEW, allow=(ip_network("127.0.0.2/32"), ip_network("fd00::/8"))) as server:
        with Client(address(server), "127.0.0.2") as friend, Client(address(server), "127.0.0.3") as stranger:
            assert addresses(await friend.ask(query(ADDRESS))) == ["10.0.0.9"]
            reply = await stranger.ask(query(ADDRESS, edns=opt()))
            assert read(reply).rcode() == dns.rcode.REFUSED
            assert len(reply) == len(query(ADDRESS, edns=opt()))
            stranger.send(query(ADDRESS, flags=0x8100))
            assert (await stranger.ask(query(ADDRESS)))[3] & 15 == dns.rcode.REFUSED
        assert server.metrics.queries[Outcome.DENIED] == 2
        async with connected(server) as connection:  # from 127.0.0.1
            assert (await connection.ask(query(ADDRESS)))[3] & 15 == dns.rcode.REFUSED


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("172.31.0.1", True),
        ("172.32.0.1", False),
        ("192.168.1.1", True),
        ("100.64.0.1", True),
        ("8.8.8.8", False),
        ("::1", True),
        ("fd00::1", True),
        ("fe80::1%eth0", True),
        ("2001:db8::1", False),
    ],
)
def test_private_addresses_may_ask_by_default(host: str, allowed: bool) -> None:
    resolver = Resolver(DnsConfig(network="a", listen=()), DnsMetrics())
    resolver.apply(VIEW)
    replies: list[bytes] = []
    for _ in range(2):  # the second time it is known
        resolver.handle(query(ADDRESS), packed(host), lambda reply, where: replies.append(reply), None, False)
    assert [reply[3] & 15 for reply in replies] == [0 if allowed else 5] * 2


# Changes of discovery.


async def test_a_change_shows_at_once() -> None:
    async with running(mesh(), imports=imports()) as server:
        with Client(address(server)) as client:
            assert (await client.ask(query(ADDRESS)))[3] & 15 == dns.rcode.SERVFAIL
            server.apply(VIEW)
            assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]
            server.apply(mesh(relay("10.0.0.8")))
            assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.8"]
            assert addresses(await client.ask(query(ORDERS))) == ["10.0.0.8"]
            server.apply(Mesh.EMPTY)
            assert (await client.ask(query(ADDRESS)))[3] & 15 == dns.rcode.NXDOMAIN


async def test_questions_about_our_names_wait_for_the_first_state_of_discovery(upstream: Authority) -> None:
    async with running(None, upstream.port, imports=imports("remote")) as server:
        with Client(address(server)) as client:
            client.send(query(ADDRESS, ident=1))
            client.send(query(ORDERS, ident=2))
            assert addresses(await client.ask(query("www.example.test", ident=3))) == ["192.0.2.1"]
            server.apply(VIEW)
            replies = [await client.receive(), await client.receive()]
            assert [(reply[:2], addresses(reply)) for reply in replies] == [
                (b"\0\x01", ["10.0.0.9"]),
                (b"\0\x02", ["10.0.0.9"]),
            ]


async def test_they_do_not_wait_for_long(upstream: Authority) -> None:
    async with running(None, upstream.port, imports=imports("local"), timing=limits(hold_s=0.02)) as server:
        with Client(address(server)) as client:
            for name in (ADDRESS, ORDERS):
                reply = await client.ask(query(name, edns=opt()))
                assert reply[3] & 15 == dns.rcode.SERVFAIL
                assert error(reply) == (14, "discovery was not heard from since the start")
            upstream.records["bills.shop.svc.cluster.local", "A"] = ["192.0.2.7"]
            assert addresses(await client.ask(query("bills.shop.svc.cluster.local"))) == ["192.0.2.7"]


async def test_the_number_of_questions_that_wait_is_bounded() -> None:
    async with running(None, timing=limits(max_held=1)) as server:
        with Client(address(server)) as client:
            client.send(query(ADDRESS, ident=1))
            assert (await client.ask(query(ADDRESS, ident=2)))[:4] == b"\0\x02\x81\x82"


# Errors of ours.


class BrokenMesh(Mesh):
    """A mesh in which no name can be looked up: an error in our own code."""

    @property
    def networks(self) -> frozenset[str]:
        raise ZeroDivisionError


async def test_an_error_of_ours_does_not_end_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async with running(BrokenMesh({}, 1)) as server:
        with Client(address(server)) as client:
            for n in range(3):
                client.send(query(ADDRESS, ident=n))
            async with connected(server) as connection:
                connection.send(query(ADDRESS))
                assert await connection.ended() == b""
        server.apply(VIEW)
        with Client(address(server)) as client:
            assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]
        assert server.metrics.queries[Outcome.ERROR] == 4
    assert caplog.text.count("dns_error") == 1  # one line a second at most


@given(st.binary(max_size=200))
def test_garbage_never_raises(packet: bytes) -> None:
    metrics = DnsMetrics()
    resolver = Resolver(DnsConfig(network="a", listen=()), metrics)
    resolver.apply(VIEW)
    replies: list[bytes] = []
    resolver.handle(packet, packed("127.0.0.1"), lambda reply, where: replies.append(reply), None, False)
    if metrics.queries[Outcome.ERROR]:  # it was a good question, and there is no way to upstream here
        assert packet[4:12] in (b"\0\1\0\0\0\0\0\0", b"\0\1\0\0\0\0\0\1")
    assert len(replies) == 1


# How much.


async def test_questions_above_the_limit_are_dropped_or_sent_to_tcp() -> None:
    async with running(VIEW, rate_limit=10, timing=limits(rate_window_s=60.0)) as server:
        with Client(address(server)) as client, Client(address(server), "127.0.0.2") as other:
            for _ in range(10):
                assert addresses(await client.ask(query(ADDRESS)))
            for _ in range(16):
                client.send(query(ADDRESS, ident=9))
            for _ in range(2):
                reply = await client.receive()
                assert read(reply).flags & dns.flags.TC
                assert not read(reply).answer
            assert addresses(await other.ask(query(ADDRESS))) == ["10.0.0.9"]
            assert server.metrics.queries[Outcome.LIMITED] == 16
            async with connected(server) as connection:
                assert read(await connection.ask(query(ADDRESS))).rcode() == dns.rcode.REFUSED
                server._resolver._renew()
                assert addresses(await connection.ask(query(ADDRESS))) == ["10.0.0.9"]
            assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]


async def test_one_ipv6_network_is_one_client(upstream: Authority) -> None:
    """For the rate, and for the questions that wait for upstream: one host has a /64 to choose its address from."""
    upstream.script = silent
    timing = limits(rate_window_s=60.0)
    async with running(VIEW, upstream.port, rate_limit=4, max_in_flight=8, timing=timing) as server:

        def ask(host: str, packet: bytes) -> list[bytes]:
            replies: list[bytes] = []
            server._resolver.handle(packet, packed(host), lambda reply, _: replies.append(reply), None, True)
            return replies

        for n in range(2):
            assert ask(f"fd00::{n + 1}", query(f"n{n}.example.test")) == []
        assert read(ask("fd00::3", query("n3.example.test"))[0]).rcode() == dns.rcode.REFUSED  # two wait already
        assert ask("fd00:0:0:1::3", query("n3.example.test")) == []
        assert addresses(ask("fd00::4", query(ADDRESS))[0]) == ["10.0.0.9"]
        assert read(ask("fd00::5", query(ADDRESS))[0]).rcode() == dns.rcode.REFUSED
        assert addresses(ask("fd00:0:0:1::5", query(ADDRESS))[0]) == ["10.0.0.9"]
        assert server.metrics.queries[Outcome.LIMITED] == 1


async def test_no_reply_over_udp_is_longer_than_the_limit(upstream: Authority) -> None:
    upstream.records["six.example.test", "A"] = [f"192.0.2.{n}" for n in range(50)]
    async with running(VIEW, upstream.port, max_udp_reply=600) as server:
        with Client(address(server)) as client:
            for _ in range(2):
                reply = await client.ask(query("six.example.test", edns=opt(4096)))
                assert read(reply).flags & dns.flags.TC
                assert len(reply) < 100


# No relay is alive.


async def test_the_last_relays_are_answered_for_a_while_if_configured_so() -> None:
    async with running(VIEW, stale_relays_for_s=0.3) as server:
        with Client(address(server)) as client:
            server.apply(mesh())
            reply = await client.ask(query(ADDRESS, edns=opt()))
            assert addresses(reply) == ["10.0.0.9"]
            assert [int(found.code) for found in read(reply).options] == [3]
            async with asyncio.timeout(5):
                while read(reply := await client.ask(query(ADDRESS))).rcode() != dns.rcode.SERVFAIL:
                    assert addresses(reply) == ["10.0.0.9"]
            server.apply(VIEW)
            reply = await client.ask(query(ADDRESS, edns=opt()))
            assert (addresses(reply), read(reply).options) == (["10.0.0.9"], ())


@pytest.mark.parametrize("name", [ADDRESS, "p8443-10-1-0-5.b.svc.mesh.INTERNAL"])
@pytest.mark.parametrize("first", [Qtype.A, Qtype.AAAA])
async def test_both_halves_of_a_pair_are_answered_from_one_table(name: str, first: Qtype) -> None:
    """Relays of one family give way to relays of the other between the two packets of one client."""
    second = Qtype.AAAA if first is Qtype.A else Qtype.A
    old, new = ("fd00::9", "10.0.0.9") if first is Qtype.A else ("10.0.0.9", "fd00::9")
    async with running(mesh(relay(old)), timing=limits(pair_s=30)) as server:
        with Client(address(server)) as client, Client(address(server), "127.0.0.2") as other:
            assert addresses(await client.ask(query(name, first))) == []
            server.apply(mesh(relay(new)))
            # Every question gets the new address, except this client's other half.
            assert addresses(await other.ask(query(name, first))) == [new]
            assert addresses(await client.ask(query(name, second))) == [old]
            assert addresses(await client.ask(query(name, second))) == []
            assert addresses(await client.ask(query(name, first))) == [new]
