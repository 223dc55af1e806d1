"""The view of real servers: restarts, failover, changes of epoch, invalid answers."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from discovery.model.mesh import Kind, Mesh, NetworkSpec, ServiceSpec, VipSpec
from discovery.pacing.backoff import Backoff
from discovery.store import MemoryStore, SqliteStore
from tests.discovery.client.clients import OTHER, RELAY, WallClock, client_at, client_of
from tests.discovery.client.older_server import older_server
from tests.discovery.waiting import LogWaiter
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio


async def test_unknown_kinds_and_fields_are_skipped_and_logged(
    serve: Any, run: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as at, run(client_of(at)) as client:
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
        newer = msgspec.defstruct("Newer", [("new", int)], frozen=True)(1)
        await at.store.put((Kind.RELAY, "a", "newer"), newer)
        await at.store.put((Kind.RELAY, "a", "r2"), OTHER)
        await until(client, lambda mesh: len(mesh.relays("a")) == 2)
        assert client.connected
    assert "cannot read" in caplog.text


NAMED = ServiceSpec(name="db-0.o.s", ports={"8443": []}, port_names={"https": 8443}, member_of="o.s")
PLAIN = ServiceSpec(name="db-0.o.s", ports={"8443": []})


def specs(mesh: Mesh, network: str = "b") -> list[ServiceSpec]:
    return [record.spec for record in mesh.services(network)]


async def test_negotiated_fields_arrive_once_the_server_knows_them(
    serve: Any, run: Any, until: Any, tmp_path: Path
) -> None:
    """Records that had not changed since are read again with them: by the client that was there, and by one with a copy on disk."""
    async with serve() as at, older_server(at) as older:
        await at.store.put((Kind.SERVICE, "b", "s"), NAMED)
        copy = tmp_path / "copy"
        async with run(client_at(older.url, snapshot_file=copy)) as client:
            await until(client, lambda mesh: specs(mesh) == [PLAIN])
            older.upgrade()
            await until(client, lambda mesh: specs(mesh) == [NAMED])
        older.is_old = True
        async with run(client_at(older.url, snapshot_file=copy)) as client:
            await until(client, lambda mesh: specs(mesh) == [PLAIN])
        async with run(client_at(older.url, snapshot_file=copy)) as client:
            await eventually(lambda: client.connected)
            assert "from" in older.watches[-1]  # it resumes as long as nothing differs
            assert specs(client.mesh) == [PLAIN]
        older.upgrade()
        async with run(client_at(older.url, snapshot_file=copy)) as client:
            await until(client, lambda mesh: specs(mesh) == [NAMED])
        count = len(older.watches)
        async with run(client_at(older.url, snapshot_file=copy)) as client:
            await eventually(lambda: client.connected)
            assert specs(client.mesh) == [NAMED]
            assert ["from" in query for query in older.watches[count:]] == [True]


async def test_a_restarted_server_finds_its_clients_again(
    serve: Any, run: Any, until: Any, tmp_path: Path, logged: LogWaiter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "discovery.db"
    async with serve(SqliteStore(path)) as at:
        port = at.port
        client = client_of(at)
        running = run(client)
        await running.__aenter__()
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
    before = client.mesh
    await logged.until("discovery is away")
    assert not client.connected
    assert client.mesh is before  # the view stays while discovery is down
    assert client.synced
    client.publish(Kind.RELAY, "r2", OTHER)
    async with serve(SqliteStore(path), port=port) as at:
        await until(client, lambda mesh: len(mesh.relays("a")) == 2)
        assert (
            client.mesh.relays("a")[0] == before.relays("a")[0]
        )  # its lease got its full TTL again: the record was not rewritten
        assert await client.settled(5)
        await running.__aexit__(None, None, None)
        assert (await at.store.snapshot()).records == ()
    events = [record.message for record in caplog.records if record.name == "discovery.client.follower"]
    assert events.count("discovery is there") == 2
    assert (
        events.count("discovery is away") <= 3
    )  # when the watch ended, when the connection was refused, but not for each attempt


async def test_records_of_living_processes_survive_ten_minutes_without_discovery(
    serve: Any, run: Any, until: Any, tmp_path: Path, clock: Any, logged: LogWaiter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path, registry, wall = tmp_path / "discovery.db", CollectorRegistry(), WallClock()

    def staleness() -> float:
        value = registry.get_sample_value("crossnet_discovery_staleness_seconds")
        assert value is not None
        return value

    async with serve(SqliteStore(path, clock=clock)) as at:
        port = at.port
        client = client_of(at, registry=registry, wall_clock=wall)
        assert staleness() == -1
        living = run(client)
        await living.__aenter__()
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
        assert staleness() == 0
        dead = await at.store.grant(10, "anyone")  # its owner has ended
        await at.store.put((Kind.RELAY, "b", "dead"), OTHER, lease=dead.id)
        await until(client, lambda mesh: mesh.relays("b"))
    await logged.until("discovery is away")
    wall.ahead_s += 600
    assert 600 <= staleness() < 660
    clock.now += 600
    # The server's wall clock is wrong, which has no effect on leases.
    async with serve(SqliteStore(path, clock=clock), port=port, wall_clock=lambda: -1e9) as at:
        await logged.until("discovery is there", 2)
        assert staleness() == 0
        revision = client.mesh.relays("a")[0].revision
        for second in range(12):  # one second at a time: the whole TTL, and a bit more
            clock.now += 1
            if second % 3 == 0:
                await at.store.renew(client.mesh.relays("a")[0].lease)
            await at.store.expire()
        await until(client, lambda mesh: not mesh.relays("b"))
        assert client.mesh.relays("a")[0].revision == revision  # the record was not rewritten
        await living.__aexit__(None, None, None)


async def test_another_epoch_keeps_old_records_for_a_while(serve: Any, run: Any, until: Any) -> None:
    async with serve() as at:
        port = at.port
        await at.store.put((Kind.NETWORK, "z", "z"), NetworkSpec())
        await at.store.put((Kind.NETWORK, "y", "y"), NetworkSpec())
        for _ in range(20):
            await at.store.put((Kind.VIP, "b", "v"), VipSpec(name="o.s", address="10.200.0.1"))
        client = client_of(at, grace_s=0.3)
        running = run(client)
        await running.__aenter__()
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
    seen: list[Mesh] = []
    client.subscribe(seen.append)
    async with serve(port=port) as at:  # the store was lost
        await at.store.put((Kind.NETWORK, "y", "y"), NetworkSpec())
        await until(client, lambda mesh: mesh.revision < 20 and mesh.relays("a") and mesh.relays("a")[0].revision < 20)
        assert client.mesh.networks >= {"y", "z", "b"}  # nobody has confirmed these, but they are still there
        await until(client, lambda mesh: mesh.networks == {"a", "y"})  # until the grace period ended
        assert await client.settled(5)
        await running.__aexit__(None, None, None)
    assert all(mesh.relays("a") for mesh in seen[:-1])  # our own record was always there


async def test_the_next_server_takes_over(serve: Any, run: Any, until: Any) -> None:
    store = MemoryStore()
    async with serve(store) as second:
        async with serve(store) as first:
            dead = type(first)(first.server, 1, first.session)  # nothing listens on port 1
            client = client_of(dead, first, second)
            running = run(client)
            await running.__aenter__()
            client.publish(Kind.RELAY, "r", RELAY)
            await until(client, lambda mesh: mesh.relays("a"))
            assert len(first.server._hub) == 1
        client.publish(Kind.RELAY, "r2", RELAY)
        await until(client, lambda mesh: len(mesh.relays("a")) == 2)
        assert len(second.server._hub) == 1
        await running.__aexit__(None, None, None)


async def test_bursts_are_reported_together(serve: Any, run: Any, until: Any) -> None:
    async with serve() as at:
        for number in range(2000):
            await at.store.put((Kind.NETWORK, f"n{number}", f"n{number}"), NetworkSpec())
        client = client_of(at)
        seen: list[Mesh] = []
        client.subscribe(seen.append)
        async with run(client):
            await until(client, lambda mesh: len(mesh) == 2000)
            assert len(seen) == 1  # the whole snapshot was one change
            for number in range(2000):
                await at.store.delete((Kind.NETWORK, f"n{number}", f"n{number}"))
            await until(client, lambda mesh: len(mesh) == 0)
            assert len(seen) < 200


async def test_a_reset_drops_deleted_records(serve: Any, run: Any, until: Any, tmp_path: Path) -> None:
    """If the store has forgotten deletions that a client missed, the client gets all records again."""
    path = tmp_path / "discovery.db"
    async with serve(SqliteStore(path, max_tombstones=1)) as at:
        port = at.port
        for name in ("x", "y", "z"):
            await at.store.put((Kind.NETWORK, name, name), NetworkSpec())
        client = client_of(at)
        running = run(client)
        await running.__aenter__()
        await until(client, lambda mesh: len(mesh) == 3)
    store = SqliteStore(path, max_tombstones=1)
    await store.open()
    for name in ("x", "y"):
        await store.delete((Kind.NETWORK, name, name))
    await store.close()
    async with serve(SqliteStore(path, max_tombstones=1), port=port):
        await until(client, lambda mesh: mesh.networks == {"z"})
        await running.__aexit__(None, None, None)


async def test_invalid_answers_count_as_an_unavailable_server(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    answers = iter(
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnonsense\n",
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
            b"SSH-2.0-OpenSSH\r\n",
        ]
    )
    done = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        data = next(answers, None)
        if data is None:
            done.set()
        else:
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        client = client_at(f"http://127.0.0.1:{port}", backoff=Backoff(0.05, 0.05))
        async with run(client), asyncio.timeout(10):
            await done.wait()
            assert not client.synced
    told = " ".join(str(getattr(record, "event", "")) for record in caplog.records)
    for word in ("not a valid change", "302", "500", "SSH"):
        assert word in told


async def test_metrics(serve: Any, run: Any, until: Any) -> None:
    registry = CollectorRegistry()
    async with serve() as at, run(client_of(at, registry=registry)) as client:
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
        text = generate_latest(registry).decode()
    assert "crossnet_discovery_connected 1.0" in text
    assert "crossnet_discovery_records 1.0" in text
