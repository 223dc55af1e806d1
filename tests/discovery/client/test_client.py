"""The client against real servers: views, desired state, restarts, failover, snapshots."""

import asyncio
import datetime as dt
import logging
import ssl
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from prometheus_client import CollectorRegistry, generate_latest

from discovery.client.client import DiscoveryClient, DiscoveryError
from discovery.client.config import DiscoveryClientConfig
from discovery.model.mesh import Kind, Mesh, NetworkSpec, RelaySpec, ServiceSpec, VipSpec
from discovery.pacing.backoff import Backoff
from discovery.store import Lease, MemoryStore, SqliteStore

pytestmark = pytest.mark.anyio

RELAY = RelaySpec(addresses=["10.0.0.9"], ports=[443])
OTHER = RelaySpec(addresses=["10.0.0.10"], ports=[443])


def client_of(*at: Any, network: str = "a", **settings: Any) -> DiscoveryClient:
    return client_at(*(server.url for server in at), network=network, **settings)


def client_at(
    *urls: str, network: str = "a", registry: CollectorRegistry | None = None, **settings: Any
) -> DiscoveryClient:
    return DiscoveryClient(DiscoveryClientConfig(urls=urls, network=network, **settings), registry=registry)


async def gone(at: Any, *key: Any) -> None:
    async with asyncio.timeout(5):
        while await at.store.get(key) is not None:
            await asyncio.sleep(0.01)


async def test_two_clients_see_what_each_publishes(serve: Any, run: Any, until: Any) -> None:
    async with serve() as at, run(client_of(at)) as one, run(client_of(at, network="b")) as two:
        one.publish(Kind.RELAY, "r", RELAY)
        two.publish(Kind.NETWORK, "b", NetworkSpec(), leased=False)
        mesh = await until(two, lambda mesh: mesh.relays("a"))
        assert mesh.relays("a")[0].spec == RELAY
        await until(one, lambda mesh: "b" in mesh.networks)
        assert await one.settled(5)
        assert await two.settled(5)
        one.publish(Kind.RELAY, "r", OTHER)
        await until(two, lambda mesh: mesh.relays("a")[0].spec == OTHER)
        one.withdraw(Kind.RELAY, "r")
        await until(two, lambda mesh: not mesh.relays("a"))
        assert await one.settled(5)
        assert one.connected
        assert one.age_s == 0


async def test_publishing_twice_writes_once(serve: Any, run: Any) -> None:
    async with serve() as at, run(client_of(at)) as client:
        for _ in range(3):
            client.publish(Kind.RELAY, "r", RELAY)
            client.withdraw(Kind.RELAY, "nothing")
            assert await client.settled(5)
        assert at.store.revision == 1


async def test_of_several_that_claim_a_record_the_first_has_it_and_all_agree(serve: Any, run: Any, until: Any) -> None:
    async with serve() as at, run(client_of(at)) as one, run(client_of(at)) as two:
        for number, client in enumerate((one, two)):
            spec = VipSpec(name="orders.shop", address=f"10.200.0.{number + 1}")
            client.publish(Kind.VIP, "orders", spec, leased=False, if_absent=True)
            assert await client.settled(5)
        assert at.store.revision == 1
        for client in (one, two):
            mesh = await until(client, lambda mesh: mesh.vips("a"))
            assert mesh.vips("a")[0].spec.address == "10.200.0.1"
        two.withdraw(Kind.VIP, "orders")  # not theirs
        assert await two.settled(5)
        assert at.store.revision == 1
        # When it is gone, whoever still wants it claims it, with what they want.
        two.publish(Kind.VIP, "orders", VipSpec(name="orders.shop", address="10.200.0.2"), leased=False, if_absent=True)
        assert await two.settled(5)
        one.withdraw(Kind.VIP, "orders")
        mesh = await until(two, lambda mesh: mesh.vips("a") and mesh.vips("a")[0].spec.address == "10.200.0.2")
        assert mesh.vips("a")[0].revision == 3


