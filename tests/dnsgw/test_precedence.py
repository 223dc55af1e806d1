"""Imported names for which upstream has precedence: who answers, with a real upstream."""

from collections.abc import AsyncIterator
from typing import Any

import dns.message
import dns.rcode
import pytest

from dnsgw.message.question import Qtype
from tests.support.dns_authority import Asked, Authority, Script, serving
from tests.support.dns_meshes import ORDERS, imports, mesh, relay
from tests.support.dns_packets import header, opt, query
from tests.support.dns_servers import Client, address, connected, running

pytestmark = pytest.mark.anyio

VIEW = mesh(relay("10.0.0.9", "fd00::9"))


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving({("www.example.test", "A"): ["192.0.2.1"]}) as authority:
        yield authority


def read(reply: bytes) -> dns.message.Message:
    return dns.message.from_wire(reply)


def addresses(reply: bytes) -> list[str]:
    return [str(item) for rrset in read(reply).answer for item in rrset]


def error(reply: bytes) -> tuple[int, str]:
    (extended,) = read(reply).extended_errors()
    return int(extended.code), extended.text or ""


def silent(asked: Asked) -> list[bytes]:
    return []


def denying(asked: Asked) -> list[bytes]:
    """NXDOMAIN for every type that a name lacks, as many servers have it."""
    answer = asked.answer
    return [answer if answer[7] else answer[:3] + bytes((answer[3] & 0xF0 | dns.rcode.NXDOMAIN,)) + answer[4:]]


def denying_aaaa(asked: Asked) -> list[bytes]:
    """The same for AAAA only, as load balancers and IPv4-only filters have it."""
    return denying(asked) if asked.rdtype == "AAAA" else [asked.answer]


STYLES = {"NODATA": None, "NXDOMAIN": denying, "NXDOMAIN for AAAA": denying_aaaa}

LOCAL: dict[str, Any] = {"imports": imports("local")}


async def asked_both(client: Client, name: str) -> dict[str, list[str]]:
    """Ask for A and AAAA at once, as libc does, and give the addresses of each."""
    client.send(query(name, Qtype.A, ident=1))
    client.send(query(name, Qtype.AAAA, ident=2))
    replies = {reply[1]: reply for reply in (await client.receive(), await client.receive())}
    assert {reply[3] & 15 for reply in replies.values()} == {0}
    for reply in replies.values():
        assert addresses(reply) or len(read(reply).authority) == 1
    return {"A": addresses(replies[1]), "AAAA": addresses(replies[2])}


