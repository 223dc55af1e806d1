"""`crossnet check -c FILE NAME…`: it names the rule that a running process applies."""

from pathlib import Path

import pytest

from crossnet.cli.main import main
from discovery.client import snapshot_file
from discovery.client.mesh_file import load_mesh

D = "svc.mesh.internal"
MESH = """
networks: [{id: a}, {id: b}, {id: c}]
services:
  - {name: orders.shop.example, network: b, ports: {443: ["10.90.0.5:8443"]}}
  - {name: db.shop.example, network: b, ports: {5432: ["10.90.0.6:5432"]}}
  - {name: sleeps.shop.example, network: b, ports: {443: []}}
  - {name: web.shop.example, network: a, ports: {443: ["10.80.0.5:443"]}}
"""
RELAY = """
network: a
discovery: mesh.yaml
import: [{names: [orders.shop.example], from: [b]}]
relay:
  id: r
  listen: "127.0.0.1:443"
  deliver: [10.80.0.0/16]
"""
RULES = """  rules:
    - {from: [10.1.0.0/16], to: [b], names: service, action: allow}
    - {to: [db.shop.example], action: deny}
    - {to: [c, 10.80.0.0/16], action: allow}
"""
GATEWAY = """
network: b
discovery: mesh.yaml
keys: {ab-1: {file: key, from: a, to: b}}
gateway:
  id: g
  allow: [10.90.0.0/16]
  rules:
    - {to: [db.shop.example], action: deny}
    - {from: [a, c], to: ["*.shop.example"], action: allow}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text("00" * 32)
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "mesh.yaml").write_text(MESH)
    (tmp_path / "relay.yaml").write_text(RELAY + RULES)
    (tmp_path / "open.yaml").write_text(RELAY)
    (tmp_path / "gateway.yaml").write_text(GATEWAY)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], folder: Path, file: str, *arguments: str, status: int = 0) -> list[str]:
    assert main(["check", "-c", str(folder / file), *arguments]) == status
    out = capsys.readouterr()
    return [line.strip() for line in (out.out + out.err).splitlines() if "warning" not in line]


@pytest.mark.parametrize(
    ("file", "name", "source", "expected"),
    [
        (
            "relay.yaml",
            "orders.shop.example",
            ["10.1.0.1"],
            ["rule 1 allows it: {from: [10.1.0.0/16], to: [b], names: [service]"],
        ),
        ("relay.yaml", "Orders.shop.example.", ["10.2.0.1"], ["no rule allows it"]),
        ("relay.yaml", "orders.shop.example", [], ["rule 1 allows it to its `from`", "no rule allows it"]),
        ("relay.yaml", f"p5432-db.shop.b.{D}", ["10.2.0.1"], ["rule 2 denies it: {to: [db.shop.example]"]),
        ("relay.yaml", f"p5432-10-90-0-6.b.{D}", ["10.1.0.1"], ["no rule allows it"]),
        ("relay.yaml", f"p1-10-0-0-1.c.{D}", [], ["rule 3 allows it"]),
        ("relay.yaml", f"p443-10-80-0-5.a.{D}", [], ["rule 3 allows it"]),
        ("relay.yaml", f"p443-10-70-0-5.a.{D}", [], ["no rule allows it", "is not in relay.deliver"]),
        ("relay.yaml", "stock.shop.example", [], ["refused, unknown_name"]),
        ("open.yaml", "orders.shop.example", [], ["no rules: it may go"]),
        (
            "open.yaml",
            f"p5432-10-90-0-6.b.{D}",
            [],
            ["no rules: it may go, unless its gateway knows it as an address of"],
        ),
        (
            "open.yaml",
            f"p443-10-80-0-5.a.{D}",
            [],
            ["address name of service 'web.shop.example', which is not imported"],
        ),
        ("open.yaml", f"_1._10-0-0-1._c.{D}", [], ["from which nothing is imported: import it, or have relay.rules"]),
        ("gateway.yaml", "orders.shop.example", ["a"], ["at 10.90.0.5:8443: rule 2 allows it: {from: [a, c]"]),
        ("gateway.yaml", "orders.shop.example", ["d"], ["no rule allows it"]),
        ("gateway.yaml", "orders.shop.example", ["10.1.0.1"], ["rule 2 allows it to its `from`", "no rule allows it"]),
        ("gateway.yaml", f"_5432._10-90-0-6._b.{D}", ["a"], ["rule 1 denies it"]),
        ("gateway.yaml", f"_8443._10-90-0-5._b.{D}", ["a"], ["no rule allows it"]),
        ("gateway.yaml", f"_8443._10-91-0-5._b.{D}", ["a"], ["denied, it is not in gateway.allow"]),
        ("gateway.yaml", f"p443-sleeps.shop.b.{D}", ["a"], ["rule 2 allows it"]),
        ("gateway.yaml", f"p443-orders.shop.c.{D}", ["a"], ["refused, wrong_target"]),
        ("gateway.yaml", "stock.shop.example", ["a"], ["refused, unknown_name"]),
        ("gateway.yaml", f"p1-stock.shop.b.{D}", ["a"], ["refused, unknown_name"]),
    ],
)
def test_the_rule_that_decides(
    capsys: pytest.CaptureFixture[str], folder: Path, file: str, name: str, source: list[str], expected: list[str]
) -> None:
    options = [f"--from={item}" for item in source]
    shown, *lines = told(capsys, folder, file, name, *options)
    assert shown == name
    assert len(lines) == len(expected), lines
    role = file.removesuffix(".yaml").replace("open", "relay")
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith(f"{role}: ")
        assert text in line


def test_several_names_and_one_that_is_none(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    lines = told(capsys, folder, "relay.yaml", "orders.shop.example", "bad", f"p1-10-0-0-1.c.{D}", status=1)
    assert any("crossnet check: bad: not_a_target" in line for line in lines)
    assert sum(line.startswith("relay: ") for line in lines) == 3


@pytest.mark.parametrize("option", ["--from=10.1.0.0/16", "--from=A", "--port=0", "--port=70000"])
def test_wrong_options(capsys: pytest.CaptureFixture[str], folder: Path, option: str) -> None:
    (line,) = told(capsys, folder, "relay.yaml", "orders.shop.example", option, status=2)
    assert "expected" in line


def test_a_snapshot_is_as_good_as_a_file(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    mesh = load_mesh(folder / "mesh.yaml")
    snapshot_file.save(folder / "snapshot", "b", "e", mesh, mesh.revision, 0.0)
    server = GATEWAY.replace("discovery: mesh.yaml", "discovery: http://127.0.0.1:1\nsnapshot: snapshot")
    (folder / "gateway.yaml").write_text(server)
    lines = told(capsys, folder, "gateway.yaml", f"p8443-10-90-0-5.b.{D}", "db.shop.example", "--from=a")
    assert [line.split(": ")[2] for line in lines if ": " in line] == ["no rule allows it", "rule 1 denies it"]
    (folder / "snapshot").write_bytes(b"broken")
    told(capsys, folder, "gateway.yaml", "db.shop.example", "--from=a")
    assert (folder / "snapshot").exists(), "it is not this command's to set aside"


def test_without_any_view_names_are_taken_as_they_stand(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for file in ("gateway.yaml", "relay.yaml"):
        text = (folder / file).read_text().replace("discovery: mesh.yaml", "discovery: http://127.0.0.1:1")
        (folder / file).write_text(text)
    lines = told(capsys, folder, "gateway.yaml", "db.shop.example", f"_443.orders.shop.example._b.{D}", "--from=a")
    assert "rule 1 denies it" in lines[1]
    assert "rule 2 allows it" in lines[3]
    assert "the services are not known" in lines[-1]
    lines = told(capsys, folder, "relay.yaml", "orders.shop.example", "stock.shop.example", "--from=10.1.0.1")
    assert "rule 1 allows it" in lines[1]
    assert "refused, unknown_name: no import rule" in lines[3]


def test_a_name_in_a_rule_that_matches_nothing_is_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = f"[_08443._10-1-0-5._b.{D}, p8443-10-1-0-5.b.{D}, shop.b.{D}, '*.shop.b.{D}', b, 10.0.0.0/8, orders.shop.example]"
    (folder / "relay.yaml").write_text(RELAY + f"  rules: [{{to: {names}, action: deny}}]\n")
    assert main(["check", "-c", str(folder / "relay.yaml")]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "matches nothing" in line]
    assert [line.split(": ")[2] for line in warned] == ["$.relay.rules[0].to[0]", "$.relay.rules[0].to[2]"]
