"""Tokens: the file, the lookup, and the rights of each token."""

from pathlib import Path

import msgspec
import pytest

from discovery.api.tokens import (
    OPEN,
    Principal,
    Tokens,
    format_entry,
    hash_token,
    make_entry,
    make_token,
    matches,
    redacted,
)
from discovery.files.yaml_file import BadFile
from discovery.model.mesh import AnyRecord, Kind, NetworkSpec, Record, ServiceSpec, VipSpec
from discovery.model.spec import HealthCheck

SERVICE: AnyRecord = Record(
    kind=Kind.SERVICE,
    network="b",
    id="s",
    revision=1,
    lease="l",
    spec=ServiceSpec(
        name="orders.shop",
        ports={"8443": ["10.1.0.5:8443"], "9443": []},
        proxy_protocol=True,
        health=HealthCheck(check="tcp"),
    ),
)
VIP: AnyRecord = Record(
    kind=Kind.VIP, network="b", id="v", revision=1, spec=VipSpec(name="orders.shop", address="10.200.0.1")
)


def find(path: Path, token: str) -> Principal | None:
    return Tokens.load(path).find(token)


def test_a_token_is_found_by_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    token = make_token()
    entry = make_entry(token, name="gw-1", network="b", kinds=[Kind.ALLOCATION, Kind.SERVICE], names=["*.shop"])
    operator = make_token()
    lines = [format_entry(entry), format_entry(make_entry(operator, admin=True))]
    assert token not in "".join(lines)
    path.write_text("\n".join(lines))
    assert len(Tokens.load(path)) == 2
    found = find(path, token)
    assert found is not None
    assert (found.name, found.network, found.admin) == ("gw-1", "b", False)
    assert found.kinds == {Kind.ALLOCATION, Kind.SERVICE}
    admin = find(path, operator)
    assert admin is not None
    assert admin.admin
    assert admin.name == hash_token(operator)[:12]
    assert admin.owner != found.owner
    for other in ("", "x", token + " ", token[:-1], "\udcff", make_token()):
        assert find(path, other) is None


def test_tokens_are_long_and_unique() -> None:
    assert len({make_token() for _ in range(100)}) == 100
    assert len(make_token()) >= len("crossnet-") + 43


def test_an_empty_file_accepts_no_token(tmp_path: Path) -> None:
    (tmp_path / "tokens.yaml").write_text("# none yet\n")
    assert len(Tokens.load(tmp_path / "tokens.yaml")) == 0
    assert Tokens().find("x") is None


def test_all_errors_of_a_file_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    good = hash_token("x")
    path.write_text(
        f"""
        - {{hash: {good}, network: b, kinds: [relay, rely], names: ["*.shop", "shop", "a.**"]}}
        - {{hash: {good}, network: B}}
        - {{hash: the-token-itself}}
        - {{hash: {good.upper()}, network: c, name: "a:b"}}
        """
    )
    with pytest.raises(BadFile) as caught:
        Tokens.load(path)
    told = [str(fault) for fault in caught.value.faults]
    assert told == [
        "$[0].kinds[1]: expected one of network, relay, turn, allocation, gateway, service, vip, got 'rely'",
        "$[0].names[1]: expected a service name whose labels may be '*', the first one '**', got 'shop'",
        "$[0].names[2]: expected a service name whose labels may be '*', the first one '**', got 'a.**'",
        "$[1].network: expected a network id, got 'B'",
        "$[1].hash: expected each token once, got that of $[0]",
        "$[2].hash: expected the SHA-256 of a token, 64 lower-case hexadecimal digits, got something else",
        "$[2].network: expected a network id, or admin: true, got nothing",
        "$[3].hash: expected the SHA-256 of a token, 64 lower-case hexadecimal digits, got something else",
        "$[3].name: expected letters, digits, '-', '.' and '_', 63 at most, got 'a:b'",
        "$[3].hash: expected each token once, got that of $[0]",
    ]
    assert "the-token-itself" not in str(caught.value)
    path.write_text("- {hsh: 1}\n- 3")
    with pytest.raises(BadFile) as caught:
        Tokens.load(path)
    assert len(caught.value.faults) == 2
    with pytest.raises(BadFile):
        make_entry("x", network="B")


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("orders.shop", ["orders.shop"], ["a.orders.shop", "orders.shops", "shop"]),
        ("*.shop", ["orders.shop"], ["a.orders.shop", "shop"]),
        ("*.*.svc", ["a.b.svc"], ["a.svc", "a.b.c.svc"]),
        ("**.svc", ["a.svc", "a.b.svc"], ["svc", "a.b.svcx"]),
        ("**", ["a.b", "a.b.c"], []),
        ("**.*.svc", ["a.b.svc"], ["b.svc"]),
    ],
)
def test_globs(glob: str, yes: list[str], no: list[str]) -> None:
    assert all(matches(glob, name) for name in yes)
    assert not any(matches(glob, name) for name in no)


