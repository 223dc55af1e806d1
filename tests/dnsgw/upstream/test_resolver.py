"""Upstream's answers from the cache and asked again; and alias chains from upstream that lead to our names."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import dns.message
import dns.rcode
import dns.rrset
import pytest

from discovery.model.imports import Imports
from discovery.model.mesh import Deletion, Kind
from dnsgw import Outcome
from dnsgw.message.question import Qtype
from dnsgw.resolver import ResolverLimits
from dnsgw.server import ServerTiming
from dnsgw.upstream.cache import CacheConfig
from tests.support.dns_authority import Asked, Authority, serving
from tests.support.dns_meshes import DOMAIN, ORDERS, imports, mesh, relay, service
from tests.support.dns_packets import opt, option, query
from tests.support.dns_servers import Client, address, connected, running

pytestmark = pytest.mark.anyio

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
VIEW = mesh(relay("10.0.0.9"))
WWW = "www.example.test"
LONG_FAILURES = ServerTiming(resolver=ResolverLimits(failure_ttl_s=60.0))
"""A failure is remembered for longer than a test takes on a slow machine."""


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving({(WWW, "A"): ["192.0.2.1"], (WWW, "AAAA"): ["2001:db8::1"]}) as authority:
        yield authority


def read(reply: bytes) -> dns.message.Message:
    return dns.message.from_wire(reply)


def answers(reply: bytes) -> list[str]:
    return [str(rrset) for rrset in read(reply).answer]


def with_ttl(ttl: int) -> Callable[[Asked], list[bytes]]:
    return lambda asked: [asked.answer.replace((300).to_bytes(4, "big"), ttl.to_bytes(4, "big"))]


def errors(reply: bytes) -> list[int]:
    return [int(option.code) for option in read(reply).options if option.otype == 15]


async def test_upstream_is_asked_once(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        with Client(address(server)) as client:
            for packet in (query(WWW), query(WWW.upper()), query(WWW, edns=opt()), query(WWW)):
                (answer,) = answers(await client.ask(packet))
                assert answer.lower().endswith(" in a 192.0.2.1")
            assert len(answers(await connection.ask(query(WWW)))) == 1
        assert len(upstream.asked) == 1
        counts = server.metrics.queries
        assert (counts[Outcome.FORWARDED], counts[Outcome.CACHED]) == (1, 4)
        assert server.metrics.cache_entries() == 1


async def test_a_name_that_becomes_ours_is_ours_at_once(upstream: Authority) -> None:
    name = "new.shop.svc.cluster.local"
    upstream.records[name, "A"] = ["192.0.2.7"]
    async with running(VIEW, upstream.port, imports=imports()) as server:
        with Client(address(server)) as client:
            for _ in range(3):
                assert answers(await client.ask(query(name)))[0].endswith("192.0.2.7")
            server.apply(VIEW.apply([service("b", name, 443)]))
            assert answers(await client.ask(query(name)))[0].endswith("10.0.0.9")
            server.apply(VIEW)
            assert answers(await client.ask(query(name)))[0].endswith("192.0.2.7")


async def test_the_last_good_answer_when_upstream_gives_none(upstream: Authority) -> None:
    """RFC 8767: after the end of its life, with a short TTL, and upstream is not asked again for a while."""
    upstream.script = with_ttl(1)
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            assert answers(await client.ask(query(WWW))) == [f"{WWW}. 1 IN A 192.0.2.1"]
            upstream.script = lambda asked: [asked.answer[:3] + b"\x82" + asked.answer[4:]]
            async with asyncio.timeout(10):
                while not errors(reply := await client.ask(query(WWW, edns=opt()))):
                    assert answers(reply)
            assert answers(reply) == [f"{WWW}. 30 IN A 192.0.2.1"]
            assert errors(reply) == [3]
            count = len(upstream.asked)
            assert answers(await client.ask(query(WWW))) == [f"{WWW}. 30 IN A 192.0.2.1"]
            assert len(upstream.asked) == count
        assert server.metrics.queries[Outcome.STALE] == 2


@pytest.mark.parametrize("said", ["cut", "something else"])
async def test_an_unusable_answer_counts_as_none(upstream: Authority, said: str) -> None:
    """The last good answer is given in its place, or the failure is remembered, as after silence."""

    def useless(asked: Asked) -> list[bytes]:
        reply = dns.message.from_wire(asked.answer)
        reply.answer = [dns.rrset.from_text("bank.test.", 300, "IN", "A", "192.0.2.66")]
        return [asked.answer[:-1] if said == "cut" else reply.to_wire()]

    upstream.script = with_ttl(1)
    async with running(VIEW, upstream.port, timing=LONG_FAILURES) as server:
        with Client(address(server)) as client:
            assert answers(await client.ask(query(WWW)))
            upstream.script = useless
            async with asyncio.timeout(10):
                while not errors(reply := await client.ask(query(WWW, edns=opt()))):
                    assert answers(reply)
            assert (answers(reply), errors(reply)) == ([f"{WWW}. 30 IN A 192.0.2.1"], [3])
            count = len(upstream.asked)
            for _ in range(3):
                assert errors(await client.ask(query("mail.example.test", edns=opt()))) == [23]
            assert len(upstream.asked) == count + 1


async def test_no_stale_answers_if_configured_so(upstream: Authority) -> None:
    upstream.script = with_ttl(1)
    async with running(VIEW, upstream.port, cache=CacheConfig(stale_for_s=0)) as server:
        with Client(address(server)) as client:
            assert answers(await client.ask(query(WWW)))
            upstream.script = lambda asked: [asked.answer[:3] + b"\x82" + asked.answer[4:]]
            async with asyncio.timeout(10):
                while read(reply := await client.ask(query(WWW))).rcode() != dns.rcode.SERVFAIL:
                    assert answers(reply)


async def test_a_failure_is_not_asked_for_again_at_once(upstream: Authority) -> None:
    """RFC 9520."""
    upstream.script = lambda asked: [asked.answer[:3] + b"\x82" + asked.answer[4:]]
    async with running(VIEW, upstream.port, timing=LONG_FAILURES) as server:
        with Client(address(server)) as client:
            for _ in range(3):
                assert read(await client.ask(query(WWW))).rcode() == dns.rcode.SERVFAIL
        assert len(upstream.asked) == 1


async def test_an_answer_in_use_is_asked_for_again_before_it_expires(upstream: Authority) -> None:
    async with running(VIEW, upstream.port, cache=CacheConfig(prefetch_share=1.0)) as server:
        with Client(address(server)) as client:
            for _ in range(4):
                assert answers(await client.ask(query(WWW)))
            await upstream.heard(2)
        assert server.metrics.prefetched >= 1


async def test_without_room_everything_is_asked_for(upstream: Authority) -> None:
    async with running(VIEW, upstream.port, cache=CacheConfig(max_bytes=0)) as server:
        with Client(address(server)) as client:
            for count in range(1, 4):
                assert answers(await client.ask(query(WWW)))
                assert len(upstream.asked) == count


@pytest.mark.parametrize("cut", [10, 1])
async def test_an_answer_that_is_malformed_is_a_failure(upstream: Authority, cut: int) -> None:
    upstream.script = lambda asked: [asked.answer[:-cut]]
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            reply = await client.ask(query(WWW, edns=opt()))
            assert read(reply).rcode() == dns.rcode.SERVFAIL
            assert errors(reply) == [23]


async def test_a_truncated_answer_may_end_anywhere(upstream: Authority) -> None:
    upstream.script = lambda asked: [asked.answer[:2] + b"\x83" + asked.answer[3:-10]]
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            assert read(await client.ask(query(WWW))).flags & 0x0200


@pytest.mark.parametrize("more", [False, True], ids=["only", "beside"])
async def test_answers_to_other_names_are_neither_passed_on_nor_kept(upstream: Authority, more: bool) -> None:
    """RFC 2181 section 5.4.1, RFC 5452 section 6: here for the name asked for itself, and in the answer to it."""

    def lying(asked: Asked) -> list[bytes]:
        reply = dns.message.from_wire(asked.answer)
        bank = dns.rrset.from_text("bank.test.", 300, "IN", "A", "192.0.2.66")
        reply.answer = [*reply.answer, bank] if more else [bank]
        reply.authority.append(bank)
        reply.additional.append(bank)
        return [reply.to_wire()]

    upstream.script = lying
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            for _ in range(2):  # the second time from the cache, if there is anything to keep
                reply = await client.ask(query(WWW, edns=opt()))
                assert b"bank" not in reply
                assert answers(reply) == ([f"{WWW}. 300 IN A 192.0.2.1"] if more else [])
                assert errors(reply) == ([] if more else [23])
            upstream.script = None
            assert read(await client.ask(query("bank.test"))).rcode() == dns.rcode.NXDOMAIN


async def test_unknown_types_are_passed_on_unchanged(upstream: Authority) -> None:
    """RFC 3597: neither looked into nor compressed, from upstream and from the cache."""
    content = b"\xc0\x0c\xff\x00\x01"

    def unknown(asked: Asked) -> list[bytes]:
        head = asked.packet[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + asked.question
        return [head + b"\xc0\x0c" + bytes.fromhex("ff00 0001 0000012c 0005") + content]

    upstream.script = unknown
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            for _ in range(2):
                (rrset,) = read(await client.ask(query(WWW, 0xFF00))).answer
                assert rrset[0].to_generic().data == content
        assert len(upstream.asked) == 1


async def test_an_address_of_a_relay_elsewhere_is_an_address(upstream: Authority) -> None:
    upstream.records[WWW, "A"] = ["10.0.0.9"]
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            assert answers(await client.ask(query(WWW))) == [f"{WWW}. 300 IN A 10.0.0.9"]


async def test_a_clients_subnet_is_forwarded_and_its_answer_is_not_shared(upstream: Authority) -> None:
    """RFC 7871, where it is passed on at all."""
    subnet = option(8, bytes.fromhex("0001 18 00 c00002"))
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            assert answers(await client.ask(query(WWW, edns=opt(options=subnet))))
            assert subnet not in upstream.asked[0].packet
            assert answers(await client.ask(query(WWW)))
            assert len(upstream.asked) == 1
    upstream.asked.clear()
    async with running(VIEW, upstream.port, client_subnet=True) as server:
        with Client(address(server)) as client:
            for count in range(1, 3):
                assert answers(await client.ask(query(WWW, edns=opt(options=subnet))))
                assert upstream.asked[-1].packet.endswith(subnet)
                assert len(upstream.asked) == count
            assert answers(await client.ask(query(WWW)))
            assert len(upstream.asked) == 3


# Aliases.


@pytest.mark.parametrize("there", [False, True], ids=["upstream lacks the name", "upstream has another address for it"])
@pytest.mark.parametrize("tcp", [False, True], ids=["UDP", "TCP"])
async def test_a_chain_that_leads_to_us_ends_at_the_relay(upstream: Authority, there: bool, tcp: bool) -> None:
    upstream.records["shop.example.test", "CNAME"] = ["front.example.test"]
    upstream.records["front.example.test", "CNAME"] = [ADDRESS]
    if there:
        upstream.records[ADDRESS, "A"] = ["10.1.0.5"]
    expected = ["shop.example.test. 300 IN CNAME front.example.test.", f"front.example.test. 300 IN CNAME {ADDRESS}."]
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        with Client(address(server)) as client:
            asker = connection if tcp else client
            for _ in range(2):
                reply = await asker.ask(query("shop.example.test", edns=opt()))
                assert answers(reply) == [*expected, f"{ADDRESS}. 5 IN A 10.0.0.9"]
                assert read(reply).rcode() == dns.rcode.NOERROR
                for qtype in (Qtype.AAAA, Qtype.HTTPS):
                    nodata = await asker.ask(query("shop.example.test", qtype))
                    assert (answers(nodata), len(read(nodata).authority)) == (expected, 1)
                    assert read(nodata).rcode() == dns.rcode.NOERROR


async def test_a_chain_to_a_name_under_the_domain_that_is_not_there(upstream: Authority) -> None:
    upstream.records["shop.example.test", "CNAME"] = [f"p1-10-1-0-5.nope.{DOMAIN}"]
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            reply = await client.ask(query("shop.example.test", edns=opt()))
            assert read(reply).rcode() == dns.rcode.NXDOMAIN  # RFC 6604: it is that of the last name
            assert len(answers(reply)) == 1
            assert errors(reply) == [0]


async def test_a_chain_to_an_import_asks_upstream_first_where_that_is_so(upstream: Authority) -> None:
    upstream.records["shop.example.test", "CNAME"] = [ORDERS]
    async with running(VIEW, upstream.port, imports=imports("local"), ttl_s=0) as server:
        with Client(address(server)) as client:
            assert answers(await client.ask(query("shop.example.test")))[1].endswith("IN A 10.0.0.9")
            upstream.records[ORDERS, "A"] = ["192.0.2.7"]
            # Upstream's answer for the chain is kept, and with it the end that it had.
            assert answers(await client.ask(query("shop.example.test")))[1].endswith("IN A 192.0.2.7")
            assert answers(await client.ask(query(ORDERS)))[0].endswith("IN A 192.0.2.7")


@pytest.mark.parametrize("qtype", [Qtype.CNAME, Qtype.ANY])
@pytest.mark.parametrize("target", [ADDRESS, f"p1-10-1-0-5.nope.{DOMAIN}"])
async def test_a_question_for_the_alias_itself_is_not_followed(upstream: Authority, qtype: Qtype, target: str) -> None:
    alias = dns.rrset.from_text("shop.example.test.", 300, "IN", "CNAME", target + ".")

    def answer(asked: Asked) -> list[bytes]:
        reply = dns.message.make_response(asked.message)
        reply.answer.append(alias)
        return [reply.to_wire()]

    upstream.script = answer
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            for _ in range(3):
                reply = read(await client.ask(query("shop.example.test", qtype)))
                assert (reply.rcode(), reply.answer, reply.authority) == (dns.rcode.NOERROR, [alias], [])


async def test_a_chain_that_leads_elsewhere_is_left_alone(upstream: Authority) -> None:
    upstream.records["shop.example.test", "CNAME"] = [WWW]
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            for _ in range(3):
                assert answers(await client.ask(query("shop.example.test"))) == [
                    f"shop.example.test. 300 IN CNAME {WWW}.",
                    f"{WWW}. 300 IN A 192.0.2.1",
                ]
        assert len(upstream.asked) == 1


# Names that change hands.


def lives_long(asked: Asked) -> list[bytes]:
    """Upstream's NXDOMAIN is valid for five minutes."""
    return [asked.answer.replace(b"\0\0\0\x3c", b"\0\0\x01\x2c")]


