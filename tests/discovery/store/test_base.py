"""The contract of all stores."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from discovery.model.mesh import AnyRecord, Deletion, Kind, NetworkSpec, VipSpec
from discovery.store import (
    Change,
    EtcdAccess,
    EtcdStore,
    MemoryStore,
    PreconditionFailed,
    SqliteStore,
    Store,
    UnknownLease,
)
from tests.support.etcd_cluster import etcd_cluster

pytestmark = pytest.mark.anyio

KEY = (Kind.VIP, "b", "v")
SPEC = VipSpec(name="orders.shop", address="10.200.0.1")
OTHER = VipSpec(name="orders.shop", address="10.200.0.2")


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with etcd_cluster(tmp_path_factory.mktemp("etcd")) as members:
        yield members[0].url


@asynccontextmanager
async def running(store: Store) -> AsyncIterator[Store]:
    await store.open()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(store.run())
        yield store
        task.cancel()
    await store.close()
    await store.close()


prefixes = itertools.count()


@pytest.fixture(params=["memory", "sqlite", pytest.param("etcd", marks=pytest.mark.needs("etcd"))])
async def store(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> AsyncIterator[Store]:
    store: Store
    if request.param == "memory":
        store = MemoryStore(clock=clock, max_tombstones=5)
    elif request.param == "sqlite":
        store = SqliteStore(tmp_path / "discovery.db", clock=clock, max_tombstones=5)
    else:
        access = EtcdAccess(endpoints=(request.getfixturevalue("etcd"),), prefix=f"/test-{next(prefixes)}/")
        store = EtcdStore(access, max_tombstones=5)
    async with running(store):
        yield store


@pytest.fixture(params=["memory", "sqlite"])
async def clocked(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> AsyncIterator[Store]:
    """Stores that expire leases by the given clock; etcd has its own."""
    store: Store = MemoryStore(clock=clock)
    if request.param == "sqlite":
        store = SqliteStore(tmp_path / "discovery.db", clock=clock)
    async with running(store):
        yield store


async def pass_time(store: Store, clock: Clock, seconds: int) -> list[Deletion]:
    ended: list[Deletion] = []
    for _ in range(seconds):
        clock.now += 1
        ended.extend(await store.expire())
    return ended


async def test_a_store_starts_empty(store: Store) -> None:
    assert len(store.epoch) == 16
    assert store.stale_s == 0
    assert await store.get(KEY) is None
    assert (await store.snapshot()).records == ()
    assert await store.since(store.revision) == []
    assert await store.count("b") == 0
    assert await store.expire() == ()


async def test_written_records_can_be_read(store: Store) -> None:
    base = store.revision
    record = await store.put(KEY, SPEC)
    assert (record.key, record.spec, record.revision, record.lease) == (KEY, SPEC, base + 1, None)
    assert await store.get(KEY) == record
    again = await store.put(KEY, OTHER)
    assert again.revision == store.revision == base + 2
    assert (await store.snapshot()).records == (again,)
    assert await store.count("b") == 1


async def test_listing_by_kind_and_network(store: Store) -> None:
    base = store.revision
    await store.put(KEY, SPEC)
    for network in "bc":
        await store.put((Kind.NETWORK, network, network), NetworkSpec())

    async def keys(kind: Kind | None = None, network: str | None = None) -> list[object]:
        snapshot = await store.snapshot(kind, network)
        assert snapshot.revision == base + 3
        return sorted(record.key for record in snapshot.records)  # type: ignore[return-value]

    assert await keys() == [(Kind.NETWORK, "b", "b"), (Kind.NETWORK, "c", "c"), KEY]
    assert await keys(Kind.NETWORK) == [(Kind.NETWORK, "b", "b"), (Kind.NETWORK, "c", "c")]
    assert await keys(network="b") == [(Kind.NETWORK, "b", "b"), KEY]
    assert await keys(Kind.VIP, "c") == []


async def test_conditional_writes(store: Store) -> None:
    with pytest.raises(PreconditionFailed) as caught:
        await store.put(KEY, SPEC, if_match=store.revision + 1)
    assert caught.value.revision is None
    record = await store.put(KEY, SPEC, if_none_match=True)
    with pytest.raises(PreconditionFailed) as caught:
        await store.put(KEY, OTHER, if_none_match=True)
    assert caught.value.revision == record.revision
    with pytest.raises(PreconditionFailed):
        await store.put(KEY, OTHER, if_match=record.revision + 1)
    with pytest.raises(PreconditionFailed):
        await store.delete(KEY, if_match=record.revision + 1)
    assert await store.get(KEY) == record
    newer = await store.put(KEY, OTHER, if_match=record.revision)
    assert store.revision == newer.revision == record.revision + 1
    assert await store.delete(KEY, if_match=newer.revision) == Deletion(KEY, newer.revision + 1)
    with pytest.raises(PreconditionFailed):
        await store.delete(KEY, if_match=newer.revision)


async def test_deleted_records_are_gone(store: Store) -> None:
    base = store.revision
    await store.put(KEY, SPEC)
    assert await store.delete(KEY) == Deletion(KEY, base + 2)
    assert await store.delete(KEY) is None
    assert store.revision == base + 2
    assert await store.get(KEY) is None
    assert await store.count("b") == 0
    assert (await store.put(KEY, SPEC, if_none_match=True)).revision == base + 3


async def test_history_has_the_last_change_of_each_record(store: Store) -> None:
    base = store.revision
    first = await store.put(KEY, SPEC)
    kept = await store.put((Kind.NETWORK, "b", "b"), NetworkSpec())
    gone = await store.put((Kind.NETWORK, "c", "c"), NetworkSpec())
    await store.delete(gone.key)
    last = await store.put(KEY, OTHER)
    assert await store.since(base) == [kept, Deletion(gone.key, base + 4), last]
    assert await store.since(first.revision) == [kept, Deletion(gone.key, base + 4), last]
    assert await store.since(base + 4) == [last]
    assert await store.since(base + 5) == []
    await store.put(gone.key, NetworkSpec())
    assert [change.revision - base for change in await store.since(base) or ()] == [2, 5, 6]


async def test_history_that_is_not_known_is_none(store: Store) -> None:
    base = store.revision
    assert await store.since(base + 1) is None
    for _ in range(6):  # one deletion more than is remembered
        await store.put(KEY, SPEC)
        await store.delete(KEY)
        await store.put((Kind.VIP, "b", f"v{store.revision}"), SPEC)
    for record in (await store.snapshot()).records:
        await store.delete(record.key)
    revision = store.revision
    assert await store.since(base) is None
    assert await store.since(revision - 6) is None
    assert await store.since(revision + 1) is None
    assert len(await store.since(revision - 5) or ()) == 5
    assert await store.since(revision) == []


async def test_subscribers_get_every_write_in_order(store: Store) -> None:
    heard: list[Change] = []

    def listen(changes: Sequence[Change]) -> None:
        heard.extend(changes)

    stop = store.subscribe(listen)
    record = await store.put(KEY, SPEC)
    deletion = await store.delete(KEY)
    await store.delete(KEY)
    assert heard == [record, deletion]
    stop()
    stop()
    await store.put(KEY, SPEC)
    assert len(heard) == 2


async def test_records_are_deleted_when_their_lease_ends(clocked: Store, clock: Clock) -> None:
    lease = await clocked.grant(10, "somebody")
    assert await clocked.lease(lease.id) == lease
    assert await clocked.leases("somebody") == [lease]
    assert await clocked.leases("nobody") == []
    await clocked.put(KEY, SPEC, lease=lease.id)
    await clocked.put((Kind.NETWORK, "b", "b"), NetworkSpec(), lease=lease.id)
    kept = await clocked.put((Kind.NETWORK, "c", "c"), NetworkSpec())
    assert await pass_time(clocked, clock, 9) == []
    assert await clocked.renew(lease.id) == lease
    assert await pass_time(clocked, clock, 9) == []
    heard: list[Change] = []
    clocked.subscribe(heard.extend)
    ended = await pass_time(clocked, clock, 1)
    assert ended == heard == [Deletion((Kind.NETWORK, "b", "b"), 4), Deletion(KEY, 5)]
    assert (await clocked.snapshot()).records == (kept,)
    assert await clocked.lease(lease.id) is None
    for action in (clocked.renew(lease.id), clocked.revoke(lease.id), clocked.put(KEY, SPEC, lease=lease.id)):
        with pytest.raises(UnknownLease):
            await action
    assert clocked.revision == 5


async def test_leases_have_an_owner_and_can_be_renewed(store: Store) -> None:
    lease = await store.grant(10, "somebody")
    assert await store.lease(lease.id) == lease
    assert await store.lease("abc") is None
    assert await store.leases("somebody") == [lease]
    assert await store.leases("nobody") == []
    assert await store.renew(lease.id) == lease


async def test_revoking_a_lease_deletes_its_records(store: Store) -> None:
    lease = await store.grant(10, "somebody")
    await store.put(KEY, SPEC, lease=lease.id)
    base = store.revision
    assert await store.revoke(lease.id) == [Deletion(KEY, base + 1)]
    assert await store.get(KEY) is None
    empty = await store.grant(10, "somebody")
    assert await store.revoke(empty.id) == []
    assert (await store.snapshot()).records == ()
    for action in (store.renew(lease.id), store.revoke(lease.id), store.put(KEY, SPEC, lease=lease.id)):
        with pytest.raises(UnknownLease):
            await action
    for nonsense in ("x", "-1", "0", "f" * 40):
        with pytest.raises(UnknownLease):
            await store.renew(nonsense)


async def test_a_record_is_attached_to_the_lease_of_its_last_write(clocked: Store, clock: Clock) -> None:
    old, new = await clocked.grant(10, "before a crash"), await clocked.grant(20, "after it")
    await clocked.put(KEY, SPEC, lease=old.id)
    taken = await clocked.put(KEY, SPEC, lease=new.id)
    assert await pass_time(clocked, clock, 12) == []
    assert await clocked.get(KEY) == taken
    freed = await clocked.put(KEY, SPEC)
    assert freed.lease is None
    assert await pass_time(clocked, clock, 12) == []
    assert await clocked.get(KEY) == freed


async def test_leases_survive_a_pause_of_the_server(clocked: Store, clock: Clock) -> None:
    lease = await clocked.grant(10, "somebody")
    await clocked.put(KEY, SPEC, lease=lease.id)
    await pass_time(clocked, clock, 2)
    clock.now += 60
    assert await clocked.expire() == ()
    assert await pass_time(clocked, clock, 7) == []
    assert await pass_time(clocked, clock, 1) == [Deletion(KEY, 2)]


async def test_concurrent_writes_are_sequential(store: Store) -> None:
    won: list[AnyRecord] = []

    async def claim(number: int) -> None:
        try:
            won.append(await store.put(KEY, VipSpec(name="o.s", address=f"10.200.0.{number}"), if_none_match=True))
        except PreconditionFailed:
            pass

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(claim(number))
    assert [await store.get(KEY)] == won
