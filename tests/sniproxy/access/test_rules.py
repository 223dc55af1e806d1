"""Rules: what each kind of item matches, which rule decides, and which rules are invalid."""

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.names import PlainName, ServiceTarget, decode
from sniproxy.access.rules import MAX_ITEMS, MAX_RULES, Alias, BadRule, Flow, NameKind, Policy, Rule

D = "svc.mesh.internal"


def flow(**changes: Any) -> Flow:
    made: dict[str, Any] = {
        "client": ip_address("10.1.2.3"),
        "from_network": "a",
        "network": "b",
        "kind": NameKind.SERVICE,
        "name": "orders.shop.svc.cluster.local",
        "address": ip_address("10.9.0.5"),
        "port": 8443,
    }
    made |= changes
    name, port = made.pop("name"), made["port"]
    asked = decode(name, D)
    target = ServiceTarget("b", name, port) if isinstance(asked, PlainName) else asked
    aliases = (Alias(frozenset([target]), frozenset([port])),)
    return Flow(called=frozenset([name]), aliases=aliases, asked_port=port, domain=D, **made)


@pytest.mark.parametrize(
    ("rule", "changes", "expected"),
    [
        ({}, {}, True),
        ({"sources": ["10.1.0.0/16"]}, {}, True),
        ({"sources": ["10.2.0.0/16"]}, {}, False),
        ({"sources": ["10.2.0.0/16", "10.1.2.3"]}, {}, True),
        ({"sources": ["fd00::/8"]}, {}, False),
        ({"sources": ["a"]}, {}, True),
        ({"sources": ["c"]}, {}, False),
        ({"sources": ["a"]}, {"from_network": None}, False),
        ({"sources": ["c", "10.0.0.0/8"]}, {}, True),
        ({"to": ["b"]}, {}, True),
        ({"to": ["c"]}, {}, False),
        ({"to": ["orders.shop.svc.cluster.local"]}, {}, True),
        ({"to": ["*.shop.svc.cluster.local"]}, {}, True),
        ({"to": ["*.svc.cluster.local"]}, {}, False),
        ({"to": ["**.svc.cluster.local"]}, {}, True),
        ({"to": ["**.shop.svc.cluster.local"]}, {"name": "shop.svc.cluster.local"}, False),
        ({"to": ["_8443._10-9-0-5._b.svc.mesh.internal"]}, {"name": "_8443._10-9-0-5._b.svc.mesh.internal"}, True),
        ({"to": ["*.b.svc.mesh.internal"]}, {"name": "p8443-10-9-0-5.b.svc.mesh.internal"}, True),
        ({"to": ["10.9.0.0/16"]}, {}, True),
        ({"to": ["10.9.0.0/16:443"]}, {}, False),
        ({"to": ["10.9.0.5:8000-9000"]}, {}, True),
        ({"to": ["10.9.0.0/16"]}, {"address": None}, False),
        ({"to": ["[fd00::/8]:8443"]}, {"address": ip_address("fd00::5")}, True),
        ({"names": ["service"]}, {}, True),
        ({"names": ["address"]}, {}, False),
        ({"names": ["address", "service"]}, {"kind": NameKind.ADDRESS}, True),
        ({"to": ["b"], "names": ["service"]}, {"kind": NameKind.ADDRESS}, False),
        ({"ports": [8443]}, {}, True),
        ({"ports": ["8000-8442", "8444"]}, {}, False),
        ({"ports": ["8000-9000"]}, {}, True),
        ({"sources": ["10.1.0.0/16"], "to": ["b"], "ports": ["443"]}, {}, False),
    ],
)
def test_what_a_rule_matches(rule: dict[str, Any], changes: dict[str, Any], expected: bool) -> None:
    for action in ("allow", "deny"):
        decision = Policy((Rule.parse(action=action, **rule),)).decide(flow(**changes))
        assert decision == (action == "allow" and expected, 0 if expected else None)


