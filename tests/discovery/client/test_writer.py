"""Our records at real servers: written, renewed, lost, and written by several processes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from discovery.model.mesh import Kind, Mesh, NetworkSpec, RelaySpec, ServiceSpec, VipSpec
from tests.discovery.client.clients import OTHER, RELAY, CountingStore, WallClock, client_at, client_of
from tests.discovery.client.older_server import older_server
from tests.discovery.waiting import LogWaiter, stored
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio


async def test_publishing_twice_writes_once(serve: Any, run: Any) -> None:
    async with serve() as at, run(client_of(at)) as client:
        for _ in range(3):
            client.publish(Kind.RELAY, "r", RELAY)
            client.withdraw(Kind.RELAY, "nothing")
            assert await client.settled(5)
        assert at.store.revision == 1


async def test_the_first_writer_of_an_if_absent_record_wins(serve: Any, run: Any, until: Any) -> None:
    async with serve() as at, run(client_of(at)) as one, run(client_of(at)) as two:
        for number, client in enumerate((one, two)):
            spec = VipSpec(name="orders.shop", address=f"10.200.0.{number + 1}")
            client.publish(Kind.VIP, "orders", spec, leased=False, if_absent=True)
            assert await client.settled(5)
        assert at.store.revision == 1
        for client in (one, two):
            mesh = await until(client, lambda mesh: mesh.vips("a"))
            assert mesh.vips("a")[0].spec.address == "10.200.0.1"
        two.withdraw(Kind.VIP, "orders")  # not its record
        assert await two.settled(5)
        assert at.store.revision == 1
        # When it is deleted, another process that still publishes it writes its own.
        two.publish(Kind.VIP, "orders", VipSpec(name="orders.shop", address="10.200.0.2"), leased=False, if_absent=True)
        assert await two.settled(5)
        one.withdraw(Kind.VIP, "orders")
        mesh = await until(two, lambda mesh: mesh.vips("a") and mesh.vips("a")[0].spec.address == "10.200.0.2")
        assert mesh.vips("a")[0].revision == 3


async def test_records_published_before_the_run_are_written(serve: Any, run: Any) -> None:
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
        assert at.store.revision == 4  # both were leased, and were deleted when the client closed


async def test_negotiated_fields_are_written_once_the_server_knows_them(serve: Any, run: Any) -> None:
    named = ServiceSpec(name="o.s", ports={"8443": []}, port_names={"https": 8443})
    plain = ServiceSpec(name="o.s", ports={"8443": []})

    async def there(at: Any) -> ServiceSpec | None:
        record = await at.store.get((Kind.SERVICE, "a", "s"))
        return record.spec if record is not None else None

    async with serve() as at, older_server(at) as older, run(client_at(older.url)) as client:
        client.publish(Kind.SERVICE, "s", named, leased=False)
        assert await client.settled(5)
        assert await there(at) == plain
        older.upgrade()

        async def named_there() -> bool:
            return await there(at) == named

        await stored(at.store, named_there)
        assert await client.settled(5)
    async with serve() as at, run(client_of(at)) as client:
        client.publish(Kind.SERVICE, "s", named, leased=False)  # most likely before the first answer
        assert await client.settled(5)
        assert await there(at) == named


async def test_closing_ends_the_lease_and_leaves_the_rest(serve: Any, run: Any) -> None:
    async with serve() as at:
        async with run(client_of(at)) as client:
            client.publish(Kind.RELAY, "r", RELAY)
            client.publish(Kind.NETWORK, "a", NetworkSpec(), leased=False)
            assert await client.settled(5)
        assert [record.kind for record in (await at.store.snapshot()).records] == [Kind.NETWORK]
        assert await at.store.leases("anyone") == []


async def test_records_of_a_dead_client_expire_with_its_lease(serve: Any, tmp_path: Path) -> None:
    store = CountingStore(tmp_path / "discovery.db")
    async with serve(store) as at:
        client = client_of(at, lease_ttl_s=1)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(client.run())
            client.publish(Kind.RELAY, "r", RELAY)
            assert await client.settled(5)
            await store.renewals(4)  # one each third of the TTL: the lease outlives its TTL
            assert await at.store.get((Kind.RELAY, "a", "r")) is not None
            task.cancel()  # it ends without closing

        async def gone() -> bool:
            return await store.get((Kind.RELAY, "a", "r")) is None

        await stored(store, gone)


async def test_records_are_written_again_after_a_lost_lease_or_deletion(serve: Any, run: Any, until: Any) -> None:
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


async def test_a_lost_lease_is_noticed_at_renewal(
    serve: Any, run: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as at, run(client_of(at, lease_ttl_s=1)) as client:
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
        lease = client.mesh.relays("a")[0].lease
        await at.store.put(
            (Kind.RELAY, "a", "r"), OTHER
        )  # another process has the record now, so the watch does not reveal the lost lease
        await at.store.revoke(lease)
        await until(client, lambda mesh: mesh.relays("a")[0].spec == RELAY and mesh.relays("a")[0].lease != lease)
    assert "our lease has ended" in caplog.text


@pytest.mark.parametrize("years", [30, -30])
async def test_a_wall_clock_that_jumps_ends_no_lease(
    serve: Any, run: Any, until: Any, tmp_path: Path, years: int
) -> None:
    wall, store = WallClock(), CountingStore(tmp_path / "discovery.db")
    async with (
        serve(store, wall_clock=wall) as at,
        run(client_of(at, lease_ttl_s=1, wall_clock=wall)) as client,
    ):
        client.publish(Kind.RELAY, "r", RELAY)
        before = (await until(client, lambda mesh: mesh.relays("a"))).relays("a")
        wall.ahead_s = years * 365 * 86_400
        await store.renewals(5)  # one each third of the TTL: longer than the TTL
        assert client.connected
        assert client.mesh.relays("a") == before
        assert list((await at.store.snapshot()).records) == list(before)


async def test_closing_takes_a_limited_time(serve: Any, run: Any) -> None:
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


async def test_two_processes_with_one_id_detect_each_other(serve: Any, run: Any, until: Any, logged: LogWaiter) -> None:
    other = RelaySpec(addresses=["10.0.0.8"], ports=[443])
    async with serve() as at, run(client_of(at, reassert_after_s=0.1)) as first:
        first.publish(Kind.RELAY, "r", RELAY)
        assert await first.settled(5)
        async with run(client_of(at, reassert_after_s=0.1)) as second:
            second.publish(Kind.RELAY, "r", other)
            await logged.until("id_in_use", 2)
            # The second writes again once, too. Then both leave the record as the second has written it.
            await until(first, lambda mesh: mesh.relays("a") and mesh.relays("a")[0].spec == other)
            await eventually(lambda: first.troubles)
            revision = at.store.revision
            await asyncio.sleep(0.3)  # three times the pause after which either would write again
            assert at.store.revision == revision, "no war"
            assert first.rivals == second.rivals == ("relay/a/r",)
            ((condition, words),) = first.troubles
            assert condition == "discovery_records"
            assert "another process with this id" in words
            assert second.troubles == ()
        await until(first, lambda mesh: mesh.relays("a") and mesh.relays("a")[0].spec == RELAY)
        assert await first.settled(5)
        assert first.troubles == ()


async def test_a_successor_is_not_reported_and_keeps_its_record(
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
