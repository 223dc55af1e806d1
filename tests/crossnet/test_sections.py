"""What the sections read of the machine. Their rules are told in test_config.py, line by line."""

from ipaddress import ip_address
from pathlib import Path

import pytest

from crossnet import roles
from crossnet.config import ConfigError, effective, load
from crossnet.sections import search_domains
from sniproxy.stream.policy import MAX_ITEMS, MAX_RULES, Flow


def test_the_last_search_line_counts_and_what_names_no_zone_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 10.0.0.1\ndomain old.example\nsearch Corp.Example. . bad..name other.example\n")
    assert search_domains(path) == ("corp.example", "other.example")


def test_a_machine_without_a_resolver_has_none(tmp_path: Path) -> None:
    assert search_domains(tmp_path / "absent") == ()


GATEWAY = "network: b\ndiscovery: http://127.0.0.1:1\ngateway: {id: g, allow: [10.0.0.0/8], rules: %s}\n"


def test_rules_are_read_and_shown_again(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        GATEWAY % '[{from: [a, 10.1.0.0/16], to: "**.svc.cluster.local", ports: [443, 8000-8099], action: allow}]'
    )
    read = load(path)
    assert "from: [a, 10.1.0.0/16]" in effective(read)
    assert read.gateway is not None
    policy = roles.gateway_config(read, read.gateway, []).policy
    flow = Flow(
        client=ip_address("192.168.0.1"),
        from_network="a",
        network="b",
        name="orders.shop.svc.cluster.local",
        address=ip_address("10.0.0.1"),
        port=8000,
    )
    assert policy.refusal(flow) is None


@pytest.mark.parametrize(
    ("rules", "faults"),
    [
        (
            "[{from: [a, 10.0.0.1/8], to: [Big.name, b], ports: [0, 9-8, 1], action: maybe}, {to: [a.*b], acton: deny}]",
            [
                "$.gateway.rules[0].from[1]: expected a CIDR of clients or a network id, got '10.0.0.1/8'",
                (
                    "$.gateway.rules[0].to[0]: expected a network id, a name or a target (a label is lower-case letters, digits "
                    "and inner hyphens, or '*', or '**' in front), got 'Big.name'"
                ),
                "$.gateway.rules[0].ports[0]: expected a port or a range such as 8000-8099, got 0",
                "$.gateway.rules[0].ports[1]: expected a port or a range such as 8000-8099, got '9-8'",
                "$.gateway.rules[0].action: expected allow or deny, got 'maybe'",
                "$.gateway.rules[1].acton: expected a known key such as action, got an unknown key",
                (
                    "$.gateway.rules[1].to[0]: expected a network id, a name or a target (a label is lower-case letters, digits "
                    "and inner hyphens, or '*', or '**' in front), got 'a.*b'"
                ),
                "$.gateway.rules[1].action: expected allow or deny, got nothing",
            ],
        ),
        ("[{to: true, action: deny}]", ["$.gateway.rules[0].to: expected a network id, a name or a target, got true"]),
        (
            f"[{{to: [{', '.join(['b'] * (MAX_ITEMS + 1))}], action: deny}}]",
            [f"$.gateway.rules[0].to: expected at most {MAX_ITEMS} items, got more"],
        ),
        (
            f"[{', '.join(['{action: deny}'] * (MAX_RULES + 1))}]",
            [f"$.gateway.rules: expected at most {MAX_RULES} rules, got more"],
        ),
    ],
)
def test_every_bad_item_of_a_rule_is_told(tmp_path: Path, rules: str, faults: list[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GATEWAY % rules)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert [str(fault) for fault in refused.value.faults] == faults