async def test_what_was_wanted_before_the_run_is_written_then(serve: Any, run: Any) -> None:
    async with serve() as at:
        client = client_of(at)
        client.publish(Kind.RELAY, "r", RELAY)
        client.publish(Kind.NETWORK, "d", NetworkSpec(), network="d")
        assert not await client.settled(0.01)
        assert client.mesh is Mesh.EMPTY
        assert not client.synced
        assert client.age_s is None
        async with run(client):
            assert await client.settled(5)
        assert at.store.revision == 4  # both were leased, and went when it closed


async def test_closing_ends_the_lease_and_leaves_the_rest(serve: Any, run: Any) -> None:
    async with serve() as at:
        async with run(client_of(at)) as client:
            client.publish(Kind.RELAY, "r", RELAY)
            client.publish(Kind.NETWORK, "a", NetworkSpec(), leased=False)
            assert await client.settled(5)
        assert [record.kind for record in (await at.store.snapshot()).records] == [Kind.NETWORK]
        assert await at.store.leases("anyone") == []


async def test_what_a_dead_client_published_goes_with_its_lease(serve: Any) -> None:
    async with serve() as at:
        client = client_of(at, lease_ttl_s=1)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(client.run())
            client.publish(Kind.RELAY, "r", RELAY)
            assert await client.settled(5)
            for _ in range(3):  # it lives for longer than its lease without renewals would
                await asyncio.sleep(0.4)
            assert await at.store.get((Kind.RELAY, "a", "r")) is not None
            task.cancel()  # and dies without closing
        await gone(at, Kind.RELAY, "a", "r")


async def test_a_lost_lease_and_a_deleted_record_are_made_good(serve: Any, run: Any, until: Any) -> None:
    async with serve() as at, run(client_of(at)) as client:
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
        first = client.mesh.relays("a")[0]
        await at.store.revoke(first.lease)
        await until(client, lambda mesh: mesh.relays("a") and mesh.relays("a")[0].revision > first.revision)
        second = client.mesh.relays("a")[0]
        assert second.lease != first.lease
        await at.store.delete(second.key)
        await until(client, lambda mesh: mesh.relays("a") and mesh.relays("a")[0].revision > second.revision)
        assert await client.settled(5)


