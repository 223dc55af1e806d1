"""Imports: which rule matches a name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.imports import BadImport, ImportRule, Imports


def rule(*names: str, sources: tuple[str, ...] = ("b",)) -> ImportRule:
    return ImportRule(names=names, sources=sources)


def test_a_star_is_exactly_one_label() -> None:
    imports = Imports([rule("*.shop.svc.cluster.local")])
    assert imports.rule_for("orders.shop.svc.cluster.local") is imports.rules[0]
    assert imports.rule_for("ORDERS.shop.svc.cluster.local.") is imports.rules[0]
    assert imports.rule_for("a.orders.shop.svc.cluster.local") is None
    assert imports.rule_for("shop.svc.cluster.local") is None
    assert imports.rule_for("orders.shop.svc.cluster.localx") is None


def test_a_star_may_be_any_label() -> None:
    imports = Imports([rule("orders.*.svc.*")])
    assert imports.rule_for("orders.shop.svc.local")
    assert imports.rule_for("orders.shop.other.local") is None


def test_the_first_matching_rule_is_used() -> None:
    first, second, third = rule("*.shop.a"), rule("orders.shop.a", "x.y"), rule("x.y", "*.y", sources=("c",))
    imports = Imports([first, second, third])
    assert imports.rule_for("orders.shop.a") is first
    assert imports.rule_for("x.y") is second
    assert imports.rule_for("z.y") is third
    assert Imports([second, first]).rule_for("orders.shop.a") is second


def test_nothing_is_imported_by_default() -> None:
    assert Imports().rule_for("orders.shop") is None
    assert not Imports()


@given(st.one_of(st.text(max_size=300)))
def test_any_text_can_be_looked_up(name: str) -> None:
    Imports([rule("*.shop.a")]).rule_for(name)


@pytest.mark.parametrize(
    ("names", "sources", "path"),
    [
        ((), ("b",), "names"),
        (("orders.shop",), (), "from"),
        (("orders.shop", "shop"), ("b",), "names[1]"),
        (("*",), ("b",), "names[0]"),
        (("a*.shop",), ("b",), "names[0]"),
        (("**.shop",), ("b",), "names[0]"),
        (("Orders.shop",), ("b",), "names[0]"),
        (("orders.shop.",), ("b",), "names[0]"),
        (("orders.shop",), ("b", "C"), "from[1]"),
        (("orders.shop",), ("b", "b"), "from"),
        (tuple(f"a{n}.b" for n in range(2000)), ("b",), "names"),
    ],
)
def test_bad_rules(names: tuple[str, ...], sources: tuple[str, ...], path: str) -> None:
    with pytest.raises(BadImport) as caught:
        ImportRule(names=names, sources=sources)
    assert caught.value.path == path


def test_rules_are_bounded() -> None:
    with pytest.raises(BadImport):
        Imports([rule("a.b")] * 5000)
    with pytest.raises(BadImport):
        ImportRule(names=("a.b",), sources=("b",), prefer="other")  # type: ignore[arg-type]
