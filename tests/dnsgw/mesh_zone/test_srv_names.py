"""SRV questions about imported services, by the names that clients ask for."""

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from discovery.model.imports import ImportRule, Imports
from discovery.model.lookup import resolve
from discovery.model.mesh import Kind, Mesh, Record, ServiceSpec
from discovery.model.names import PlainName, ServiceTarget
from dnsgw.mesh_zone.srv_names import MAX_TARGETS, SrvName, parse_srv_name, port_of
from dnsgw.mesh_zone.zone import MAX_TURNS, Disposition, Table
from dnsgw.message.question import Qtype, scan
from dnsgw.message.reply import Answer
from tests.support.dns_meshes import DOMAIN, ORDERS, mesh, relay
from tests.support.dns_packets import opt, query

DB = "db.shop.svc.cluster.local"


def service(network: str, name: str, member_of: str = "", **port_names: int) -> Record[ServiceSpec]:
    ports: dict[str, list[str]] = {str(number): [] for number in port_names.values()}
    spec = ServiceSpec(name=name, ports=ports, port_names=port_names, member_of=member_of)
    return Record(kind=Kind.SERVICE, network=network, id=name, revision=9, spec=spec)


VIEW = mesh(relay("10.0.0.9", ports=(443, 8443))).apply(
    [
        service("b", ORDERS, https=8443, metrics=9090),
        service("c", ORDERS, https=443),
        service("b", DB, mongo=27017),
        *(service("b", f"db-{number}.{DB}", DB, mongo=27017) for number in range(3)),
    ]
)


def table(prefer: str = "remote", view: Mesh | None = VIEW) -> Table:
    rule = ImportRule(
        names=("*.shop.svc.cluster.local", f"*.{DB}"),
        sources=("b", "c"),
        prefer=prefer,  # type: ignore[arg-type]
    )
    return Table(view, imports=Imports([rule]), network="a", domain=DOMAIN, ttl_s=5)


def decide(of: Table, name: str, qtype: int = Qtype.SRV) -> dns.message.Message | Disposition:
    read = scan(query(name, qtype, edns=opt()))
    decision = of.decide(read)
    if not isinstance(decision, Answer):
        return decision
    return dns.message.from_wire(decision.reply(read, 65535))


def answer(name: str, qtype: int = Qtype.SRV, view: Mesh = VIEW) -> dns.message.Message:
    found = decide(table(view=view), name, qtype)
    assert isinstance(found, dns.message.Message), found
    return found


def targets(message: dns.message.Message) -> list[str]:
    """Return priority, port and target of each record."""
    return sorted(
        f"{rdata.priority} {rdata.port} {rdata.target.to_text(omit_final_dot=True)}"
        for rrset in message.answer
        for rdata in rrset
    )


@pytest.mark.parametrize("port", ["https", "HTTPS", "8443"])
def test_a_port_is_found_by_name_and_number(port: str) -> None:
    found = targets(answer(f"_{port}._tcp.{ORDERS}"))
    assert found[0] == f"0 443 p8443-{ORDERS}.b.{DOMAIN}"
    # A port's name may have another number in another network, which is the second choice.
    assert found[1:] == ([] if port == "8443" else [f"1 443 p443-{ORDERS}.c.{DOMAIN}"])


def test_the_targets_resolve() -> None:
    for each in targets(answer(f"_https._tcp.{ORDERS}")) + targets(answer(f"_mongo._tcp.{DB}")):
        name = each.split()[2]
        assert [rrset.rdtype for rrset in answer(name, Qtype.A).answer] == [dns.rdatatype.A]


def test_a_service_with_members_has_a_target_for_each() -> None:
    names = [f"0 443 p27017-db-{number}.{DB}.b.{DOMAIN}" for number in range(3)]
    assert targets(answer(f"_mongo._tcp.{DB}")) == names
    assert targets(answer(f"_27017._tcp.{DB}")) == names
    assert targets(answer(f"_mongo._tcp.db-1.{DB}")) == [names[1]]
    (rrset,) = answer(f"db-1.{DB}", Qtype.A).answer
    assert [rdata.to_text() for rdata in rrset] == ["10.0.0.9"]
    resolution = resolve(
        PlainName(f"db-1.{DB}"), VIEW, Imports([ImportRule(names=(f"*.{DB}",), sources=("b",))]), DOMAIN
    )
    assert resolution.candidates[0].target == ServiceTarget("b", f"db-1.{DB}", 27017)


