"""The store in etcd: two servers with one cluster, and an etcd that hangs, restarts, compacts or ends leases."""

import asyncio
import base64
import dataclasses
import logging
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from discovery.model.mesh import Deletion, Kind, NetworkSpec, VipSpec
from discovery.store import Change, EtcdAccess, EtcdStore, EtcdTiming, PreconditionFailed, StoreError, UnknownLease
from discovery.store.etcdapi import range_end
from tests.discovery.waiting import stored
from tests.support.etcd_cluster import Member, etcd_cluster, free_ports
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.needs("etcd"), pytest.mark.interop]

KEY = (Kind.VIP, "b", "v")
SPEC = VipSpec(name="orders.shop", address="10.200.0.1")


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    with etcd_cluster(tmp_path_factory.mktemp("etcd")) as members:
        yield members[0]


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"/{request.node.name}/"


@asynccontextmanager
async def running(*stores: EtcdStore, opened: bool = False) -> AsyncIterator[Sequence[EtcdStore]]:
    for store in stores:
        if not opened:
            await store.open()
    failure: BaseException | None = None
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.run()) for store in stores]
        try:
            yield stores
        except BaseException as error:  # noqa: BLE001 - raised below, and not inside an exception group
            failure = error
        for task in tasks:
            task.cancel()
    for store in stores:
        await store.close()
    if failure is not None:
        raise failure


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def test_two_servers_share_records_revisions_and_epoch(member: Member, prefix: str) -> None:
    access = EtcdAccess(endpoints=(member.url,), prefix=prefix)
    async with running(EtcdStore(access), EtcdStore(access)) as (one, two):
        assert one.epoch == two.epoch
        assert len(one.epoch) == 16
        heard: list[Change] = []
        two.subscribe(heard.extend)
        record = await one.put(KEY, SPEC)
        await stored(two, lambda: heard)
        assert heard == [record]
        assert await two.get(KEY) == record
        with pytest.raises(PreconditionFailed):
            await two.put(KEY, SPEC, if_none_match=True)
        lease = await one.grant(30, "somebody")
        # The other server has it at once, even if the watch has not reported it yet.
        assert await two.lease(lease.id) == lease
        assert await two.renew(lease.id) == lease
        await two.put(KEY, SPEC, lease=lease.id)
        for name in "cde":
            await two.put((Kind.NETWORK, name, name), NetworkSpec(), lease=lease.id)
        del heard[:]
        gone = await one.revoke(lease.id)
        # etcd deletes them in one transaction, so they have one revision and are reported together.
        assert len(gone) == 4
        assert {deletion.revision for deletion in gone} == {one.revision}
        await stored(two, lambda: heard)
        assert sorted(map(str, heard)) == sorted(map(str, gone))
        assert await two.since(record.revision) == gone


async def test_etcd_ends_leases(member: Member, prefix: str) -> None:
    access = EtcdAccess(endpoints=(member.url,), prefix=prefix)
    async with running(EtcdStore(access)) as (store,):
        lease, kept = await store.grant(1, "somebody"), await store.grant(60, "somebody")
        await store.put(KEY, SPEC, lease=lease.id)
        other = await store.put((Kind.NETWORK, "b", "b"), NetworkSpec(), lease=kept.id)
        await stored(store, lambda: lease.id not in store._leases)
        assert (await store.snapshot()).records == (other,)
        assert await store.leases("somebody") == [kept]
        with pytest.raises(UnknownLease):
            await store.renew(lease.id)


async def test_a_server_that_starts_later_has_everything(member: Member, prefix: str) -> None:
    access = EtcdAccess(endpoints=(member.url,), prefix=prefix)
    async with running(EtcdStore(access)) as (one,):
        records = [await one.put((Kind.NETWORK, f"n{n}", f"n{n}"), NetworkSpec()) for n in range(8)]
        lease = await one.grant(30, "somebody")
        async with running(EtcdStore(access, page=3)) as (two,):
            assert sorted((await two.snapshot()).records, key=lambda record: record.id) == records
            assert await two.leases("somebody") == [lease]
            assert await two.since(records[3].revision) is None  # deletions before its start are unknown
            assert await two.since(two.revision) == []


