"""The copy on disk: complete, or set aside."""

import hashlib
import stat
from pathlib import Path
from typing import Any

import pytest

from discovery.client.snapshot_file import load, save
from discovery.model.mesh import Kind, Mesh, NetworkSpec, Record, ServiceSpec
from discovery.store import MemoryStore
from tests.discovery.client.clients import client_of

MESH = Mesh.of(
    [
        Record(kind=Kind.NETWORK, network="b", id="b", revision=1, spec=NetworkSpec()),
        Record(
            kind=Kind.SERVICE,
            network="b",
            id="s",
            revision=2,
            lease="l",
            spec=ServiceSpec(name="o.s", ports={"8443": ["10.1.0.5:8443"]}),
        ),
    ]
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.snapshot"
    save(path, "b", "epoch", MESH, 7, 1234.5)
    return path


def test_a_saved_mesh_is_loaded(path: Path) -> None:
    copy = load(path, "b")
    assert copy is not None
    assert list(copy.mesh()) == list(MESH)
    assert (copy.network, copy.epoch, copy.revision, copy.saved_at) == ("b", "epoch", 7, 1234.5)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_save_replaces_the_one_before(path: Path) -> None:
    save(path, "b", "other", (), 8, 1.0, frozenset({"service.port_names"}))
    copy = load(path, "b")
    assert copy is not None
    assert copy.records == ()
    assert copy.fields == {"service.port_names"}


def test_a_view_of_another_network_is_not_ours(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(path, "c") is None
    assert "not of c" in caplog.text
    assert path.exists()


def test_a_missing_or_unreadable_file_is_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(tmp_path / "missing", "b") is None
    assert not caplog.text
    assert load(tmp_path, "b") is None
    assert "cannot be read" in caplog.text


def test_any_damage_is_found(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = path.read_bytes()
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), 7)]
    cut = [good[:at] for at in range(0, len(good), 11)]
    longer = [good + b"\n", good + good]
    for bad in [*flipped, *cut, *longer, b"", b"\xff" * 100, b"[" * 100_000]:
        path.write_bytes(bad)
        assert load(path, "b") is None
    assert path.with_name("mesh.snapshot.bad").exists()
    assert "set aside" in caplog.text


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "no header"),
        (b"{}\n", "no header"),
        (b'{"format":2,"network":"b","epoch":"e","revision":1,"saved_at":1}\n', "format 2"),
        (b'{"format":1,"network":"b","epoch":"e","revision":1,"saved_at":1}\n{}\n', "cannot read"),
    ],
)
def test_another_version_s_file_is_set_aside(
    path: Path, body: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    assert load(path, "b") is None
    assert why in caplog.text
    assert not path.exists()


def test_a_failed_save_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(path, "b", "other", (), 8, 1.0)
    copy = load(path, "b")
    assert copy is not None
    assert copy.epoch == "epoch"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.anyio
async def test_the_snapshot_is_used_while_discovery_is_down(serve: Any, run: Any, until: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "mesh.snapshot"
    store = MemoryStore()
    async with serve(store) as at:
        port = at.port
        await store.put((Kind.NETWORK, "x", "x"), NetworkSpec())
        await store.put((Kind.NETWORK, "y", "y"), NetworkSpec())
        async with run(client_of(at, snapshot_file=snapshot)) as client:
            await until(client, lambda mesh: len(mesh) == 2)
        assert snapshot.exists()
    client = client_of(at, snapshot_file=snapshot)
    async with run(client):
        await until(client, lambda mesh: len(mesh) == 2)
        assert client.synced
        assert not client.connected
        assert client.age_s is not None
        assert 0 <= client.age_s < 60
        # When discovery is back, it sends only the changes.
        await store.delete((Kind.NETWORK, "x", "x"))
        async with serve(store, port=port):
            await until(client, lambda mesh: mesh.networks == {"y"})
            assert client.connected


@pytest.mark.anyio
async def test_a_damaged_snapshot_is_set_aside(
    serve: Any, run: Any, until: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = tmp_path / "mesh.snapshot"
    snapshot.write_bytes(b"{}\ngarbage")
    async with serve() as at:
        await at.store.put((Kind.NETWORK, "x", "x"), NetworkSpec())
        async with run(client_of(at, snapshot_file=snapshot)) as client:
            await until(client, lambda mesh: len(mesh) == 1)
    assert (tmp_path / "mesh.snapshot.bad").read_bytes() == b"{}\ngarbage"
    assert "set aside" in caplog.text
    assert snapshot.exists()


@pytest.mark.anyio
async def test_a_snapshot_that_cannot_be_saved_is_logged(
    serve: Any, run: Any, until: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as at:
        await at.store.put((Kind.NETWORK, "x", "x"), NetworkSpec())
        async with run(client_of(at, snapshot_file=tmp_path / "missing" / "mesh")) as client:
            await until(client, lambda mesh: len(mesh) == 1)
    assert "cannot be saved" in caplog.text
