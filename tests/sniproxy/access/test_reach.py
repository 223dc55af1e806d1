"""What a stream reaches: all its names, and every service that has the address or had it recently."""

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.addresses import Address, parse_endpoint, spellings
from discovery.model.lookup import Unresolved, reached
from discovery.model.mesh import AnyRecord, Deletion, Kind, Mesh, ServiceSpec
from discovery.model.names import AddressTarget, ServiceTarget, names_of
from sniproxy.access.reach import RECENT_S, Endpoint, Owner, Reach
from sniproxy.access.rules import Flow, NameKind, Policy, Rule
from tests.support.fixed_discovery import record

D = "svc.mesh.internal"
ORDERS = "orders.shop.example"


def service(name: str, *endpoints: str, port: int = 443, id: str = "", network: str = "b") -> AnyRecord:  # noqa: A002
    return record(Kind.SERVICE, network, id or name, ServiceSpec(name=name, ports={str(port): list(endpoints)}))


def reach(*records: AnyRecord) -> Reach:
    made = Reach("b", D)
    made.follow(Mesh.of(records), 0.0)
    return made


def owners(made: Reach, endpoint: str) -> set[Owner]:
    return made.owners(*parse_endpoint(endpoint))


def by_service(
    made: Reach, endpoint: str | None, service: str = ORDERS, port: int = 443, *, name: str = "", **changes: Any
) -> Flow:
    address, dialled = (None, port) if endpoint is None else parse_endpoint(endpoint)
    return made.flow(
        ServiceTarget(changes.pop("network", "b"), service, port),
        name=name or service,
        client=ip_address("10.1.2.3"),
        from_network="a",
        address=address,
        port=dialled,
        **changes,
    )


def by_address(made: Reach, endpoint: str, *, network: str = "b") -> Flow:
    address, port = parse_endpoint(endpoint)
    return made.flow(
        AddressTarget(network, address, port),
        name="as asked",
        client=ip_address("10.1.2.3"),
        from_network="a",
        address=address,
        port=port,
    )


def denied(flow: Flow, *to: str, **rule: Any) -> bool:
    """Whether a deny rule speaks of it."""
    return not Policy((Rule.parse(action="deny", to=to, **rule), Rule.parse(action="allow"))).decide(flow).allowed


def allowed(flow: Flow, *to: str, **rule: Any) -> bool:
    """Whether an allow rule speaks of it."""
    return Policy((Rule.parse(action="allow", to=to, **rule),)).decide(flow).allowed


SPELLINGS = [
    ORDERS,
    "*.shop.example",
    "**.example",
    f"p443-{ORDERS}.b.{D}",
    f"p443-orders.shop.b.{D}",
    f"_443.{ORDERS}._b.{D}",
    f"_443.orders.shop._b.{D}",
    f"*.shop.b.{D}",
    f"**.b.{D}",
]
"""Ways to name `orders.shop.example`, port 443, of network b in a rule."""


@pytest.mark.parametrize("pattern", SPELLINGS)
@pytest.mark.parametrize("name", [ORDERS, f"p443-orders.shop.b.{D}", f"_443.{ORDERS}._b.{D}"])
def test_every_spelling_in_a_rule_means_every_spelling_that_is_asked(pattern: str, name: str) -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443"), service("stock.shop.example", "10.1.0.6:8443"))
    for endpoint in ("10.1.0.5:8443", None):
        flow = by_service(made, endpoint, name=name)
        assert denied(flow, pattern)
        assert allowed(flow, pattern)
    other = by_service(made, "10.1.0.6:8443", "stock.shop.example")
    if "*" not in pattern:
        assert not denied(other, pattern)
        assert not allowed(other, pattern)


@pytest.mark.parametrize("pattern", SPELLINGS)
def test_deny_means_the_address_of_an_endpoint_too_and_allow_does_not(pattern: str) -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443"))
    flow = by_address(made, "10.1.0.5:8443")
    assert denied(flow, pattern)
    is_for_all = pattern == f"**.b.{D}"  # which means address names, too
    assert allowed(flow, pattern) is is_for_all
    assert denied(by_address(made, "10.1.0.5:8444"), pattern) is is_for_all


