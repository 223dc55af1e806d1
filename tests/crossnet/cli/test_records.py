"""`crossnet records` and `crossnet token` against a running discovery server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.running import running

SPEC = {"name": "orders.shop.example", "ports": {"8443": ["10.1.0.5:8443"]}}


def crossnet(folder: Path, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crossnet", *arguments],
        cwd=folder, input=given, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a client's configuration of a running server, whose one token `crossnet token` made."""
    folder = tmp_path_factory.mktemp("records")
    made = crossnet(
        folder, "token", "new", "--name", "op", "--network", "b", "--kind", "service", "--names", "*.shop.example"
    )
    assert made.returncode == 0, made.stderr
    (folder / "token").write_text(made.stdout)
    entry = made.stderr.splitlines()[-1]
    admin = crossnet(folder, "token", "new", "--admin")
    (folder / "admin").write_text(admin.stdout)
    (folder / "tokens.yaml").write_text(f"{entry}\n{admin.stderr.splitlines()[-1]}\n")
    hashed = crossnet(folder, "token", "hash", given=made.stdout)
    assert hashed.stdout.strip() in entry
    server = "network: a\nadmin: 127.0.0.1:0\ndrain: 0\n"
    server += "discovery_server: {listen: '127.0.0.1:0', store: 'sqlite:x.db', tokens: {file: tokens.yaml}}\n"
    with running(folder, server, name="server") as process:
        address = process.started()["discovery_server"][0]
        (folder / "client.yaml").write_text(f"network: b\ndiscovery: 'http://{address}'\ntoken: {{file: token}}\n")
        (folder / "admin.yaml").write_text(f"network: b\ndiscovery: 'http://{address}'\ntoken: {{file: admin}}\n")
        yield folder


def test_put_get_list_delete(folder: Path) -> None:
    put = crossnet(folder, "records", "-c", "client.yaml", "put", "service", "orders", json.dumps(SPEC))
    assert put.returncode == 0, put.stderr
    assert json.loads(put.stdout)["spec"]["name"] == SPEC["name"]
    again = crossnet(folder, "records", "-c", "client.yaml", "put", "service", "more", "-", given=json.dumps(SPEC))
    assert again.returncode == 0, again.stderr
    got = crossnet(folder, "records", "-c", "client.yaml", "get", "service", "orders")
    assert json.loads(got.stdout)["spec"]["ports"] == SPEC["ports"]
    table = crossnet(folder, "records", "-c", "client.yaml", "list", "--kind", "service").stdout.splitlines()
    assert table[0].split() == ["kind", "network", "id", "revision", "lease", "spec"]
    assert {line.split()[2] for line in table[1:]} == {"orders", "more"}
    assert crossnet(folder, "records", "-c", "client.yaml", "delete", "service", "more").returncode == 0
    listed = crossnet(folder, "records", "-c", "client.yaml", "list", "--network", "b", "--json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in listed] == ["orders"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["put", "service", "x", '{"name": "other.name", "ports": {"1": []}}'], "forbidden: "),
        (["put", "relay", "x", '{"addresses": ["10.0.0.1"], "ports": [1]}'], "forbidden: "),
        (["put", "service", "x", '{"zzz": 1}'], "bad_record: "),
        (["put", "service", "x", "{"], "the spec is not JSON: "),
        (["get", "service", "absent"], "not_found: "),
        (["delete", "service", "x", "--network", "a"], "forbidden: "),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(folder: Path, arguments: list[str], told: str) -> None:
    done = crossnet(folder, "records", "-c", "client.yaml", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"crossnet records: {told}")
    assert len(done.stderr.splitlines()) == 1


def test_no_server_is_one_line_and_exit_code_1(folder: Path) -> None:
    (folder / "away.yaml").write_text("network: b\ndiscovery: ['http://127.0.0.1:1', 'http://127.0.0.1:2']\n")
    done = crossnet(folder, "records", "-c", "away.yaml", "list")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "http://127.0.0.1:2: " in done.stderr


def test_a_static_mesh_can_be_listed(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}, {id: b}]")
    (tmp_path / "x.yaml").write_text("network: a\ndiscovery: mesh.yaml\n")
    done = crossnet(tmp_path, "records", "-c", "x.yaml", "list", "--json", "--network", "b")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["b"]


def test_a_token_that_could_write_nothing_is_refused(tmp_path: Path) -> None:
    done = crossnet(tmp_path, "token", "new")
    assert (done.returncode, done.stdout) == (2, "")
    assert "$.network" in done.stderr
    done = crossnet(tmp_path, "token", "new", "--network", "b")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--for relay|gateway|dns|turn|publisher|operator" in done.stderr


def test_export_and_import_both_ways(folder: Path) -> None:
    put = crossnet(folder, "records", "-c", "client.yaml", "put", "service", "exported", json.dumps(SPEC))
    assert put.returncode == 0, put.stderr
    exported = crossnet(folder, "records", "-c", "client.yaml", "export")
    assert exported.returncode == 0, exported.stderr
    assert '"id":"exported"' in exported.stdout
    (folder / "exported.yaml").write_text(exported.stdout)
    same = crossnet(folder, "records", "-c", "client.yaml", "import", "exported.yaml")
    assert (same.returncode, same.stdout) == (0, "")
    assert crossnet(folder, "records", "-c", "client.yaml", "delete", "service", "exported").returncode == 0
    text = exported.stdout.replace('"id":"orders"', '"id":"renamed"')
    (folder / "exported.yaml").write_text(text)
    done = crossnet(folder, "records", "-c", "client.yaml", "import", "exported.yaml")
    assert done.returncode == 0, done.stderr
    assert "new  service/b/exported" in done.stdout.splitlines()
    foreign = text.replace('"network":"b"', '"network":"c"').replace('{"id":"b"}', '{"id":"c"}')
    (folder / "foreign.yaml").write_text(foreign)
    refused = crossnet(folder, "records", "-c", "client.yaml", "import", "foreign.yaml")
    assert refused.returncode == 1
    assert "service/c/exported: forbidden" in refused.stderr
    (folder / "bad.yaml").write_text("x: 1")
    assert crossnet(folder, "records", "-c", "client.yaml", "import", "bad.yaml").returncode == 1


def test_records_that_processes_write_are_neither_taken_from_others_nor_imported_unasked(folder: Path) -> None:
    spec = json.dumps({"addresses": ["10.0.0.9"], "ports": [443]})
    for network in ("b", "c"):
        put = crossnet(folder, "records", "-c", "admin.yaml", "put", "relay", "r", spec, "--network", network)
        assert put.returncode == 0, put.stderr
    exported = crossnet(folder, "records", "-c", "client.yaml", "export", "--leased")
    assert '"network":"c"' not in exported.stdout.replace("networks", "")
    assert "left out: 1 records that processes of other networks write" in exported.stderr
    (folder / "with-relay.yaml").write_text(exported.stdout)
    refused = crossnet(folder, "records", "-c", "client.yaml", "import", "with-relay.yaml")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "relay/b/r: running processes write such records" in refused.stderr
    done = crossnet(folder, "records", "-c", "admin.yaml", "import", "with-relay.yaml", "--leased")
    assert done.returncode == 0, done.stderr
    for network in ("b", "c"):
        deleted = crossnet(folder, "records", "-c", "admin.yaml", "delete", "relay", "r", "--network", network)
        assert deleted.returncode == 0