def test_the_first_match_decides_and_the_rest_is_denied() -> None:
    policy = Policy(
        (
            Rule.parse(action="deny", sources=["10.1.2.3"], to=["b"], ports=[22]),
            Rule.parse(action="allow", sources=["10.1.0.0/16"], to=["b"]),
        )
    )
    assert policy.refusal(flow()) is None
    assert policy.refusal(flow(port=22)) == "rule 1 denies it"
    assert policy.refusal(flow(network="c")) == "no rule allows it"


def test_without_rules_everything_may_go() -> None:
    assert Policy().refusal(flow()) is None


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ({"action": "maybe"}, "action"),
        ({"sources": ["10.0.0.1/8"]}, "from[0]"),
        ({"sources": ["a", "B"]}, "from[1]"),
        ({"sources": ["10"]}, "from[0]"),
        ({"to": ["10.0.0.0/33"]}, "to[0]"),
        ({"to": ["a.*b.c"]}, "to[0]"),
        ({"to": ["a.**.c"]}, "to[0]"),
        ({"to": [""]}, "to[0]"),
        ({"to": ["b", "Orders.shop"]}, "to[1]"),
        ({"names": ["service", "target"]}, "names[1]"),
        ({"ports": [0]}, "ports[0]"),
        ({"ports": ["9-8"]}, "ports[0]"),
        ({"ports": ["443", "x"]}, "ports[1]"),
        ({"to": ["b"] * (MAX_ITEMS + 1)}, "to"),
    ],
)
def test_invalid_rules(rule: dict[str, Any], path: str) -> None:
    with pytest.raises(BadRule) as caught:
        Rule.parse(**({"action": "allow"} | rule))
    assert caught.value.path == path


def test_rules_are_bounded() -> None:
    with pytest.raises(BadRule):
        Policy((Rule.parse(action="allow"),) * (MAX_RULES + 1))


@given(st.text(max_size=300))
def test_any_text_is_a_rule_or_a_bad_rule(text: str) -> None:
    for key in ("sources", "to", "names", "ports"):
        try:
            Rule.parse(action="allow", **{key: [text]})
        except BadRule:
            pass


@pytest.mark.parametrize(
    ("rules", "hopeless"),
    [
        ([], False),
        ([{"action": "allow"}], False),
        ([{"action": "deny"}], True),
        ([{"action": "allow", "sources": ["c"]}], True),
        ([{"action": "allow", "to": ["10.9.0.0/16"]}], False),
        ([{"action": "allow", "to": ["c", "*.other.example"]}], True),
        ([{"action": "allow", "ports": [1]}], False),
        ([{"action": "deny", "to": ["10.9.0.0/16"]}, {"action": "allow"}], False),
        ([{"action": "deny", "ports": [8443]}, {"action": "allow"}], False),
        ([{"action": "deny", "sources": ["a"]}, {"action": "allow"}], True),
        ([{"action": "deny", "to": ["b"]}, {"action": "allow", "to": ["10.0.0.0/8"]}], True),
        ([{"action": "deny", "to": ["c", "10.0.0.0/8"]}, {"action": "allow", "ports": [1]}], False),
        ([{"action": "deny", "to": ["orders.shop.svc.cluster.local"]}, {"action": "allow"}], True),
        ([{"action": "allow", "names": ["address"]}], True),
        ([{"action": "deny", "names": ["address"]}, {"action": "allow"}], False),
    ],
)
def test_what_is_denied_wherever_it_comes_to(rules: list[dict[str, Any]], hopeless: bool) -> None:
    policy = Policy(tuple(Rule.parse(**rule) for rule in rules))
    assert policy.is_hopeless(flow(address=None)) is hopeless
    assert policy.is_hopeless(flow()) is hopeless, "an address that is known by chance changes nothing"
    if hopeless:
        for port in (1, 443, 8443):
            for address in ("10.9.0.5", "10.0.0.1", "192.0.2.1", "fd00::5"):
                assert policy.refusal(flow(address=ip_address(address), port=port)) is not None
