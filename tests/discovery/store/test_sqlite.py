"""The SQLite store: what a file survives, and which files are refused."""

import asyncio
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from discovery.model.mesh import Deletion, Kind, NetworkSpec, ServiceSpec, VipSpec
from discovery.store import SqliteStore, StoreError

pytestmark = pytest.mark.anyio

KEY = (Kind.VIP, "b", "v")
SPEC = VipSpec(name="orders.shop", address="10.200.0.1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "discovery.db"


async def test_everything_is_there_after_a_restart(path: Path) -> None:
    now = 0.0
    store = SqliteStore(path, clock=lambda: now)
    await store.open()
    lease = await store.grant(10, "somebody")
    service = ServiceSpec(name="orders.shop", ports={"8443": ["10.1.0.5:8443"]}, proxy_protocol=True)
    records = [
        await store.put((Kind.SERVICE, "b", "s"), service),
        await store.put(KEY, SPEC, lease=lease.id),
    ]
    await store.put((Kind.NETWORK, "c", "c"), NetworkSpec())
    await store.delete((Kind.NETWORK, "c", "c"))
    epoch = store.epoch
    await store.close()

    now = 1_000_000.0  # the clock of another boot: deadlines are not stored, leases start with their full TTL
    store = SqliteStore(path, clock=lambda: now)
    await store.open()
    try:
        assert store.epoch == epoch
        assert store.revision == 4
        assert sorted(record.id for record in (await store.snapshot()).records) == ["s", "v"]
        assert [await store.get(record.key) for record in records] == records
        assert await store.since(2) == [Deletion((Kind.NETWORK, "c", "c"), 4)]
        assert await store.leases("somebody") == [lease]
        assert await store.expire() == ()
        for _ in range(10):
            now += 1
            ended = await store.expire()
        assert ended == [Deletion(KEY, 5)]
    finally:
        await store.close()


def write_until_killed(path: Path) -> int:
    """Run a process that writes as fast as it can, kill it, and return the last revision that was acknowledged."""
    program = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from discovery.model.mesh import Kind, NetworkSpec
        from discovery.store import SqliteStore

        async def main():
            store = SqliteStore(Path(sys.argv[1]))
            await store.open()
            while True:
                name = f"n{store.revision + 1}"
                record = await store.put((Kind.NETWORK, name, name), NetworkSpec())
                print(record.revision, flush=True)

        asyncio.run(main())
        """
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = 0
        for line in process.stdout:
            last = int(line)
            if last % 50 == 0:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    return last


async def test_acknowledged_writes_survive_kill_9(path: Path) -> None:
    write_until_killed(path)
    last = write_until_killed(path)
    assert last >= 100
    store = SqliteStore(path)
    await store.open()
    try:
        # One write may be durable although its acknowledgement was lost.
        assert store.revision in (last, last + 1)
        assert [record.revision for record in await store.since(0) or ()] == list(range(1, store.revision + 1))
    finally:
        await store.close()


async def test_a_write_completes_even_if_its_caller_is_cancelled(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    heard: list[object] = []
    store.subscribe(heard.extend)
    try:
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(store.put(KEY, SPEC))
            await asyncio.sleep(0)  # the write has begun: the task waits for the disk
            writer.cancel()
        assert writer.cancelled()
        assert (await store.put(KEY, SPEC)).revision == 2
        assert [record.revision for record in heard] == [1, 2]  # type: ignore[attr-defined]
    finally:
        await store.close()


async def test_a_file_can_be_opened_by_one_server_only(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    try:
        with pytest.raises(StoreError, match="in use by another process"):
            await SqliteStore(path).open()
        await store.put(KEY, SPEC)
    finally:
        await store.close()
    await SqliteStore(path).close()
    with pytest.raises(StoreError, match="closed"):
        await store.put(KEY, SPEC)


async def test_other_users_cannot_read_the_file(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.put(KEY, SPEC)
    try:
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
    finally:
        await store.close()


async def test_foreign_files(path: Path) -> None:
    (path.parent / "other").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="not an SQLite database"):
        await SqliteStore(path.parent / "other").open()
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE other (x)")
    database.close()
    with pytest.raises(StoreError, match="not one of a discovery server"):
        await SqliteStore(path).open()
    with pytest.raises(StoreError, match="cannot be opened"):
        await SqliteStore(path.parent / "missing" / "discovery.db").open()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA user_version = 99", "schema 99"),
        ("UPDATE records SET spec = '{}'", "cannot read"),
        ("UPDATE records SET kind = 'other'", "cannot read"),
        ("DELETE FROM meta", "cannot read"),
    ],
)
async def test_files_of_another_version(path: Path, statement: str, message: str) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.put(KEY, SPEC)
    await store.close()
    database = sqlite3.connect(path, isolation_level=None)
    database.execute(statement)
    database.close()
    with pytest.raises(StoreError, match=message):
        await SqliteStore(path).open()


async def test_a_failed_write_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = SqliteStore(path)
    await store.open()
    kept = await store.put(KEY, SPEC)
    database = store._database
    assert database is not None
    try:
        database.execute("PRAGMA max_page_count = 1")  # a full disk, as SQLite sees it
        with pytest.raises(StoreError, match="full"):
            for number in range(1000):
                await store.put((Kind.NETWORK, f"n{number}", f"n{number}"), NetworkSpec())
        revision = store.revision
        database.execute("PRAGMA max_page_count = 1000000")
        assert await store.get(KEY) == kept
        assert (await store.put(KEY, SPEC)).revision == revision + 1
    finally:
        await store.close()
    assert "cannot be written" in caplog.text
    store = SqliteStore(path)
    await store.open()
    assert store.revision == revision + 1
    await store.close()