def test_which_records_a_token_may_write() -> None:
    who = Principal(
        name="n", network="b", kinds=frozenset({Kind.SERVICE, Kind.VIP}), names=("*.shop",), admin=False, owner="o"
    )
    assert who.refusal_to_write(SERVICE.key, [SERVICE.spec]) is None
    assert who.refusal_to_write(VIP.key, [VIP.spec]) is None
    assert "not 'c'" in (who.refusal_to_write((Kind.SERVICE, "c", "s")) or "")
    assert "relay" in (who.refusal_to_write((Kind.RELAY, "b", "r")) or "")
    other = ServiceSpec(name="orders.bank", ports={"1": []})
    assert "orders.bank" in (who.refusal_to_write(SERVICE.key, [SERVICE.spec, other]) or "")
    assert who.refusal_of_credentials() is not None
    assert OPEN.refusal_to_write((Kind.SERVICE, "c", "s"), [other]) is None
    assert OPEN.refusal_of_credentials() is None


def test_which_records_a_token_sees() -> None:
    seen = redacted(SERVICE)
    assert seen is not None
    assert seen.spec.ports == {"8443": [], "9443": []}
    assert seen.spec.proxy_protocol
    assert seen.spec.health is None, "a version of another network may not know it"
    assert seen.lease is None
    assert SERVICE.spec.ports["8443"] == ["10.1.0.5:8443"]
    assert redacted(VIP) is None
    network: AnyRecord = Record(kind=Kind.NETWORK, network="b", id="b", revision=1, spec=NetworkSpec())
    assert redacted(network) == network
    mine = Principal(name="n", network="b", kinds=frozenset(), owner="o")
    assert mine.view(SERVICE) is SERVICE
    assert mine.view(msgspec.structs.replace(SERVICE, network="c")) != msgspec.structs.replace(SERVICE, network="c")
    assert OPEN.view(VIP) is VIP


def test_certificates_identify_principals(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(
        "- {certificate: 'spiffe://m.example/b/*', network: b, kinds: [relay]}\n"
        "- {certificate: 'spiffe://m.example/b/gw', name: gw, network: b, kinds: [gateway]}\n"
        "- {certificate: gw.c.example, network: c}\n"
    )
    tokens = Tokens.load(path)
    assert len(tokens) == 3

    def network_and_kinds(*names: str) -> tuple[str | None, list[str]] | None:
        found = tokens.find_certificate(names)
        return None if found is None else (found.network, sorted(found.kinds))

    assert network_and_kinds("spiffe://m.example/b/gw") == ("b", ["gateway"])
    assert network_and_kinds("spiffe://m.example/b/x/y") == ("b", ["relay"])
    assert network_and_kinds("nothing.example", "gw.c.example") == ("c", [])
    for name in ("spiffe://m.example/b", "spiffe://m.example/c/gw", "spiffe://m.example/", "x.gw.c.example", ""):
        assert network_and_kinds(name) is None
    assert tokens.find("gw.c.example") is None
    assert Tokens.load(path).still(tokens.find_certificate(["gw.c.example"]))  # type: ignore[arg-type]
    assert not Tokens().still(tokens.find_certificate(["gw.c.example"]))  # type: ignore[arg-type]
    owners = {tokens.find_certificate([name]).owner for name in ("spiffe://m.example/b/gw", "gw.c.example")}  # type: ignore[union-attr]
    assert len(owners) == 2


def test_invalid_certificate_names(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    for entry in (
        "{network: b}",
        f"{{certificate: a.b, hash: {'a' * 64}, network: b}}",
        "{certificate: a, network: b}",
        "{certificate: '*', network: b}",
        "{certificate: 'spiffe://', network: b}",
        "{certificate: a.b, network: b}\n- {certificate: a.b, network: c}",
    ):
        path.write_text(f"- {entry}")
        with pytest.raises(BadFile) as caught:
            Tokens.load(path)
        assert len(caught.value.faults) == 1


def test_a_member_is_added_only_to_a_service_that_the_token_covers() -> None:
    key = (Kind.SERVICE, "b", "pod")
    pod = ServiceSpec(name="db-0.db.shop.x", ports={"1": []}, member_of="db.shop.x")

    def refusal(*names: str) -> str | None:
        kinds = frozenset({Kind.SERVICE})
        return Principal(name="n", network="b", kinds=kinds, names=names, owner="o").refusal_to_write(key, [pod])

    assert refusal("**.shop.x") is None
    assert "'db.shop.x'" in (refusal("*.db.shop.x") or "")
    assert "'db-0.db.shop.x'" in (refusal("*.shop.x") or "")