@pytest.mark.parametrize("prefer", ["local", "remote"])
@pytest.mark.parametrize("by", ["discovery", "configuration"])
@pytest.mark.parametrize("asked_before", [False, True], ids=["", "asked for while it was away"])
async def test_a_service_that_moves_here_is_found_here_at_once(
    upstream: Authority, prefer: str, by: str, asked_before: bool
) -> None:
    """A former NXDOMAIN of upstream with a long TTL does not count any more."""
    upstream.records["shop.example.test", "CNAME"] = [ORDERS]
    upstream.script = lives_long
    away = VIEW.apply([Deletion((Kind.SERVICE, "b", ORDERS), 9)])
    rules = imports(prefer)
    config = {"imports": Imports() if by == "configuration" else rules}

    async def become(ours: bool) -> None:
        if by == "discovery":
            server.apply(VIEW if ours else away)
        else:
            server.reconfigure(replace(server.config, imports=rules if ours else Imports()))

    async with running(away if by == "discovery" else VIEW, upstream.port, **config) as server:  # type: ignore[arg-type]
        with Client(address(server)) as client:
            for name in (ORDERS, "shop.example.test"):
                for _ in range(3):  # heard, kept, and answered at once
                    assert read(await client.ask(query(name))).rcode() == dns.rcode.NXDOMAIN
            await become(ours=True)
            if asked_before:
                for name in (ORDERS, "shop.example.test"):
                    assert answers(await client.ask(query(name)))[-1].endswith(" 10.0.0.9")
            upstream.records[ORDERS, "A"] = ["192.0.2.7"]
            await become(ours=False)
            for name in (ORDERS, "shop.example.test"):
                assert answers(await client.ask(query(name)))[-1].endswith(" 192.0.2.7")