@pytest.mark.parametrize("pattern", [f"p8443-10-1-0-5.b.{D}", f"_8443._10-1-0-5._b.{D}", "10.1.0.5/32:8443"])
def test_an_address_in_a_rule_matches_what_is_dialled(pattern: str) -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443"))
    assert denied(by_address(made, "10.1.0.5:8443"), pattern)
    assert allowed(by_address(made, "10.1.0.5:8443"), pattern)
    assert denied(by_service(made, "10.1.0.5:8443"), pattern)
    assert allowed(by_service(made, "10.1.0.5:8443"), pattern) is ("/" in pattern), "a name that was not asked for"
    assert not denied(by_address(made, "10.1.0.6:8443"), pattern)


def test_names_of_addresses_in_other_networks_are_in_both_forms() -> None:
    flow = by_address(reach(), "[fd00::5]:8443", network="c")
    for pattern in (f"_8443._fd00--5._c.{D}", f"p8443-xfd000000000000000000000000000005.c.{D}"):
        assert denied(flow, pattern)
        assert allowed(flow, pattern)
    assert not denied(flow, f"_8443._fd00--5._b.{D}")


def test_ports_are_those_of_the_name_and_of_the_endpoint_for_deny_and_what_is_dialled_for_allow() -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443"))
    for flow in (by_service(made, "10.1.0.5:8443"), by_address(made, "10.1.0.5:8443")):
        for port in (443, 8443):
            assert denied(flow, ORDERS, ports=[port])
        assert not denied(flow, ORDERS, ports=[444])
    flow = by_service(made, "10.1.0.5:8443")
    assert allowed(flow, ORDERS, ports=[8443])
    assert not allowed(flow, ORDERS, ports=[443])
    assert denied(flow, "b", ports=[443])


def test_allow_needs_the_endpoint_to_be_one_now() -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443"))
    assert allowed(by_service(made, "10.1.0.5:8443"), ORDERS)
    for other in ("10.1.0.5:8444", "10.1.0.6:8443", "[fd00::5]:8443"):
        assert not allowed(by_service(made, other), ORDERS, f"**.b.{D}")
    made.follow(Mesh.of([service(ORDERS, "10.1.0.6:8443")], 2), 1.0)
    assert not allowed(by_service(made, "10.1.0.5:8443"), ORDERS)
    assert allowed(by_service(made, "10.1.0.6:8443"), ORDERS)


def test_an_endpoint_counts_for_ten_minutes_after_its_record_lost_it() -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443"))
    gone = Mesh.of([service(ORDERS, "10.1.0.6:8443")], 2)
    made.follow(gone, 100.0)
    for now in (100.0, 100.0 + RECENT_S - 1):
        made.follow(gone, now)
        assert denied(by_address(made, "10.1.0.5:8443"), ORDERS)
        assert owners(made, "10.1.0.5:8443") == {Owner(ORDERS, 443)}
    made.follow(gone, 100.0 + RECENT_S)
    assert not denied(by_address(made, "10.1.0.5:8443"), ORDERS)
    assert denied(by_address(made, "10.1.0.6:8443"), ORDERS), "what it has now counts for as long as it has it"
    assert not made._recent
    assert not made._former


def test_an_endpoint_that_disappears_and_reappears() -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443"))
    with_it, without = Mesh.of([service(ORDERS, "10.1.0.5:8443")], 3), Mesh.of([service(ORDERS)], 2)
    made.follow(without, 0.0)
    made.follow(with_it, 500.0)
    made.follow(with_it, 700.0)
    assert owners(made, "10.1.0.5:8443"), "its first end is long ago, and it is there"
    made.follow(without, 800.0)
    made.follow(without, 800.0 + RECENT_S - 1)
    assert owners(made, "10.1.0.5:8443")
    made.follow(without, 800.0 + RECENT_S)
    assert not owners(made, "10.1.0.5:8443")