async def test_everything_is_read_again_after_etcd_compacted_the_history(member: Member, prefix: str) -> None:
    access = EtcdAccess(endpoints=(member.url,), prefix=prefix)
    async with running(EtcdStore(access)) as (writer,):
        kept = await writer.put((Kind.NETWORK, "b", "b"), NetworkSpec())
        await writer.put(KEY, SPEC)
        lease = await writer.grant(60, "somebody")
        behind = EtcdStore(access)
        await behind.open()  # but it does not run yet, and misses the changes below
        heard: list[Change] = []
        behind.subscribe(heard.extend)
        await writer.delete(KEY)
        await writer.revoke(lease.id)
        new = await writer.put((Kind.NETWORK, "c", "c"), NetworkSpec())
        await asyncio.to_thread(member.ask, "kv/compaction", {"revision": str(writer.revision)})
        async with running(behind, opened=True):
            await stored(behind, lambda: heard)
            assert heard == [new, Deletion(KEY, new.revision)]
            assert sorted((await behind.snapshot()).records, key=lambda record: record.id) == [kept, new]
            assert await behind.leases("somebody") == []
            again = await writer.put(KEY, SPEC)
            await stored(behind, lambda: behind.revision == again.revision)


async def test_foreign_keys_are_ignored(member: Member, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    def put(key: str, value: str) -> None:
        member.ask("kv/put", {"key": b64(prefix + key), "value": b64(value)})

    for key in ("x", "records/vip/b", "records/other/b/v", "records/vip/B/v", "leases/x/y"):
        put(key, "{}")
    put("records/vip/b/bad", "{")
    put("leases/abc", "[]")
    async with running(EtcdStore(EtcdAccess(endpoints=(member.url,), prefix=prefix))) as (store,):
        assert (await store.snapshot()).records == ()
        put("records/vip/b/bad", '{"unknown": 1}')
        put("y", "")
        member.ask("kv/deleterange", {"key": b64(prefix + "x")})
        record = await store.put(KEY, SPEC)
        assert (await store.snapshot()).records == (record,)
    assert sum("not ours" in entry.message for entry in caplog.records) == 6
    assert sum("cannot be read" in entry.message for entry in caplog.records) == 3


async def test_a_store_does_not_open_without_etcd() -> None:
    (port,) = free_ports(1)
    with pytest.raises(StoreError, match=f"etcd: http://127.0.0.1:{port}"):
        await EtcdStore(EtcdAccess(endpoints=(f"http://127.0.0.1:{port}",)), timing=EtcdTiming(open_s=0.3)).open()


async def test_an_etcd_that_hangs_makes_reads_stale_and_refuses_writes(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    timing = EtcdTiming(stale_after_s=0.5, probe_s=0.1, call_s=0.5)
    caplog.set_level(logging.INFO)
    with etcd_cluster(tmp_path) as (alone,):
        access = EtcdAccess(endpoints=(alone.url,), prefix=prefix)
        async with running(EtcdStore(access, timing=timing)) as (store,):
            record = await store.put(KEY, SPEC)
            assert store.stale_s == 0
            alone.signal(signal.SIGSTOP)
            await eventually(lambda: store.stale_s > 0)
            assert await store.get(KEY) == record
            assert await store.since(store.revision) == []
            for action in (
                store.put(KEY, SPEC),
                store.delete(KEY),
                store.grant(10, "x"),
                store.lease("abc"),
                store.revoke("abc"),
                store.since(store.revision + 1),
            ):
                with pytest.raises(StoreError):
                    await action
            alone.signal(signal.SIGCONT)
            await eventually(lambda: store.stale_s == 0)
            assert (await store.put(KEY, SPEC)).revision > record.revision
    assert sum("unexpected answer" in entry.message for entry in caplog.records) <= 2


async def test_etcd_over_mutual_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def certify(name: str, host: str, by: trustme.CA = authority) -> None:
        made = by.issue_cert(host)
        made.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        made.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")

    certify("server", "127.0.0.1")
    certify("client", "discovery.example")
    options = [f"--cert-file={tmp_path}/server.pem", f"--key-file={tmp_path}/server.key"]
    options += [f"--trusted-ca-file={tmp_path}/ca.pem"]
    with etcd_cluster(tmp_path, extra=options) as (member,):
        access = EtcdAccess(
            endpoints=(member.url,),
            ca=tmp_path / "ca.pem",
            cert=tmp_path / "client.pem",
            key=tmp_path / "client.key",
        )
        async with running(EtcdStore(access)) as (store,):
            assert (await store.put(KEY, SPEC)).spec == SPEC
            # A replaced certificate is used without a restart, whether it is accepted or not.
            certify("client", "discovery.example", trustme.CA())
            with pytest.raises(StoreError):
                await store.put(KEY, SPEC)
            certify("client", "discovery.example")
            await written(store, "10.200.0.2")


PASSWORD = "correct horse"


def with_users(member: Member, prefix: str) -> None:
    """Enable authentication, with root and a user who has all rights below the prefix and no others."""
    ask = member.ask
    for name, password in (("root", "r00t"), ("crossnet", PASSWORD)):
        ask("auth/user/add", {"name": name, "password": password})
        ask("auth/role/add", {"name": name})
        ask("auth/user/grant", {"user": name, "role": name})
    permission = {"permType": "READWRITE", "key": b64(prefix), "range_end": range_end(prefix)}
    ask("auth/role/grant", {"name": "crossnet", "perm": permission})
    ask("auth/enable", {})


def signed_tokens(folder: Path) -> list[str]:
    """Make etcd issue signed tokens, which it does not store. They contain the revision of users and rights."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    (folder / "private.pem").write_bytes(private)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    return [f"--auth-token=jwt,pub-key={folder}/public.pem,priv-key={folder}/private.pem,sign-method=RS256,ttl=60s"]


@pytest.mark.parametrize("signed", [False, True])
async def test_a_cluster_with_authentication(tmp_path: Path, prefix: str, signed: bool) -> None:
    with etcd_cluster(tmp_path, extra=signed_tokens(tmp_path) if signed else ()) as (member,):
        await asyncio.to_thread(with_users, member, prefix)
        ours = EtcdAccess(endpoints=(member.url,), prefix=prefix, username="crossnet", password=PASSWORD)
        assert PASSWORD not in repr(ours)

        async def refused(bad: EtcdAccess, why: str) -> None:
            # Long enough for an answer on a busy machine: etcd's password hash is slow by design.
            with pytest.raises(StoreError, match=why):
                await EtcdStore(bad, timing=EtcdTiming(open_s=4.0)).open()

        async with asyncio.TaskGroup() as group:
            group.create_task(refused(dataclasses.replace(ours, username=None), "user name is empty"))
            group.create_task(refused(dataclasses.replace(ours, password="wrong"), "invalid user ID or password"))
            group.create_task(refused(dataclasses.replace(ours, prefix="/other/"), "permission denied"))
        async with running(EtcdStore(ours), EtcdStore(ours)) as (one, two):
            lease = await one.grant(30, "somebody")
            await one.put(KEY, SPEC, lease=lease.id)
            await stored(two, lambda: two._records)
            # Unsigned tokens are only in etcd's memory, so the restart invalidates them.
            member.kill()
            member.start(f"{member.name}={member.peer_url}")
            await written(one, "10.200.0.2")
            await stored(two, lambda: address_in(two) == "10.200.0.2")
            # A change of users makes all signed tokens too old for a write.
            asked = {"name": "root", "password": "r00t"}
            root = (await asyncio.to_thread(member.ask, "auth/authenticate", asked))["token"]
            another = {"name": "another", "password": "x"}
            await asyncio.to_thread(member.ask, "auth/user/add", another, 2.0, str(root))
            await two.put(KEY, VipSpec(name="orders.shop", address="10.200.0.3"))
            await stored(one, lambda: address_in(one) == "10.200.0.3")
            assert not one.stale_s
            assert not two.stale_s


def address_in(store: EtcdStore) -> str:
    spec = store._records[KEY].spec
    assert isinstance(spec, VipSpec)
    return spec.address


async def written(store: EtcdStore, address: str) -> None:
    """Write, and retry until etcd can be reached."""

    async def write() -> bool:
        try:
            await store.put(KEY, VipSpec(name="orders.shop", address=address))
        except StoreError:
            return False
        return True

    await eventually(write)
