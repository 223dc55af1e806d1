"""The table's answers, read by dnspython."""

import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Mesh
from dnsgw.mesh_zone.local_zones import LocallyServedZones
from dnsgw.mesh_zone.zone import MAX_ADDRESSES, Disposition, Table
from dnsgw.message.question import BadQuery, Qtype, scan, wire_name
from dnsgw.message.reply import Answer
from tests.support.dns_meshes import DOMAIN, ORDERS, imports, mesh, relay, service
from tests.support.dns_packets import opt, query

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
SOA = f"{DOMAIN}. 5 IN SOA {DOMAIN}. nobody.invalid. 8 3600 1200 604800 5"
TYPES = sorted(set(range(1, 260)) - {Qtype.AXFR, Qtype.IXFR} | {0, 32768, 65535})


def table(view: Mesh | None, rules: Imports | None = None) -> Table:
    return Table(view, imports=rules or Imports(), network="a", domain=DOMAIN, ttl_s=5)


V4 = table(mesh(relay("10.0.0.9")), imports())
BOTH = table(mesh(relay("10.0.0.9", "fd00::9")), imports())
NONE = table(mesh(), imports())


def ask(of: Table, name: str | bytes, qtype: int = Qtype.A) -> dns.message.Message:
    """Ask twice, since the second answer comes another way; both must be the same but for the order of addresses."""
    data = query(name, qtype, edns=opt())
    read = scan(data)
    decision = of.decide(read)
    assert isinstance(decision, Answer), decision
    reply = decision.reply(read, 1232)
    again = of.answer_at_once(data)
    if decision.rcode != dns.rcode.NXDOMAIN and again is not None:  # type: ignore[comparison-overlap]
        assert (again[:12], len(again)) == (reply[:12], len(reply))
    assert reply[12 : 12 + len(read.question)] == read.question
    return dns.message.from_wire(reply)


def records(message: dns.message.Message) -> list[str]:
    return [record for rrset in message.answer for record in str(rrset).split("\n")]


def why(message: dns.message.Message) -> str:
    (error,) = message.extended_errors()
    return error.text or ""


def is_nodata(message: dns.message.Message) -> bool:
    return message.rcode() == dns.rcode.NOERROR and not message.answer and len(message.authority) == 1


PRESENT = [
    f"_8443._10-1-0-5._b.{DOMAIN}",
    f"_8443._fd00--5._b.{DOMAIN}",
    f"_8443.orders.shop._b.{DOMAIN}",
    f"p8443-10-1-0-5.b.{DOMAIN}",
    f"p8443-x{'0' * 31}5.b.{DOMAIN}",
    f"p8443-orders.shop.b.{DOMAIN}",
    f"p8443-{ORDERS}.b.{DOMAIN}",
    f"p443-10-2-0-7.a.{DOMAIN}",  # the own network: by the relay as well
    ADDRESS.upper(),
    ORDERS,
    "stock.depot.example",
]


@pytest.mark.parametrize("name", PRESENT)
def test_every_form_of_a_name_leads_to_the_relays(name: str) -> None:
    assert records(ask(V4, name)) == [f"{name}. 5 IN A 10.0.0.9"]
    assert records(ask(BOTH, name)) == [f"{name}. 5 IN A 10.0.0.9"]
    assert records(ask(BOTH, name, Qtype.AAAA)) == [f"{name}. 5 IN AAAA fd00::9"]


@pytest.mark.parametrize("name", PRESENT)
def test_every_other_type_is_nodata_with_a_soa(name: str) -> None:
    for qtype in TYPES:
        if qtype not in (Qtype.A, Qtype.SRV, Qtype.ANY, Qtype.SOA):
            message = ask(V4, name, qtype)
            assert is_nodata(message), qtype
            assert message.authority[0].ttl == 5


def test_the_soa_is_the_zones() -> None:
    """Its owner must be at or above the name, or caches ignore it (RFC 2308)."""
    assert str(ask(V4, f"_8443.orders.shop._b.{DOMAIN}", Qtype.AAAA).authority[0]) == SOA
    assert str(ask(V4, f"x.nope.{DOMAIN}").authority[0]) == SOA
    assert str(ask(V4, ORDERS, Qtype.AAAA).authority[0]) == SOA.replace(DOMAIN, ORDERS, 1)


