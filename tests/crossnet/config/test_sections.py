"""What the sections read from the machine. Their rules are tested in test_file.py, line by line."""

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from crossnet.app import role_configs
from crossnet.config.file import ConfigError, effective, load
from crossnet.config.sections import search_domains
from discovery.model.names import ServiceTarget
from sniproxy.access.reach import Reach
from sniproxy.access.rules import MAX_ITEMS, MAX_RULES, NameKind
from turnreg.gateway.activation_trigger import Command, HttpCall


def test_the_last_search_line_counts_and_invalid_zones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 10.0.0.1\ndomain old.example\nsearch Corp.Example. . bad..name other.example\n")
    assert search_domains(path) == ("corp.example", "other.example")


def test_a_machine_without_a_resolver_has_none(tmp_path: Path) -> None:
    assert search_domains(tmp_path / "absent") == ()


GATEWAY = "network: b\ndiscovery: http://127.0.0.1:1\ngateway: {id: g, allow: [10.0.0.0/8], rules: %s}\n"


def test_rules_are_read_and_shown_again(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        GATEWAY % '[{from: [a, 10.1.0.0/16], to: "**.svc.cluster.local", names: service, ports: [443, 8000-8099], '
        "action: allow}]"
    )
    read = load(path)
    assert "names: [service]" in effective(read)
    assert "from: [a, 10.1.0.0/16]" in effective(read)
    assert read.gateway is not None
    policy = role_configs.gateway_config(read, read.gateway, []).policy
    flow = Reach("b", read.domain).flow(
        ServiceTarget("b", "orders.shop.svc.cluster.local", 8000),
        name="orders.shop.svc.cluster.local",
        client=ip_address("192.168.0.1"),
        from_network="a",
        address=None,
        port=8000,
    )
    assert policy.refusal(flow) is None
    assert policy.refusal(replace(flow, kind=NameKind.ADDRESS)) == "no rule allows it"