async def test_a_lease_that_was_forgotten_is_noticed_when_it_is_renewed(
    serve: Any, run: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as at, run(client_of(at, lease_ttl_s=1)) as client:
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
        lease = client.mesh.relays("a")[0].lease
        await at.store.put(
            (Kind.RELAY, "a", "r"), OTHER
        )  # somebody else took the record: the watch says nothing of use
        await at.store.revoke(lease)
        await until(client, lambda mesh: mesh.relays("a")[0].spec == RELAY and mesh.relays("a")[0].lease != lease)
    assert "our lease has ended" in caplog.text


async def test_what_a_newer_server_says_is_skipped_and_told(
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


async def test_a_restarted_server_finds_its_clients_again(
    serve: Any, run: Any, until: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    async with asyncio.timeout(5):
        while client.connected:
            await asyncio.sleep(0.01)
    assert client.mesh is before  # discovery is away, the view stays
    assert client.synced
    client.publish(Kind.RELAY, "r2", OTHER)
    async with serve(SqliteStore(path), port=port) as at:
        await until(client, lambda mesh: len(mesh.relays("a")) == 2)
        assert client.mesh.relays("a")[0] == before.relays("a")[0]  # its lease was rearmed: nothing was written anew
        assert await client.settled(5)
        await running.__aexit__(None, None, None)
        assert (await at.store.snapshot()).records == ()
    events = [record.message for record in caplog.records if record.name == "discovery.client.follower"]
    assert events.count("discovery is there") == 2
    assert events.count("discovery is away") <= 3  # once it ended, once it was refused, and not at each attempt


async def test_ten_minutes_without_discovery_withdraw_nothing_that_lives(
    serve: Any, run: Any, until: Any, tmp_path: Path, clock: Any
) -> None:
    path, registry = tmp_path / "discovery.db", CollectorRegistry()

    def staleness() -> float:
        value = registry.get_sample_value("crossnet_discovery_staleness_seconds")
        assert value is not None
        return value

    async with serve(SqliteStore(path, clock=clock)) as at:
        port = at.port
        client = client_of(at, registry=registry)
        assert staleness() == -1
        living = run(client)
        await living.__aenter__()
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
        assert staleness() == 0
        dead = await at.store.grant(10, "anyone")  # whoever made it does not come back
        await at.store.put((Kind.RELAY, "b", "dead"), OTHER, lease=dead.id)
        await until(client, lambda mesh: mesh.relays("b"))
    async with asyncio.timeout(5):
        while client.connected:
            await asyncio.sleep(0.01)
    client._view.known_at -= 600
    assert 600 <= staleness() < 660
    clock.now += 600
    async with serve(SqliteStore(path, clock=clock), port=port) as at:
        at.server._wall_clock = lambda: -1e9  # what the clock on the wall does is nothing to a lease
        async with asyncio.timeout(10):
            while not client.connected:
                await asyncio.sleep(0.01)
        assert staleness() == 0
        revision = client.mesh.relays("a")[0].revision
        for second in range(12):  # a second at a time: the whole lease, and a bit more
            clock.now += 1
            if second % 3 == 0:
                await at.store.renew(client.mesh.relays("a")[0].lease)
            await at.store.expire()
        await until(client, lambda mesh: not mesh.relays("b"))
        assert client.mesh.relays("a")[0].revision == revision  # nothing was even written again
        await living.__aexit__(None, None, None)


def start_server(path: Path, port: int) -> tuple[subprocess.Popen[str], int]:
    program = textwrap.dedent(
        """
        import asyncio, sys
        from discovery.api import DiscoveryServer, DiscoveryServerConfig

        async def main():
            config = DiscoveryServerConfig(listen=(("127.0.0.1", int(sys.argv[2])),), store=f"sqlite:{sys.argv[1]}")
            async with DiscoveryServer(config).serving() as addresses:
                print(addresses[0][1], flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("years", [30, -30])
async def test_a_wall_clock_that_jumps_ends_no_lease(
    serve: Any, run: Any, until: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    real = time.time
    async with serve(SqliteStore(tmp_path / "discovery.db")) as at, run(client_of(at, lease_ttl_s=1)) as client:
        client.publish(Kind.RELAY, "r", RELAY)
        before = (await until(client, lambda mesh: mesh.relays("a"))).relays("a")
        monkeypatch.setattr(time, "time", lambda: real() + years * 365 * 86_400)
        renewed, renew = asyncio.Semaphore(0), at.store.renew

        async def counted(lease_id: str) -> Lease:
            renewed.release()
            return await renew(lease_id)

        monkeypatch.setattr(at.store, "renew", counted)
        async with asyncio.timeout(20):
            for _ in range(5):  # at a third each: longer than the lease is
                await renewed.acquire()
        assert client.connected
        assert client.mesh.relays("a") == before
        assert list((await at.store.snapshot()).records) == list(before)


async def test_a_killed_server_comes_back_with_everything(run: Any, until: Any, tmp_path: Path, free_port: int) -> None:
    path = tmp_path / "discovery.db"
    process, port = await asyncio.to_thread(start_server, path, free_port)
    client = client_at(f"http://127.0.0.1:{port}")
    watcher = client_at(f"http://127.0.0.1:{port}", network="b")
    try:
        async with run(client), run(watcher):
            client.publish(Kind.RELAY, "r", RELAY)
            mesh = await until(watcher, lambda mesh: mesh.relays("a"))
            await asyncio.to_thread(kill, process)
            assert watcher.mesh is mesh
            client.publish(Kind.RELAY, "r2", OTHER)
            process, _ = await asyncio.to_thread(start_server, path, port)
            await until(watcher, lambda mesh: len(mesh.relays("a")) == 2)
            # Lease and record were in the store: the same one, and not written anew.
            assert watcher.mesh.relays("a")[0] == mesh.relays("a")[0]
            assert watcher.mesh.relays("a")[1].lease == mesh.relays("a")[0].lease
    finally:
        await asyncio.to_thread(kill, process)


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
        assert client.mesh.networks >= {"y", "z", "b"}  # nobody confirmed these, and they are still there
        await until(client, lambda mesh: mesh.networks == {"a", "y"})  # until the grace period ended
        assert await client.settled(5)
        await running.__aexit__(None, None, None)
    assert all(mesh.relays("a") for mesh in seen[:-1])  # our own never went


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


async def test_refusals_are_told_and_hinder_nothing_else(
    serve: Any, run: Any, until: Any, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tokens_file=tokens.path) as at:
        async with run(client_of(at, network="b", token=tokens["relay-b"])) as client:
            client.publish(Kind.VIP, "v", VipSpec(name="o.s", address="10.200.0.1"))
            client.publish(Kind.RELAY, "r", RELAY, network="c")
            client.publish(Kind.RELAY, "bad", RelaySpec(addresses=["127.0.0.1"], ports=[1]))
            client.publish(Kind.SERVICE, "s", ServiceSpec(name="o.s", ports={"1": ["10.1.0.5:1"] * 90_000}))
            client.publish(Kind.RELAY, "r", RELAY)
            await until(client, lambda mesh: mesh.relays("b"))
            assert not await client.settled(0.01)
            whys = [
                record.event["why"] for record in caplog.records if hasattr(record, "event") and "why" in record.event
            ]
            assert any("may not write vip" in why for why in whys)
            assert any("of network 'b', not 'c'" in why for why in whys)
            assert any("loopback" in why for why in whys)
            assert any("too_large" in why for why in whys)
            for kind, name in ((Kind.VIP, "v"), (Kind.RELAY, "bad"), (Kind.SERVICE, "s")):
                client.withdraw(kind, name)
            with pytest.raises(DiscoveryError) as caught:
                await client.turn_credentials("d")
            assert caught.value.code == "forbidden"
        async with run(client_of(at, token="wrong")) as client:
            client.publish(Kind.RELAY, "r", RELAY)
            assert not await client.settled(0.3)
            assert not client.synced
    assert any("the token is not known here" in str(getattr(record, "event", "")) for record in caplog.records)


async def test_turn_credentials(serve: Any, run: Any, tokens: Any) -> None:
    async with serve(tokens_file=tokens.path, turn_secrets={"d": "s3cret"}) as at:
        client = client_of(at, network="b", token=tokens["gw-b"])
        assert (await client.turn_credentials("d")).ttl_s == 3600  # before the run, too
        async with run(client):
            issued = await client.turn_credentials("d")
            assert issued.username.endswith(":b.gw-b")
            assert issued.ttl_s == 3600
            assert issued.urls == ()
            with pytest.raises(DiscoveryError, match="no secret"):
                await client.turn_credentials("x")
    with pytest.raises(DiscoveryError) as caught:
        await client.turn_credentials("d")
    assert caught.value.code == "unavailable"


async def test_bursts_are_told_together(serve: Any, run: Any, until: Any) -> None:
    async with serve() as at:
        for number in range(2000):
            await at.store.put((Kind.NETWORK, f"n{number}", f"n{number}"), NetworkSpec())
        client = client_of(at)
        seen: list[Mesh] = []
        client.subscribe(seen.append)
        async with run(client):
            await until(client, lambda mesh: len(mesh) == 2000)
            assert len(seen) == 1  # the whole snapshot came as one
            for number in range(2000):
                await at.store.delete((Kind.NETWORK, f"n{number}", f"n{number}"))
            await until(client, lambda mesh: len(mesh) == 0)
            assert len(seen) < 200


async def test_a_reset_drops_what_is_no_more(serve: Any, run: Any, until: Any, tmp_path: Path) -> None:
    """The client was away while so much was deleted that the store forgot what: it is told everything anew."""
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


async def test_a_snapshot_on_disk_serves_while_discovery_is_away(
    serve: Any, run: Any, until: Any, tmp_path: Path
) -> None:
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
        # Discovery comes back: only what changed is told.
        await store.delete((Kind.NETWORK, "x", "x"))
        async with serve(store, port=port):
            await until(client, lambda mesh: mesh.networks == {"y"})
            assert client.connected


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


async def test_a_snapshot_that_cannot_be_saved_is_told(
    serve: Any, run: Any, until: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as at:
        await at.store.put((Kind.NETWORK, "x", "x"), NetworkSpec())
        async with run(client_of(at, snapshot_file=tmp_path / "missing" / "mesh")) as client:
            await until(client, lambda mesh: len(mesh) == 1)
    assert "cannot be saved" in caplog.text


async def test_over_tls_with_a_ca(serve: Any, run: Any, until: Any, tmp_path: Path, tokens: Any) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    async with serve(tls_cert=tmp_path / "server.pem", tokens_file=tokens.path) as at:
        assert at.url.startswith("https:")
        client = client_of(at, network="b", token=tokens["b"], ca_file=tmp_path / "ca.pem")
        async with run(client):
            client.publish(Kind.RELAY, "r", RELAY)
            await until(client, lambda mesh: mesh.relays("b"))
        async with run(client_of(at, network="b", token=tokens["b"])) as stranger:
            stranger.publish(Kind.RELAY, "r", RELAY)
            assert not await stranger.settled(0.3)
            assert not stranger.synced
    with pytest.raises((OSError, ssl.SSLError)):
        client_of(at, ca_file=tmp_path / "missing.pem")


async def test_an_authority_that_is_replaced_counts_without_a_restart(
    serve: Any, run: Any, until: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("discovery.api.server.RELOAD_S", 0.02)
    old, new = trustme.CA(), trustme.CA()

    def certify(by: trustme.CA) -> None:
        by.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")

    old.cert_pem.write_to_path(tmp_path / "ca.pem")
    certify(old)
    async with serve(tls_cert=tmp_path / "server.pem") as at, run(client_of(at, ca_file=tmp_path / "ca.pem")) as client:
        client.publish(Kind.RELAY, "r1", RELAY)
        assert await client.settled(5)
        (tmp_path / "ca.pem").write_text("nonsense")
        client.publish(Kind.RELAY, "r2", RELAY)
        assert await client.settled(5)
        assert "cannot be used" in caplog.text
        new.cert_pem.write_to_path(tmp_path / "ca.pem")
        client.publish(Kind.RELAY, "r3", RELAY)
        assert not await client.settled(0.3)  # the old one is trusted no more
        certify(new)
        assert await client.settled(10)


async def test_a_subscriber_that_fails_hurts_no_other(
    serve: Any, run: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as at, run(client_of(at)) as client:
        client.subscribe(lambda _: 1 / 0)
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
    assert "a subscriber to the mesh failed" in caplog.text


async def test_closing_is_bounded(serve: Any, run: Any) -> None:
    async with serve() as at:
        client = client_of(at, close_timeout_s=0.2)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(client.run())
            client.publish(Kind.RELAY, "r", RELAY)
            assert await client.settled(5)
            task.cancel()
        port = at.port
    held = []
    hung = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", port)
    async with hung:
        async with asyncio.timeout(2):
            await client.close()
        for writer in held:
            writer.close()
    await client_of(at).close()


async def test_a_server_that_talks_nonsense_is_another_that_is_away(run: Any, caplog: pytest.LogCaptureFixture) -> None:
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
    for word in ("no change", "302", "500", "SSH"):
        assert word in told


async def test_metrics(serve: Any, run: Any, until: Any) -> None:
    registry = CollectorRegistry()
    async with serve() as at, run(client_of(at, registry=registry)) as client:
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
        text = generate_latest(registry).decode()
    assert "crossnet_discovery_connected 1.0" in text
    assert "crossnet_discovery_records 1.0" in text


def test_a_client_needs_a_server() -> None:
    with pytest.raises(ValueError, match="URL"):
        client_at()
    with pytest.raises(ValueError, match="insecure"):
        client_at("http://10.0.0.2:8600")


async def test_two_processes_with_one_id_notice_each_other(
    serve: Any, run: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    other = RelaySpec(addresses=["10.0.0.8"], ports=[443])
    async with serve() as at, run(client_of(at, reassert_after_s=0.1)) as first:
        first.publish(Kind.RELAY, "r", RELAY)
        assert await first.settled(5)
        async with run(client_of(at, reassert_after_s=0.1)) as second:
            second.publish(Kind.RELAY, "r", other)
            async with asyncio.timeout(10):
                while len([record for record in caplog.records if record.message == "id_in_use"]) < 2:
                    await asyncio.sleep(0.01)
            # The second writes again once, too, and then both leave it: it stands as the second one wrote it.
            await until(first, lambda mesh: mesh.relays("a") and mesh.relays("a")[0].spec == other)
            async with asyncio.timeout(10):
                while not first.troubles:
                    await asyncio.sleep(0.01)
            revision = at.store.revision
            await asyncio.sleep(0.5)
            assert at.store.revision == revision, "no war"
            assert first.rivals == second.rivals == ("relay/a/r",)
            ((condition, words),) = first.troubles
            assert condition == "discovery_records"
            assert "another process with this id" in words
            assert second.troubles == ()
        await until(first, lambda mesh: mesh.relays("a") and mesh.relays("a")[0].spec == RELAY)
        assert await first.settled(5)
        assert first.troubles == ()


async def test_a_successor_is_no_rival_and_keeps_its_record(
    serve: Any, run: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    other = RelaySpec(addresses=["10.0.0.8"], ports=[443])
    async with serve() as at, run(client_of(at)) as successor:
        async with run(client_of(at)) as first:
            first.publish(Kind.RELAY, "r", RELAY)
            assert await first.settled(5)
            first.expect_successor(True)
            successor.publish(Kind.RELAY, "r", other)
            assert await successor.settled(5)
            await until(first, lambda mesh: mesh.relays("a")[0].spec == other)
            assert first.rivals == first.troubles == ()
            first.withdraw(Kind.RELAY, "r")
            assert await first.settled(5)
        assert (await at.store.get((Kind.RELAY, "a", "r"))).spec == other, "what it withdraws is its own only"
    assert "id_in_use" not in caplog.text


async def test_a_clock_that_is_apart_from_the_servers_is_told(
    serve: Any, run: Any, until: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as at:
        async with run(client_of(at)) as client:
            await until(client, lambda _: True)
            assert client.clock_ahead_s == 0
        monkeypatch.setattr("discovery.client.servers._wall_clock", lambda: time.time() - 100)
        async with run(client_of(at)) as client:
            await until(client, lambda _: True)
            assert 98 <= client.clock_ahead_s <= 102
    said = [record.event["why"] for record in caplog.records if record.message == "clocks_apart"]  # type: ignore[attr-defined]
    assert len(said) == 1
    assert at.url in said[0]
    assert "s ahead of ours" in said[0]


async def test_a_certificate_that_fails_for_a_clock_says_by_how_much(
    serve: Any, run: Any, tmp_path: Path, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    authority = trustme.CA()
    ended = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    certificate = authority.issue_cert("127.0.0.1", not_after=ended)
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with (
        serve(tokens_file=tokens.path, tls_cert=tmp_path / "server.pem") as at,
        run(client_of(at, network="b", token=tokens["b"], ca_file=tmp_path / "ca.pem")),
        asyncio.timeout(10),
    ):
        while "it ended 36" not in str([getattr(record, "event", None) for record in caplog.records]):
            await asyncio.sleep(0.02)
