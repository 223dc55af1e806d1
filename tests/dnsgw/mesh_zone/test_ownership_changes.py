"""Names that change hands between two states of discovery or two sets of imports."""

import pytest

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Deletion, Kind, Record, ServiceSpec
from dnsgw.mesh_zone.ownership_changes import changed_owner
from tests.support.dns_meshes import ORDERS, imports, mesh, relay, service

NEW = "new.shop.svc.cluster.local"


def without_srv(names: set[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


VIEW = mesh(relay("10.0.0.9"))
GONE = Deletion((Kind.SERVICE, "b", ORDERS), 9)
RULES = imports()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ([], set()),
        ([relay("10.0.0.8")], set()),
        ([service("b", NEW, 443)], {NEW}),
        ([service("b", "elsewhere.example", 443)], set()),  # nobody imports it
        ([service("d", NEW, 443)], set()),  # nor from there
        ([GONE], {ORDERS}),
        ([GONE, service("b", NEW, 443)], {ORDERS, NEW}),
        ([GONE, service("c", ORDERS, 443)], set()),  # it is ours still, from another network
        ([service("b", ORDERS, 9443)], set()),
    ],
)
def test_what_a_change_of_discovery_moves(changes: list, names: set[str]) -> None:  # type: ignore[type-arg]
    after = VIEW.apply(changes)
    assert without_srv(changed_owner(VIEW, RULES, after, RULES)) == names
    assert without_srv(changed_owner(after, RULES, VIEW, RULES)) == names
    assert without_srv(changed_owner(VIEW, RULES, after, imports())) == names  # other rules that mean the same


def test_names_with_srv_records_move_with_their_service() -> None:
    """A cached NXDOMAIN for _https._tcp must not outlive the move, in either direction."""
    spec = ServiceSpec(name=NEW, ports={"8443": []}, port_names={"https": 8443})
    after = VIEW.apply([Record(kind=Kind.SERVICE, network="b", id="new", revision=9, spec=spec)])
    expected = {NEW, f"_tcp.{NEW}", f"_8443._tcp.{NEW}", f"_https._tcp.{NEW}"}
    assert changed_owner(VIEW, RULES, after, RULES) == expected
    assert changed_owner(after, RULES, VIEW, RULES) == expected


def test_what_a_change_of_imports_moves() -> None:
    none, orders = Imports(), Imports([ImportRule(names=(ORDERS,), sources=("b",))])
    assert changed_owner(VIEW, none, VIEW, orders) == {ORDERS, f"_tcp.{ORDERS}", f"_8443._tcp.{ORDERS}"}
    assert ORDERS not in changed_owner(VIEW, orders, VIEW, RULES)
    assert changed_owner(VIEW, orders, VIEW, RULES) == changed_owner(VIEW, RULES, VIEW, orders) != set()