def test_the_zone_has_its_soa() -> None:
    assert records(ask(V4, DOMAIN, Qtype.SOA)) == [SOA]
    assert records(ask(V4, DOMAIN.upper(), Qtype.SOA)) == [SOA.replace(DOMAIN, DOMAIN.upper(), 1)]


@pytest.mark.parametrize("name", [DOMAIN, *PRESENT])
def test_any_is_one_record(name: str) -> None:
    (record,) = records(ask(V4, name, Qtype.ANY))
    assert record.endswith('5 IN HINFO "RFC8482" ""')


EMPTY = [
    DOMAIN,
    f"b.{DOMAIN}",
    f"_b.{DOMAIN}",
    f"a.{DOMAIN}",
    f"_a.{DOMAIN}",
    f"_10-1-0-5._b.{DOMAIN}",
    f"shop.b.{DOMAIN}",
    f"orders.shop._b.{DOMAIN}",
    f"shop._b.{DOMAIN}",
    f"orders.shop.b.{DOMAIN}",
]


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("qtype", [Qtype.A, Qtype.AAAA, Qtype.HTTPS, Qtype.SRV, 2, 16, 43])
@pytest.mark.parametrize("of", [V4, NONE], ids=["relay", "no relay"])
def test_names_above_names_are_nodata(of: Table, name: str, qtype: int) -> None:
    assert is_nodata(ask(of, name, qtype))


ABSENT = {
    f"p8443-10-1-0-5.nope.{DOMAIN}": "unknown_network: discovery knows no network 'nope'",
    f"nope.{DOMAIN}": "unknown_network: discovery knows no network 'nope'",
    f"_nope.{DOMAIN}": "unknown_network",
    f"x.y.nope.{DOMAIN}": "unknown_network",
    f"_8443.nothing.here._b.{DOMAIN}": "unknown_name: network 'b' has no service 'nothing.here'",
    f"p8443-orders.nope.b.{DOMAIN}": "unknown_name",
    f"p9999-orders.shop.b.{DOMAIN}": "unknown_name: service 'orders.shop.svc.cluster.local' of network 'b' has no port",
    f"p8443-orders.shop.a.{DOMAIN}": "unknown_n",
    f"p443-bills.shop.b.{DOMAIN}": "ambiguous_name",
    f"_0._10-1-0-5._b.{DOMAIN}": "bad_port",
    f"_8443._10-1-0-05._b.{DOMAIN}": "bad_address",
    f"_8443._10-1-0-256._b.{DOMAIN}": "bad_address",
    f"p8443-10-1-0.b.{DOMAIN}": "bad_address",
    f"_8443.x._10-1-0-5._b.{DOMAIN}": "not_a_target",
    f"b_d.{DOMAIN}": "bad_label",
    f"b\x07d.{DOMAIN}": "bad_character",
    f"b\xe9d.{DOMAIN}": "bad_character",
}


@pytest.mark.parametrize(("name", "reason"), ABSENT.items())
@pytest.mark.parametrize("of", [V4, NONE], ids=["relay", "no relay"])
def test_impossible_names_are_nxdomain_with_a_reason(of: Table, name: str, reason: str) -> None:
    wire = b"".join(bytes([len(label)]) + label.encode("latin-1") for label in name.split(".")) + b"\0"
    for qtype in (Qtype.A, Qtype.AAAA, Qtype.HTTPS, Qtype.ANY):
        message = ask(of, wire, qtype)
        assert message.rcode() == dns.rcode.NXDOMAIN
        assert str(message.authority[0]) == SOA
        assert why(message).startswith(reason)


def test_a_dot_inside_a_label_is_not_a_border_of_labels() -> None:
    """Compared as text these would be names of ours."""
    inside = b"\x03svc\x0dmesh.internal\0"
    assert V4.decide(scan(query(b"\x01b" + inside))) is Disposition.FORWARD
    message = ask(V4, b"\x10p8443-10-1-0-5.b\x03svc\x04mesh\x08internal\0")
    assert message.rcode() == dns.rcode.NXDOMAIN
    assert why(message).startswith("bad_character")


def test_the_domain_inside_a_label_is_not_the_domain() -> None:
    tail = b"\x03svc\x04mesh\x08internal\0"
    swallowed = bytes([len(tail) + 1]) + b"xy" + tail[:-1] + b"\0"
    assert V4.decide(scan(query(swallowed))) is Disposition.FORWARD
    assert V4.decide(scan(query("notsvc.mesh.internal"))) is Disposition.FORWARD
    assert V4.decide(scan(query("mesh.internal"))) is Disposition.FORWARD