def test_members_take_turns_at_being_first() -> None:
    of = table()
    read = scan(query(f"_mongo._tcp.{DB}", Qtype.SRV, edns=opt()))
    decision = of.decide(read)
    assert isinstance(decision, Answer)
    first = {dns.message.from_wire(decision.reply(read, 65535)).answer[0][0].to_text() for _ in range(3)}
    assert len(first) == 3


def test_an_answer_is_bounded_and_longer_ones_go_over_tcp() -> None:
    many = VIEW.apply([service("b", f"db-{number}.{DB}", DB, mongo=27017) for number in range(MAX_TARGETS + 9)])
    of = table(view=many)
    read = scan(query(f"_mongo._tcp.{DB}", Qtype.SRV, edns=opt()))
    decision = of.decide(read)
    assert isinstance(decision, Answer)
    whole = decision.reply(read, 65535)
    assert len(dns.message.from_wire(whole).answer[0]) == MAX_TARGETS
    assert decision.longest * MAX_TURNS < 1 << 19
    assert dns.message.from_wire(decision.reply(read, 1232)).flags & dns.flags.TC


@pytest.mark.parametrize(
    ("name", "qtype", "rcode"),
    [
        (f"_https._tcp.{ORDERS}", Qtype.A, dns.rcode.NOERROR),
        (f"_https._tcp.{ORDERS}", Qtype.AAAA, dns.rcode.NOERROR),
        (f"_tcp.{ORDERS}", Qtype.SRV, dns.rcode.NOERROR),
        (f"_tcp.{ORDERS}", Qtype.NS, dns.rcode.NOERROR),
        (f"_http._tcp.{ORDERS}", Qtype.SRV, dns.rcode.NXDOMAIN),
        (f"_http._tcp.{ORDERS}", Qtype.A, dns.rcode.NXDOMAIN),
        (f"_08443._tcp.{ORDERS}", Qtype.SRV, dns.rcode.NXDOMAIN),
    ],
)
def test_other_types_and_ports(name: str, qtype: int, rcode: dns.rcode.Rcode) -> None:
    message = answer(name, qtype)
    assert (message.rcode(), message.answer) == (rcode, [])
    (soa,) = message.authority
    assert message.question[0].name.is_subdomain(soa.name)


def test_without_a_relay_it_is_no_statement_about_the_name() -> None:
    assert (
        answer(f"_https._tcp.{ORDERS}", view=mesh()).rcode() == dns.rcode.NXDOMAIN
    )  # no port of this name in that mesh
    assert answer(f"_8443._tcp.{ORDERS}", view=mesh()).rcode() == dns.rcode.SERVFAIL


@pytest.mark.parametrize(
    "name", ["_https._tcp.orders.other.svc.cluster.local", "_https._tcp.nope.shop.svc.cluster.local"]
)
def test_other_names_are_upstreams(name: str) -> None:
    assert decide(table(), name) is Disposition.FORWARD
    assert decide(table(), f"_udp.{ORDERS}") is Disposition.FORWARD
    assert decide(table(view=None), f"_https._tcp.{ORDERS}") is Disposition.NOT_READY


def test_upstream_has_precedence_below_a_service_as_for_itself() -> None:
    local = table("local")
    assert decide(local, f"_https._tcp.{ORDERS}") is Disposition.LOCAL_FIRST
    assert isinstance(local.imported(scan(query(f"_https._tcp.{ORDERS}", Qtype.SRV))), Answer)
    assert decide(local, f"_ldap._tcp.{ORDERS}") is Disposition.FORWARD


def test_names() -> None:
    assert parse_srv_name("_https._tcp.o.s") == SrvName(PlainName("o.s"), "https", 2)
    assert parse_srv_name("_tcp.o.s") == SrvName(PlainName("o.s"), "", 1)
    for text in ("o.s", "_https._udp.o.s", "_https._tcp.o", "_tcp.o", "_tcp", "https._tcp.o.s", "_https.tcp.o.s"):
        assert parse_srv_name(text) is None
    spec = ServiceSpec(name="o.s", ports={"8443": []}, port_names={"https": 8443, "gone": 1})
    assert [port_of(spec, asked) for asked in ("https", "8443", "gone", "1", "", "é")] == [
        8443,
        8443,
        None,
        None,
        None,
        None,
    ]