UPSTREAM_HAS = {
    "nothing": ({}, {"A": ["10.0.0.9"], "AAAA": ["fd00::9"]}),
    "both": (
        {(ORDERS, "A"): ["192.0.2.7"], (ORDERS, "AAAA"): ["2001:db8::7"]},
        {"A": ["192.0.2.7"], "AAAA": ["2001:db8::7"]},
    ),
    "A only": ({(ORDERS, "A"): ["192.0.2.7"]}, {"A": ["192.0.2.7"], "AAAA": []}),
    "AAAA only": ({(ORDERS, "AAAA"): ["2001:db8::7"]}, {"A": [], "AAAA": ["2001:db8::7"]}),
    "another type only": ({(ORDERS, "TXT"): ["x"]}, {"A": ["10.0.0.9"], "AAAA": ["fd00::9"]}),
    "names below only": ({("x." + ORDERS, "A"): ["192.0.2.7"]}, {"A": ["10.0.0.9"], "AAAA": ["fd00::9"]}),
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize(("records", "expected"), UPSTREAM_HAS.values(), ids=UPSTREAM_HAS)
async def test_a_name_is_upstreams_or_ours_for_both_halves_of_a_pair(
    upstream: Authority, records: dict[tuple[str, str], list[str]], expected: dict[str, list[str]], style: Script | None
) -> None:
    upstream.records.update(records)
    upstream.script = style
    async with running(VIEW, upstream.port, **LOCAL) as server:
        with Client(address(server)) as client:
            assert await asked_both(client, ORDERS) == expected
            assert await asked_both(client, ORDERS) == expected  # by what is remembered
            assert await asked_both(client, ORDERS.upper()) == expected
        assert all(upstream.types_asked(ORDERS).count(rdtype) <= 4 for rdtype in ("A", "AAAA"))


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize(("records", "expected"), UPSTREAM_HAS.values(), ids=UPSTREAM_HAS)
@pytest.mark.parametrize("first", ["A", "AAAA"])
async def test_it_does_not_matter_which_half_comes_first(
    upstream: Authority,
    records: dict[tuple[str, str], list[str]],
    expected: dict[str, list[str]],
    first: str,
    style: Script | None,
) -> None:
    upstream.records.update(records)
    upstream.script = style
    second = "AAAA" if first == "A" else "A"
    async with running(VIEW, upstream.port, **LOCAL) as server:
        with Client(address(server)) as client:
            for rdtype in (first, second):
                assert addresses(await client.ask(query(ORDERS, Qtype[rdtype]))) == expected[rdtype]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize(("records", "expected"), UPSTREAM_HAS.values(), ids=UPSTREAM_HAS)
@pytest.mark.parametrize("qtype", [Qtype.HTTPS, Qtype.SRV, 16])
async def test_other_types_follow_the_addresses(
    upstream: Authority,
    records: dict[tuple[str, str], list[str]],
    expected: dict[str, list[str]],
    qtype: int,
    style: Script | None,
) -> None:
    upstream.records.update(records)
    upstream.script = style
    ours = expected["A"] == ["10.0.0.9"]
    async with running(VIEW, upstream.port, **LOCAL) as server:
        with Client(address(server)) as client:
            for _ in range(2):
                reply = await client.ask(query(ORDERS, qtype))
                assert bool(read(reply).answer) == (ours and qtype == Qtype.SRV)
            # Both addresses and the question itself: the second time all is known, if upstream's answers can be.
            assert len(upstream.asked) <= 3 or (style is not None and len(upstream.asked) <= 5)
        assert ours or Qtype(1).name in upstream.types_asked(ORDERS)


async def test_a_name_that_appears_upstream_is_upstreams_within_a_ttl(upstream: Authority) -> None:
    async with running(VIEW, upstream.port, **LOCAL, ttl_s=0) as server:
        with Client(address(server)) as client:
            assert addresses(await client.ask(query(ORDERS))) == ["10.0.0.9"]
            upstream.records[ORDERS, "A"] = ["192.0.2.7"]
            assert addresses(await client.ask(query(ORDERS))) == ["192.0.2.7"]
            del upstream.records[ORDERS, "A"]
            assert addresses(await client.ask(query(ORDERS))) == ["10.0.0.9"]


async def test_a_name_that_upstream_loses_is_ours_within_a_ttl(upstream: Authority) -> None:
    upstream.records[ORDERS, "A"] = ["192.0.2.7"]
    async with running(VIEW, upstream.port, **LOCAL, ttl_s=0) as server:
        with Client(address(server)) as client:
            assert addresses(await client.ask(query(ORDERS))) == ["192.0.2.7"]
            del upstream.records[ORDERS, "A"]
            assert addresses(await client.ask(query(ORDERS))) == ["10.0.0.9"]


async def test_an_alias_upstream_is_a_name_upstream(upstream: Authority) -> None:
    upstream.records[ORDERS, "CNAME"] = ["gone.example.test"]
    async with running(VIEW, upstream.port, **LOCAL) as server:
        with Client(address(server)) as client:
            reply = read(await client.ask(query(ORDERS)))
            assert [str(rrset) for rrset in reply.answer] == [f"{ORDERS}. 300 IN CNAME gone.example.test."]


@pytest.mark.parametrize("rcode", [2, 5])
async def test_where_upstream_fails_nothing_is_made_up(upstream: Authority, rcode: int) -> None:
    upstream.script = lambda asked: [asked.packet[:2] + header(flags=0x8180 | rcode)[2:] + asked.question]
    async with running(VIEW, upstream.port, **LOCAL) as server:
        with Client(address(server)) as client:
            assert (await client.ask(query(ORDERS)))[3] & 15 == rcode
            assert (await client.ask(query(ORDERS, Qtype.HTTPS)))[3] & 15 == dns.rcode.SERVFAIL


async def test_where_upstream_knows_but_half_nothing_is_made_up(upstream: Authority) -> None:
    upstream.records["x." + ORDERS, "A"] = ["192.0.2.7"]  # so that the name itself is NODATA

    def fail_for_aaaa(asked: Asked) -> list[bytes]:
        failed = asked.packet[:2] + header(flags=0x8182)[2:] + asked.question
        return [failed if asked.rdtype == "AAAA" else asked.answer]

    upstream.script = fail_for_aaaa
    async with running(VIEW, upstream.port, **LOCAL) as server:
        with Client(address(server)) as client:
            reply = await client.ask(query(ORDERS, edns=opt()))
            assert reply[3] & 15 == dns.rcode.SERVFAIL
            assert error(reply) == (22, "upstream does not say whether it has this name")


async def test_where_upstream_denies_one_half_and_fails_for_the_other_nothing_is_made_up(upstream: Authority) -> None:
    def fail_for_a(asked: Asked) -> list[bytes]:
        failed = asked.packet[:2] + header(flags=0x8182)[2:] + asked.question
        return [failed] if asked.rdtype == "A" else [asked.answer]

    upstream.script = fail_for_a
    async with running(VIEW, upstream.port, **LOCAL) as server:
        with Client(address(server)) as client:
            assert (await client.ask(query(ORDERS, Qtype.AAAA)))[3] & 15 == dns.rcode.SERVFAIL


async def test_a_name_of_upstream_has_no_nxdomain(upstream: Authority) -> None:
    """musl takes it for the whole name."""
    upstream.records[ORDERS, "A"] = ["192.0.2.7"]
    upstream.script = denying
    async with running(VIEW, upstream.port, **LOCAL) as server:
        with Client(address(server)) as client:
            for qtype in (Qtype.AAAA, 16, Qtype.A, Qtype.AAAA, 16, Qtype.HTTPS):
                reply = read(await client.ask(query(ORDERS, qtype)))
                assert reply.rcode() == dns.rcode.NOERROR
                assert bool(reply.answer) == (qtype == Qtype.A)


async def test_with_prefer_remote_upstream_is_not_asked(upstream: Authority) -> None:
    upstream.records[ORDERS, "A"] = ["192.0.2.7"]
    async with running(VIEW, upstream.port, imports=imports("remote")) as server:
        with Client(address(server)) as client:
            assert await asked_both(client, ORDERS) == {"A": ["10.0.0.9"], "AAAA": ["fd00::9"]}
        assert not upstream.asked


@pytest.mark.parametrize("name", ["nobody.shop.svc.cluster.local", "www.example.test", "x." + ORDERS])
async def test_a_name_that_is_not_imported_is_never_touched(upstream: Authority, name: str) -> None:
    async with running(VIEW, upstream.port, **LOCAL) as server:
        with Client(address(server)) as client:
            for qtype in (Qtype.A, Qtype.HTTPS):
                reply = await client.ask(query(name, qtype))
                assert read(reply).rcode() == read(upstream.asked[-1].answer).rcode()
                assert read(reply).authority == read(upstream.asked[-1].answer).authority
        assert len(upstream.asked) == 2


async def test_an_import_over_tcp_asks_upstream_over_tcp(upstream: Authority) -> None:
    async with running(VIEW, upstream.port, **LOCAL) as server, connected(server) as connection:
        assert addresses(await connection.ask(query(ORDERS))) == ["10.0.0.9"]
        assert all(asked.tcp for asked in upstream.asked)