def test_a_record_that_is_deleted_or_renamed() -> None:
    mesh = Mesh.of([service(ORDERS, "10.1.0.5:8443", id="x")])
    made = Reach("b", D)
    made.follow(mesh, 0.0)
    mesh = mesh.apply([service("stock.shop.example", "10.1.0.5:8443", id="x")], 2)
    made.follow(mesh, 1.0)
    assert owners(made, "10.1.0.5:8443") == {Owner(ORDERS, 443), Owner("stock.shop.example", 443)}
    mesh = mesh.apply([Deletion((Kind.SERVICE, "b", "x"), 3)], 3)
    made.follow(mesh, 2.0)
    flow = by_address(made, "10.1.0.5:8443")
    assert denied(flow, ORDERS)
    assert denied(flow, "stock.shop.example")


def test_services_that_share_an_endpoint() -> None:
    """A client that may reach one service does not reach the denied one."""
    made = reach(service(ORDERS, "10.1.0.5:8443"), service("db.shop.example", "10.1.0.5:8443", port=5432))
    flow = by_service(made, "10.1.0.5:8443")
    assert denied(flow, "db.shop.example")
    assert denied(flow, f"p5432-db.shop.b.{D}")
    assert denied(flow, "db.shop.example", ports=[5432])
    assert not denied(flow, "db.shop.example", ports=[443]), "that is the port of the other"
    assert allowed(flow, ORDERS)
    assert not allowed(flow, "db.shop.example")


def test_of_two_records_with_one_name_all_count_for_deny_and_the_first_for_allow() -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443", id="x1"), service(ORDERS, "10.1.0.6:8443", id="x2"))
    for endpoint in ("10.1.0.5:8443", "10.1.0.6:8443"):
        assert denied(by_address(made, endpoint), ORDERS)
    assert allowed(by_service(made, "10.1.0.5:8443"), ORDERS)
    assert not allowed(by_service(made, "10.1.0.6:8443"), ORDERS)


@pytest.mark.parametrize(
    ("written", "dialled"),
    [
        ("[fd00:0:0::5]:443", "[fd00::5]:443"),
        ("[FD00::0005]:443", "[fd00::5]:443"),
        ("[::ffff:10.1.0.5]:443", "10.1.0.5:443"),
        ("10.1.0.5:443", "[::ffff:10.1.0.5]:443"),
        ("10.1.0.5:443", "[64:ff9b::10.1.0.5]:443"),
        ("10.1.0.5:443", "[64:ff9b::a01:5]:443"),
        ("[64:ff9b::a01:5]:443", "10.1.0.5:443"),
        ("10.1.0.5:443", "[2002:a01:5::]:443"),
    ],
)
def test_one_place_in_two_spellings(written: str, dialled: str) -> None:
    made = reach(service(ORDERS, written))
    flow = by_address(made, dialled)
    assert denied(flow, ORDERS)
    assert not denied(by_address(made, "10.1.0.6:443"), ORDERS)
    if "10.1.0.5" in written:
        assert denied(flow, "10.1.0.0/24")
        assert denied(flow, f"p443-10-1-0-5.b.{D}")
        assert allowed(flow, "10.1.0.0/24") is (dialled == "10.1.0.5:443")


def test_a_twice_written_endpoint_counts_until_both_are_gone() -> None:
    made = reach(service(ORDERS, "[fd00::5]:443", "[fd00:0::5]:443"))
    made.follow(Mesh.of([service(ORDERS, "[fd00:0::5]:443")], 2), 0.0)
    made.follow(Mesh.of([service(ORDERS, "[fd00:0::5]:443")], 3), 2 * RECENT_S)
    assert owners(made, "[fd00::5]:443")


def test_an_ambiguous_name_matches_all_in_a_deny_rule_and_none_in_an_allow_rule() -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443"), service("orders.shop.other", "10.1.0.6:8443"))
    flow = by_service(made, "10.1.0.5:8443")
    assert denied(flow, f"p443-orders.shop.b.{D}")
    assert not allowed(flow, f"p443-orders.shop.b.{D}")
    assert allowed(flow, f"p443-{ORDERS}.b.{D}")