@pytest.mark.parametrize(
    ("rules", "faults"),
    [
        (
            (
                "[{from: [a, 10.0.0.1/8], to: [Big.name, b], names: [plain], ports: [0, 9-8, 1], action: maybe}, "
                "{to: [a.*b], acton: deny}]"
            ),
            [
                "$.gateway.rules[0].from[1]: expected a CIDR of clients or a network id, got '10.0.0.1/8'",
                (
                    "$.gateway.rules[0].to[0]: expected a network id, a name or a target (a label is lower-case letters, digits "
                    "and inner '-' or '_', or '*', or '**' in front), got 'Big.name'"
                ),
                "$.gateway.rules[0].names[0]: expected service or address, got 'plain'",
                "$.gateway.rules[0].ports[0]: expected a port or a range such as 8000-8099, got 0",
                "$.gateway.rules[0].ports[1]: expected a port or a range such as 8000-8099, got '9-8'",
                "$.gateway.rules[0].action: expected allow or deny, got 'maybe'",
                "$.gateway.rules[1].acton: expected a known key such as action, got an unknown key",
                (
                    "$.gateway.rules[1].to[0]: expected a network id, a name or a target (a label is lower-case letters, digits "
                    "and inner '-' or '_', or '*', or '**' in front), got 'a.*b'"
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
def test_every_bad_item_of_a_rule_is_reported(tmp_path: Path, rules: str, faults: list[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GATEWAY % rules)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert [str(fault) for fault in refused.value.faults] == faults


ACTIVATE = """
network: b
discovery: http://127.0.0.1:1
insecure: {insecure}
gateway: {{id: g, allow: [10.0.0.0/8], activate: {rules}}}
"""


def test_how_services_are_woken_is_read_and_shown_again(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    path = tmp_path / "x.yaml"
    rules = (
        "[{names: ['*.shop.example', pay.example], command: [/bin/wake, --now], timeout: 3s},"
        " {names: '**.example', url: 'https://scaler.example/wake', method: PATCH, body: '{}', token: {file: token}, max_held: 7}]"
    )
    path.write_text(ACTIVATE.format(insecure="false", rules=rules))
    read = load(path)
    shown = effective(read)
    assert "secret" not in shown
    assert "*.shop.example" in shown
    assert read.gateway is not None
    command, call = role_configs.gateway_config(read, read.gateway, []).activate
    assert [name.matches("orders.shop.example") for name in command.names] == [True, False]
    assert command.trigger == Command(("/bin/wake", "--now"))
    assert (command.timeout_s, command.cooldown_s, command.max_held) == (3.0, 30.0, 256)
    assert call.trigger == HttpCall(url="https://scaler.example/wake", method="PATCH", body="{}", token="secret")
    assert (call.timeout_s, call.max_held) == (30.0, 7)


@pytest.mark.parametrize(
    ("rules", "faults"),
    [
        ("[{names: [a.b]}]", ["$.gateway.activate[0]: expected one of command and url, got none"]),
        (
            "[{names: [a.b], command: [x], url: 'https://h/'}]",
            ["$.gateway.activate[0]: expected one of command and url, got both"],
        ),
        (
            "[{names: [], command: [x], token: {file: x.yaml}, ca: x.yaml, timeout: 121s}]",
            [
                (
                    "$.gateway.activate[0].token.file: expected a file with one line of ASCII text, got 'x.yaml', "
                    "which has something else"
                ),
                "$.gateway.activate[0].names: expected one name or more, got none",
                "$.gateway.activate[0].timeout: expected 120s or less, since relays wait no longer, got 121s",
            ],
        ),
        (
            "[{names: a.b, command: [x], ca: x.yaml, body: x}]",
            [
                "$.gateway.activate[0].body: expected nothing, since a command is run, got a value",
                "$.gateway.activate[0].ca: expected nothing, since a command is run, got a value",
            ],
        ),
        (
            "[{names: [orders, Big.name], command: ['', 7]}, {names: a.b, url: 'ftp://h/', method: DELETE}]",
            [
                (
                    "$.gateway.activate[0].names[0]: expected the name of a service or a pattern of such (a pattern has two "
                    "labels or more, 253 characters at most), got 'orders'"
                ),
                (
                    "$.gateway.activate[0].names[1]: expected the name of a service or a pattern of such (a label is lower-case "
                    "letters, digits and inner '-' or '_', or '*', or '**' in front), got 'Big.name'"
                ),
                "$.gateway.activate[0].command[0]: expected a program or an argument, as text, got ''",
                "$.gateway.activate[0].command[1]: expected a program or an argument, as text, got 7",
                "$.gateway.activate[1].url: expected https://HOST[:PORT]/PATH, got 'ftp://h/'",
                "$.gateway.activate[1].method: expected GET or POST or PUT or PATCH, got 'DELETE'",
            ],
        ),
        (
            "[{names: a.b, url: 'https://user:word@h/'}]",
            ["$.gateway.activate[0].url: expected https://HOST[:PORT]/PATH, got something else"],
        ),
        (
            "[{names: a.b, url: 'http://127.0.0.1:1/'}, {names: a.b, url: 'http://scaler.example/'}]",
            [
                (
                    "$.gateway.activate[1].url: expected https, or http to loopback, or insecure: true, "
                    "got 'http://scaler.example/'"
                )
            ],
        ),
        (
            "[{names: a.b, command: [" + ", ".join(["x"] * 257) + "]}]",
            ["$.gateway.activate[0].command: expected at most 256 items, got 257"],
        ),
        (
            "[" + ", ".join(["{names: a.b, command: [x]}"] * 257) + "]",
            ["$.gateway.activate: expected at most 256 rules, got 257"],
        ),
    ],
)
def test_every_error_in_activate_is_reported(tmp_path: Path, rules: str, faults: list[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(ACTIVATE.format(insecure="false", rules=rules))
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert [str(fault) for fault in refused.value.faults] == faults


def test_unencrypted_calls_need_insecure(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(ACTIVATE.format(insecure="true", rules="[{names: a.b, url: 'http://scaler.example/'}]"))
    assert load(path).gateway is not None


def test_secrets_of_a_url_that_wakes_services_are_shown_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    rule = "{names: a.b, url: 'https://h/scale?key=hush', body: 'hush too'}"
    path.write_text(ACTIVATE.format(insecure="false", rules=f"[{rule}]"))
    text = effective(load(path))
    assert "hush" not in text
    assert "https://h/scale?***" in text
    for url in ("ftp://h/?hush", "https://me:hush@h/"):
        path.write_text(ACTIVATE.format(insecure="false", rules=f"[{{names: a.b, url: '{url}'}}]"))
        with pytest.raises(ConfigError) as refused:
            load(path)
        assert "hush" not in str(refused.value)