async def test_unrelated_changes_flush_nothing(upstream: Authority) -> None:
    async with running(VIEW, upstream.port, imports=imports()) as server:
        with Client(address(server)) as client:
            assert answers(await client.ask(query(WWW)))
            server.apply(VIEW.apply([service("b", "new.shop.svc.cluster.local", 443), relay("10.0.0.8")]))
            assert answers(await client.ask(query(WWW)))
        assert len(upstream.asked) == 1


# Service bindings (RFC 9460), and what comes with an answer.

LEAK = "alpn=h3,h2 port=8443 ipv4hint=10.1.0.5 ipv6hint=fd00:b::5"


@pytest.mark.parametrize("edns", [b"", opt(), opt(do=True)], ids=["plain", "EDNS", "DO"])
@pytest.mark.parametrize("rdtype", ["HTTPS", "SVCB"])
@pytest.mark.parametrize("target", [ADDRESS, ORDERS, f"nope.{DOMAIN}", ADDRESS.upper()])
async def test_a_binding_to_a_name_of_ours_is_withheld(
    upstream: Authority, target: str, rdtype: str, edns: bytes
) -> None:
    upstream.records[WWW, rdtype] = [f"1 cdn.example.test. {LEAK}", f"2 {target}. {LEAK}"]
    async with running(VIEW, upstream.port, imports=imports()) as server:
        with Client(address(server)) as client:
            for _ in range(3):
                reply = await client.ask(query(WWW, Qtype[rdtype], edns=edns))
                assert bytes((10, 1, 0, 5)) not in reply
                nodata = read(reply)
                assert (nodata.rcode(), nodata.answer, len(nodata.authority)) == (dns.rcode.NOERROR, [], 1)
                assert errors(reply) == ([4] if edns else [])
            assert answers(await client.ask(query(WWW))) == [f"{WWW}. 300 IN A 192.0.2.1"]
        assert len(upstream.asked) == 2


