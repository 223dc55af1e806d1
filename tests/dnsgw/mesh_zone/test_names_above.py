"""Names that exist because there are imported names below them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Deletion, Kind, Mesh
from dnsgw.mesh_zone.names_above import NamesAbove, above
from dnsgw.message.question import wire_name
from tests.support.dns_meshes import ORDERS, imports, mesh, relay, service

VIEW = mesh(relay("10.0.0.9"))


@pytest.mark.parametrize(
    ("name", "uppers"),
    [
        ("", []),
        ("local", []),
        ("a.local", ["local"]),
        (ORDERS, ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "local"]),
    ],
)
def test_the_names_above_a_name(name: str, uppers: list[str]) -> None:
    assert list(above(wire_name(name))) == [wire_name(upper) for upper in uppers]


@pytest.mark.parametrize(
    ("name", "is_above"),
    [
        ("shop.svc.cluster.local", True),
        ("cluster.local", True),
        ("local", True),
        ("depot.example", True),
        ("example", True),
        (ORDERS, False),
        ("svc.cluster.test", False),  # offered, and not imported
        ("other.svc.cluster.local", False),
        ("hop.svc.cluster.local", False),
        ("", False),
    ],
)
def test_names_above_imports_that_are_offered(name: str, is_above: bool) -> None:
    assert NamesAbove().contains(wire_name(name), VIEW, imports()) is is_above


def test_it_follows_discovery_and_the_imports() -> None:
    names = NamesAbove()
    shop, depot = wire_name("shop.svc.cluster.local"), wire_name("depot.example")
    assert names.contains(shop, VIEW, imports())
    without = VIEW.apply([Deletion((Kind.SERVICE, "b", ORDERS), 9)])
    assert names.contains(shop, without, imports())  # another one is still there
    without = without.apply([Deletion((Kind.SERVICE, "b", "bills.shop.svc.cluster.local"), 10)])
    assert not names.contains(shop, without, imports())
    assert names.contains(depot, without, imports())
    assert not names.contains(depot, without, Imports())
    assert not names.contains(depot, without, Imports([ImportRule(names=("stock.depot.example",), sources=("b",))]))
    assert names.contains(shop, without.apply([service("c", ORDERS, 443)]), imports())
    assert not names.contains(shop, Mesh.EMPTY, imports())


LABEL = st.sampled_from(["a", "b", "shop"])
NAME = st.lists(LABEL, min_size=2, max_size=4).map(lambda labels: ".".join((*labels, "test")))
CHANGES = st.lists(st.tuples(st.sampled_from("bc"), NAME, st.booleans()), max_size=30)


@given(CHANGES)
def test_after_any_changes_it_knows_what_a_new_one_would(changes: list[tuple[str, str, bool]]) -> None:
    rules = Imports([ImportRule(names=("*.*.test", "*.b.*.test", "*.*.shop.*.test"), sources=("b", "c"))])
    names, view = NamesAbove(), VIEW
    for network, name, there in changes:
        view = view.apply([service(network, name, 443) if there else Deletion((Kind.SERVICE, network, name), 99)])
        for asked in ("test", "b.test", "shop.test", "a.b.test", "b.shop.test", "shop.a.test", name):
            wire = wire_name(asked)
            assert names.contains(wire, view, rules) == NamesAbove().contains(wire, view, rules)