def test_another_networks_services_have_names_and_no_endpoints() -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443", network="c"))
    assert not owners(made, "10.1.0.5:8443")
    assert not denied(by_address(made, "10.1.0.5:8443", network="c"), ORDERS)
    assert denied(by_service(made, None, network="c"), ORDERS)
    assert denied(by_service(made, None, network="c"), f"p443-orders.shop.c.{D}")
    assert not denied(by_service(made, None, network="c"), f"p443-orders.shop.b.{D}")


def test_a_name_of_another_networks_service_allows_nothing() -> None:
    made = reach()
    flow = by_service(made, None, network="c", name=f"p443-{ORDERS}.c.{D}", is_plain=False)
    assert not allowed(flow, ORDERS)
    assert allowed(flow, f"p443-{ORDERS}.c.{D}")
    assert denied(flow, ORDERS)


def test_a_service_whose_name_looks_like_one_of_another_network() -> None:
    """Network c may name its services as it likes."""
    name = f"p443-{ORDERS}.b.{D}"
    flow = by_service(reach(), None, name, network="c", name=f"p443-{name}.c.{D}")
    assert not allowed(flow, name)
    assert not allowed(flow, f"**.b.{D}")


def test_kinds_of_names() -> None:
    made = reach(service(ORDERS, "10.1.0.5:8443"))
    assert by_service(made, None).kind is NameKind.SERVICE
    flow = by_address(made, "10.1.0.5:8443")
    assert denied(flow, ORDERS, names=["address"])
    assert not denied(flow, ORDERS, names=["service"])
    assert not allowed(flow, "b", names=["service"])
    assert allowed(flow, "b", names=["address"])


def test_what_is_no_endpoint_in_a_record_is_left_out() -> None:
    made = reach(service(ORDERS, "no endpoint", "10.1.0.5:8443", "10.1.0.5:0"))
    assert made.endpoints(ORDERS, 443) == (parse_endpoint("10.1.0.5:8443"),)
    made.follow(Mesh.EMPTY, 1.0)
    assert made.endpoints(ORDERS, 443) == ()


def test_what_is_remembered_is_bounded() -> None:
    made = Reach("b", D, max_recent=10, max_named=4)
    for number in range(100):
        made.follow(Mesh.of([service(f"s{number}.shop.example", f"10.1.0.{number}:443")], number), float(number))
        for port in range(1, 10):
            made.endpoints("s1.shop.example", port)
            by_service(made, None, f"s{number}.shop.example", port)
    assert len(made._recent) == 10
    assert len(made._former) == 10
    assert len(made._owners) == 1
    assert len(made._endpoints) <= 4
    assert len(made._called) <= 4
    assert owners(made, "10.1.0.98:443")
    assert not owners(made, "10.1.0.1:443")


def test_a_second_stream_to_the_same_target_searches_neither_records_nor_patterns() -> None:
    asked: list[Endpoint] = []

    class Noting(Reach):
        def owners(self, address: Address, port: int) -> set[Owner]:
            asked.append((address, port))
            return super().owners(address, port)

    made = Noting("b", D)
    made.follow(Mesh.of(service(f"s{number}.shop.example", f"10.1.0.{number}:443") for number in range(200)), 0.0)
    rules = Policy((Rule.parse(action="deny", to=["*.other.example", "s7.shop.example"]), Rule.parse(action="allow")))
    assert not rules.decide(by_address(made, "10.1.0.7:443")).allowed
    found = {targets: id(rules_of) for targets, rules_of in rules._by_targets.items()}
    assert (len(asked), len(found)) == (1, 2)
    assert not rules.decide(by_address(made, "10.1.0.7:443")).allowed
    assert len(asked) == 1
    assert {targets: id(rules_of) for targets, rules_of in rules._by_targets.items()} == found, "none was made anew"