@pytest.mark.parametrize(
    "record",
    [
        f"0 {ADDRESS}.",  # an alias: whoever follows it asks us
        f"1 . {LEAK}",
        f"1 cdn.example.test. {LEAK}",
        f"1 {ADDRESS}.example.test. {LEAK}",
    ],
)
async def test_other_bindings_are_left_alone(upstream: Authority, record: str) -> None:
    upstream.records[WWW, "HTTPS"] = [record]
    async with running(VIEW, upstream.port, imports=imports()) as server:
        with Client(address(server)) as client:
            for _ in range(3):
                reply = await client.ask(query(WWW, Qtype.HTTPS))
                assert upstream.asked[0].answer[34:].startswith(reply[34:])
                assert len(reply) > 40
                assert read(reply).question == read(query(WWW, Qtype.HTTPS)).question


@pytest.mark.parametrize("where", ["nowhere", "upstream", "failing"])
async def test_a_binding_to_an_import_that_upstream_has_first(upstream: Authority, where: str) -> None:
    upstream.records[WWW, "HTTPS"] = [f"1 {ORDERS}. {LEAK}", f"2 bills.shop.svc.cluster.local. {LEAK}"]
    if where == "upstream":
        upstream.records[ORDERS, "A"] = ["192.0.2.7"]
        upstream.records["bills.shop.svc.cluster.local", "AAAA"] = ["2001:db8::7"]
    elif where == "failing":
        upstream.script = lambda asked: [
            asked.answer if asked.name == WWW else asked.answer[:3] + b"\x82" + asked.answer[4:]
        ]
    async with running(VIEW, upstream.port, imports=imports("local")) as server:
        with Client(address(server)) as client:
            for _ in range(3):
                reply = await client.ask(query(WWW, Qtype.HTTPS, edns=opt()))
                assert (bytes((10, 1, 0, 5)) in reply) == (where == "upstream")
                assert errors(reply) == {"nowhere": [4], "upstream": [], "failing": [22]}[where]
                assert read(reply).rcode() == (dns.rcode.SERVFAIL if where == "failing" else dns.rcode.NOERROR)