@pytest.mark.parametrize(
    "name", ["www.example.test", "", "svc.cluster.local", "10.in-addr.arpa", "orders.shop", "x." + ORDERS]
)
def test_other_names_are_upstreams(name: str) -> None:
    for qtype in (Qtype.A, Qtype.AAAA, Qtype.HTTPS, Qtype.ANY, Qtype.PTR):
        assert V4.decide(scan(query(name, qtype))) is Disposition.FORWARD


# Imports.


def test_a_name_counts_only_where_it_is_imported_and_offered() -> None:
    view = mesh(relay("10.0.0.9"))
    assert table(view).decide(scan(query(ORDERS))) is Disposition.FORWARD
    assert table(view, imports()).decide(scan(query("nobody.shop.svc.cluster.local"))) is Disposition.FORWARD
    assert isinstance(table(view, imports()).decide(scan(query(ORDERS))), Answer)
    # Nothing is imported from c, which is not a source of a rule with that name.
    assert table(view, imports()).decide(scan(query("other.depot.example"))) is Disposition.FORWARD


def test_upstream_goes_first_where_local_is_preferred() -> None:
    local = table(mesh(relay("10.0.0.9")), imports("local"))
    for qtype in (Qtype.A, Qtype.AAAA, Qtype.HTTPS, Qtype.ANY):
        read = scan(query(ORDERS, qtype))
        assert local.decide(read) is Disposition.LOCAL_FIRST
        assert isinstance(local.imported(read), Answer)
    assert local.decide(scan(query("nobody.shop.svc.cluster.local"))) is Disposition.FORWARD
    assert local.imported(scan(query("nobody.shop.svc.cluster.local"))) is Disposition.FORWARD


# SRV.


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (f"_8443.orders.shop._b.{DOMAIN}", f"p8443-orders.shop.b.{DOMAIN}"),
        (f"p8443-orders.shop.b.{DOMAIN}", f"p8443-orders.shop.b.{DOMAIN}"),
        (f"_8443._10-1-0-5._b.{DOMAIN}", ADDRESS),
        (ORDERS, f"p8443-{ORDERS}.b.{DOMAIN}"),
        ("stock.depot.example", f"p443-stock.depot.example.c.{DOMAIN}"),
    ],
)
def test_srv_gives_the_compact_name_and_the_relays_port(name: str, target: str) -> None:
    assert records(ask(V4, name, Qtype.SRV)) == [f"{name}. 5 IN SRV 0 0 443 {target}."]


def test_srv_needs_one_port_that_all_relays_have() -> None:
    name = f"p8443-orders.shop.b.{DOMAIN}"
    shared = table(mesh(relay("10.0.0.9", ports=[8000, 443]), relay("10.0.0.8", ports=[443, 8443])))
    assert records(ask(shared, name, Qtype.SRV))[0].split()[6] == "443"
    apart = table(mesh(relay("10.0.0.9", ports=[8000]), relay("10.0.0.8", ports=[443])))
    assert is_nodata(ask(apart, name, Qtype.SRV))


def test_srv_of_a_name_with_several_ports_and_none_of_the_relays_is_nodata() -> None:
    other = table(mesh(relay("10.0.0.9", ports=[8000])), imports())
    assert is_nodata(ask(other, "stock.depot.example", Qtype.SRV))
    assert records(ask(other, ORDERS, Qtype.SRV))[0].split()[6] == "8000"


# Relays.


def test_addresses_take_turns() -> None:
    turning = table(mesh(relay("10.0.0.1"), relay("10.0.0.2", "10.0.0.3")))
    data = query(ADDRESS)
    read = scan(data)
    answer = turning.decide(read)
    assert isinstance(answer, Answer)
    first = [records(dns.message.from_wire(answer.reply(read, 512)))[0] for _ in range(6)]
    assert first[:3] == first[3:]
    assert len(set(first)) == 3