def test_what_a_policy_remembers_is_bounded() -> None:
    given = (Rule.parse(action="deny", to=[ORDERS]), Rule.parse(action="allow"))
    rules = Policy(given, max_known_sets=4, max_known_targets=8)
    made = reach(service(ORDERS, *(f"10.1.0.{number}:443" for number in range(100))))
    for number in range(200):
        assert rules.decide(by_address(made, f"10.1.0.{number}:443")).allowed is (number >= 100)
        for known in (rules._by_names, rules._by_target, rules._by_targets):
            assert len(known) <= 10


def test_a_thousand_services_behind_one_endpoint() -> None:
    shared = [service(f"s{number}.shop.example", "10.1.0.5:443") for number in range(1000)]
    made = reach(*shared)
    assert denied(by_address(made, "10.1.0.5:443"), "s999.shop.example")
    assert denied(by_service(made, "10.1.0.5:443", "s0.shop.example"), f"_443.s999.shop._b.{D}")
    assert not denied(by_address(made, "10.1.0.5:443"), "s1000.shop.example")
    assert len(by_address(made, "10.1.0.5:443").aliases) == 2


SERVICES = ("orders.shop.example", "orders.shop.other", "db.shop.example", "shop.example")
ENDPOINTS = ("10.1.0.5:443", "10.1.0.5:8443", "10.1.0.6:443", "[fd00::5]:443", "[64:ff9b::a01:5]:443")
RECORDS = st.lists(
    st.tuples(
        st.sampled_from(SERVICES), st.sampled_from([443, 8443]), st.lists(st.sampled_from(ENDPOINTS), max_size=3)
    ),
    max_size=5,
)


def mesh_of(records: list[tuple[str, int, list[str]]]) -> Mesh:
    return Mesh.of(service(name, *at, port=port, id=f"r{index}") for index, (name, port, at) in enumerate(records))


def names_that_may_lead(records: list[tuple[str, int, list[str]]]) -> list[str]:
    found = set()
    for name, port, at in records:
        labels = name.split(".")
        found |= {f"{name}", f"_{port}.{name}._b.{D}", f"p{port}-{name}.b.{D}", f"p{port}-{'.'.join(labels[:2])}.b.{D}"}
        for endpoint in at:
            found.update(names_of(AddressTarget("b", *parse_endpoint(endpoint)), D))
    return sorted(found)


@given(st.lists(RECORDS, min_size=1, max_size=3), st.sampled_from(SERVICES), st.data())
def test_any_history_of_records_and_any_name(
    history: list[list[tuple[str, int, list[str]]]], meant: str, data: st.DataObject
) -> None:
    """A deny rule is never passed on the way to an endpoint of its service; an allow rule leads nowhere else."""
    made = Reach("b", D)
    for moment, records in enumerate(history):
        mesh = mesh_of(records)
        made.follow(mesh, float(moment))
    asked = [name for records in history for name in names_that_may_lead(records)]
    if not asked:
        return
    name = data.draw(st.sampled_from(asked))
    for claimed in [(owner, port) for owner in SERVICES for port in (443, 8443)] + [*map(parse_endpoint, ENDPOINTS)]:
        try:
            target = reached(name, *claimed, mesh, "b", D).target  # type: ignore[call-arg]
        except Unresolved:
            continue
        is_address = isinstance(target, AddressTarget)
        dialled = [(target.address, target.port)] if is_address else made.endpoints(target.service, target.port)  # type: ignore[union-attr]
        for address, port in dialled:
            flow = made.flow(
                target, name=name, client=ip_address("10.0.0.1"), from_network="a", address=address, port=port
            )
            were = {
                (spelling, number)
                for records in history
                for owner, _, at in records
                if owner == meant
                for where, number in map(parse_endpoint, at)
                for spelling in spellings(where)
            }
            belongs = any((spelling, port) in were for spelling in spellings(address))
            is_meant = isinstance(target, ServiceTarget) and target.service == meant
            assert denied(flow, meant) is (belongs or is_meant)
            assert allowed(flow, meant) is is_meant