@pytest.mark.parametrize("edns", [b"", opt()], ids=["plain", "EDNS"])
@pytest.mark.parametrize("target", [ADDRESS, ORDERS, "www.example.test"])
async def test_addresses_of_other_names_do_not_come_along(upstream: Authority, target: str, edns: bytes) -> None:
    """A server that is helpful adds the addresses of the target, which for a name of ours lead past the relay."""

    def helpful(asked: Asked) -> list[bytes]:
        reply = dns.message.from_wire(asked.answer)
        reply.additional.append(dns.rrset.from_text(f"{target}.", 300, "IN", "A", "10.1.0.5"))
        return [reply.to_wire()]

    upstream.records["_api._tcp.example.test", "SRV"] = [f"0 0 8443 {target}."]
    upstream.script = helpful
    async with running(VIEW, upstream.port, imports=imports()) as server:
        with Client(address(server)) as client:
            reply = read(await client.ask(query("_api._tcp.example.test", Qtype.SRV, edns=edns)))
            assert [str(item) for item in reply.answer[0]] == [f"0 0 8443 {target}."]
            assert reply.additional == []
            assert reply.edns == (0 if edns else -1)


@pytest.mark.parametrize("prefer", ["local", "remote"])
@pytest.mark.parametrize("name", ["shop.svc.cluster.local", "depot.example", "mesh.internal", "internal"])
async def test_names_above_ours_exist_whatever_upstream_says(upstream: Authority, name: str, prefer: str) -> None:
    """RFC 8020: NXDOMAIN would deny the names below as well."""
    upstream.records["alias.example.test", "CNAME"] = [name]
    async with running(VIEW, upstream.port, imports=imports(prefer)) as server:
        with Client(address(server)) as client:
            for _ in range(3):  # upstream's, and from the cache
                for qtype in (Qtype.A, Qtype.AAAA, 16, Qtype.NS):
                    reply = read(await client.ask(query(name, qtype)))
                    assert (reply.rcode(), reply.answer, len(reply.authority)) == (dns.rcode.NOERROR, [], 1)
            reply = read(await client.ask(query("alias.example.test")))
            assert reply.rcode() == dns.rcode.NOERROR
            assert len(reply.answer) == 1
            assert read(await client.ask(query("other." + name))).rcode() == dns.rcode.NXDOMAIN
        assert name in {asked.name for asked in upstream.asked}


async def test_records_of_upstream_at_a_name_above_ours_are_upstreams(upstream: Authority) -> None:
    upstream.records["shop.svc.cluster.local", "A"] = ["192.0.2.7"]
    async with running(VIEW, upstream.port, imports=imports("remote")) as server:
        with Client(address(server)) as client:
            for _ in range(3):
                (answer,) = answers(await client.ask(query("shop.svc.cluster.local")))
                assert answer.endswith("192.0.2.7")


async def test_a_cached_denial_ends_when_a_name_below_appears(upstream: Authority) -> None:
    async with running(mesh(relay("10.0.0.9")), upstream.port, imports=imports("remote")) as server:
        with Client(address(server)) as client:
            empty = VIEW.apply([Deletion((Kind.SERVICE, "c", "stock.depot.example"), 9)])
            for view, rcode in ((empty, 3), (VIEW, 0), (empty, 3), (VIEW, 0)):
                server.apply(view)
                for _ in range(4):
                    assert read(await client.ask(query("depot.example"))).rcode() == rcode