def test_many_relays_fit_in_512_bytes_in_turns() -> None:
    many = table(mesh(*(relay(f"10.0.0.{n}", f"fd00::{n:x}") for n in range(1, 31))), imports())
    for name in (ADDRESS, ORDERS):
        for qtype in (Qtype.A, Qtype.AAAA):
            read = scan(query(name, qtype))
            answer = many.decide(read)
            assert isinstance(answer, Answer)
            seen = set()
            for _ in range(30):
                reply = answer.reply(read, 512)
                assert not reply[2] & 2
                seen.update(found := records(dns.message.from_wire(reply)))
                assert len(found) == MAX_ADDRESSES
            assert len(seen) == 30
            assert answer.longest + 255 + 4 <= 512  # under the longest name and with EDNS


@pytest.mark.parametrize("qtype", [Qtype.A, Qtype.AAAA, Qtype.SRV])
@pytest.mark.parametrize("name", [ADDRESS, f"_8443.orders.shop._b.{DOMAIN}", ORDERS, f"p443-10-2-0-7.a.{DOMAIN}"])
def test_without_a_relay_it_is_servfail_and_says_so(name: str, qtype: int) -> None:
    message = ask(NONE, name, qtype)
    assert message.rcode() == dns.rcode.SERVFAIL
    assert why(message) == "no relay of network a is alive"
    assert not message.authority


def test_other_types_are_nodata_without_a_relay_too() -> None:
    assert is_nodata(ask(NONE, ADDRESS, Qtype.HTTPS))


def test_only_ipv6_relays() -> None:
    v6 = table(mesh(relay("fd00::9")))
    assert is_nodata(ask(v6, ADDRESS, Qtype.A))
    assert records(ask(v6, ADDRESS, Qtype.AAAA)) == [f"{ADDRESS}. 5 IN AAAA fd00::9"]


def test_relays_of_other_networks_are_not_ours() -> None:
    foreign = table(mesh(relay("10.9.9.9", network="b")))
    assert ask(foreign, ADDRESS).rcode() == dns.rcode.SERVFAIL


def test_addresses_of_relays_have_no_name_and_do_not_leak_upstream() -> None:
    assert is_nodata(ask(BOTH, "9.0.0.10.in-addr.arpa", Qtype.PTR))
    assert is_nodata(ask(BOTH, "9." + "0." * 27 + "0.0.d.f.ip6.arpa", Qtype.PTR))
    assert BOTH.decide(scan(query("8.0.0.10.in-addr.arpa", Qtype.PTR))) is Disposition.FORWARD


# Special names.


def test_localhost_is_here() -> None:
    for name in ("localhost", "LocalHost", "db.localhost"):
        assert records(ask(V4, name)) == [f"{name}. 5 IN A 127.0.0.1"]
        assert records(ask(V4, name, Qtype.AAAA)) == [f"{name}. 5 IN AAAA ::1"]
        assert is_nodata(ask(V4, name, Qtype.HTTPS))
    assert V4.decide(scan(query("localhost.example.test"))) is Disposition.FORWARD
    assert V4.decide(scan(query("mylocalhost"))) is Disposition.FORWARD


@pytest.mark.parametrize("name", ["invalid", "x.invalid", "onion", "abc.Onion"])
def test_names_that_never_exist_are_not_asked_for(name: str) -> None:
    message = ask(V4, name)
    assert message.rcode() == dns.rcode.NXDOMAIN
    assert str(message.authority[0].name).lower() == name.lower().rpartition(".")[2] + "."


@pytest.mark.parametrize("name", ["printer.local", "4.3.2.127.in-addr.arpa"])
@pytest.mark.parametrize("qtype", [Qtype.A, Qtype.PTR, Qtype.SRV])
def test_names_that_upstream_knows_nothing_of_are_not_asked_for(name: str, qtype: int) -> None:
    message = ask(V4, name, qtype)
    assert message.rcode() == dns.rcode.NXDOMAIN
    assert name.endswith(message.authority[0].name.to_text(omit_final_dot=True))
    assert message.authority[0].name != dns.name.from_text(name)


def test_above_names_that_are_asked_for_is_no_data() -> None:
    assert is_nodata(ask(V4, "local"))
    assert V4.decide(scan(query("nobody.svc.cluster.local"))) is Disposition.FORWARD


def test_names_above_imports_are_no_data_even_in_zones_that_are_not_forwarded() -> None:
    rules = Imports([ImportRule(names=("stock.depot.local",), sources=("c",))])
    of = table(mesh(relay("10.0.0.9")).apply([service("c", "stock.depot.local", 443)]), rules)
    assert is_nodata(ask(of, "depot.local"))
    assert ask(of, "other.local").rcode() == dns.rcode.NXDOMAIN
    assert ask(table(mesh(relay("10.0.0.9")), rules), "depot.local").rcode() == dns.rcode.NXDOMAIN


@pytest.mark.parametrize(
    ("name", "is_above"),
    [
        ("mesh.internal", True),
        ("internal", True),
        ("shop.svc.cluster.local", True),
        (DOMAIN, False),
        ("x.internal", False),
        ("", False),
    ],
)
def test_names_above_ours_exist(name: str, is_above: bool) -> None:
    assert V4.is_above(wire_name(name)) is is_above


def test_imports_take_precedence_over_local_zones() -> None:
    rules = Imports([ImportRule(names=("*.shop.svc.cluster.local",), sources=("b",), prefer="remote")])
    of = Table(
        mesh(relay("10.0.0.9")),
        imports=rules,
        network="a",
        domain=DOMAIN,
        ttl_s=5,
        absent=LocallyServedZones(["shop.svc.cluster.local"]),
    )
    assert records(ask(of, ORDERS)) == [f"{ORDERS}. 5 IN A 10.0.0.9"]
    assert ask(of, "x." + ORDERS).rcode() == dns.rcode.NXDOMAIN


@pytest.mark.parametrize("name", ["_dns.resolver.arpa", "resolver.arpa"])
@pytest.mark.parametrize("qtype", [64, Qtype.A])
def test_upstreams_encrypted_resolvers_are_hidden(name: str, qtype: int) -> None:
    assert is_nodata(ask(V4, name, qtype))


@pytest.mark.parametrize("name", [DOMAIN, ADDRESS, "example.test"])
@pytest.mark.parametrize("qtype", [Qtype.AXFR, Qtype.IXFR])
def test_transfers_are_refused(name: str, qtype: int) -> None:
    assert ask(V4, name, qtype).rcode() == dns.rcode.REFUSED


# Before the first state of discovery.


def test_before_discovery_was_heard_from_ours_are_not_ready() -> None:
    for rules in (imports("remote"), imports("local")):
        early = table(None, rules)
        for name in (DOMAIN, ADDRESS, f"nope.{DOMAIN}"):
            assert early.decide(scan(query(name))) is Disposition.NOT_READY
        assert early.decide(scan(query("www.example.test"))) is Disposition.FORWARD
    assert table(None, imports("remote")).decide(scan(query(ORDERS))) is Disposition.NOT_READY
    early = table(None, imports("local"))
    assert early.decide(scan(query(ORDERS))) is Disposition.LOCAL_FIRST
    assert early.imported(scan(query(ORDERS))) is Disposition.NOT_READY


# Bounds.


def test_names_that_do_not_exist_do_not_push_out_those_that_do() -> None:
    of = table(mesh(relay("10.0.0.9")))
    ask(of, ADDRESS)
    for n in range(20000):
        of.decide(scan(query(f"n{n}.nope.{DOMAIN}")))
    assert of.answer_at_once(query(ADDRESS)) is not None


@given(st.binary(max_size=64), st.integers(0, 65535))
def test_garbage_under_the_domain_never_raises(head: bytes, qtype: int) -> None:
    labels = head + b"\x01b\x03svc\x04mesh\x08internal\0"
    try:
        read = scan(query(labels, qtype, edns=opt()))
    except BadQuery:
        return
    for of in (V4, NONE, table(None, imports())):
        decision = of.decide(read)
        if isinstance(decision, Answer):
            dns.message.from_wire(decision.reply(read, 1232))


@given(st.lists(st.binary(min_size=1, max_size=63), max_size=5), st.sampled_from([1, 28, 33, 65, 255, 6]))
def test_any_labels_under_the_domain_have_an_answer(labels: list[bytes], qtype: int) -> None:
    wire = b"".join(bytes([len(label)]) + label for label in labels) + b"\x03svc\x04mesh\x08internal\0"
    if len(wire) > 255:
        return
    data = query(wire, qtype, edns=opt(512))
    read = scan(data)
    decision = V4.decide(read)
    assert isinstance(decision, Answer)
    reply = decision.reply(read, 512)
    assert len(reply) <= 512
    message = dns.message.from_wire(reply)
    assert message.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)
    assert dns.rdatatype.SOA in {rrset.rdtype for rrset in (*message.authority, *message.answer)} or message.answer
