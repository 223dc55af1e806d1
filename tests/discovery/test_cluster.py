"""Several discovery servers with one etcd cluster: clients keep working when any part of it fails."""

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from discovery.api.timing import ServerTiming, WatchTiming
from discovery.client.client import DiscoveryClient
from discovery.client.config import DiscoveryClientConfig
from discovery.model.mesh import Kind, RelaySpec
from discovery.store import EtcdAccess, EtcdStore, EtcdTiming
from tests.support.etcd_cluster import Member, etcd_cluster, etcd_hosts
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.needs("etcd"), pytest.mark.interop, pytest.mark.slow]


def relay(last: int) -> RelaySpec:
    return RelaySpec(addresses=[f"10.0.0.{last}"], ports=[443])


def client_at(urls: list[str], network: str) -> DiscoveryClient:
    return DiscoveryClient(DiscoveryClientConfig(urls=urls, network=network))


def store_at(*members: Member) -> EtcdStore:
    access = EtcdAccess(endpoints=tuple(member.url for member in members))
    return EtcdStore(access, timing=EtcdTiming(stale_after_s=1.0, probe_s=0.1, call_s=1.0))


async def leader_of(members: list[Member]) -> Member:
    def leader() -> Member | None:
        return next((member for member in members if member.leads()), None)

    found = await eventually(lambda: asyncio.to_thread(leader))
    assert isinstance(found, Member)
    return found


TIMING = ServerTiming(watch=WatchTiming(heartbeat_s=0.2))


async def stale_records(at: Any) -> Any:
    """Wait until a server marks its answers as stale; return such an answer."""

    async def stale() -> Any:
        answer = await at.ask("GET", "/v1/records")
        return answer if answer.headers.get("Crossnet-Stale") is not None else None

    return await eventually(stale)


async def test_clients_survive_the_loss_of_a_server_the_leader_and_the_majority(
    tmp_path: Path, serve: Any, run: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with etcd_cluster(tmp_path, 3) as members:
        async with AsyncExitStack() as servers, AsyncExitStack() as first:
            # Both servers can reach every member.
            one = await first.enter_async_context(serve(store_at(*members), timing=TIMING))
            two = await servers.enter_async_context(serve(store_at(*members), timing=TIMING))
            urls = [one.url, two.url]
            async with (
                run(client_at(urls, "a")) as client,
                run(client_at(urls, "b")) as other,
            ):
                client.publish(Kind.RELAY, "r", relay(1))
                assert await client.settled(10)
                await until(other, lambda mesh: mesh.relays("a"))

                # A discovery server ends: its clients switch to the other one, and resume there.
                await first.aclose()
                client.publish(Kind.RELAY, "r", relay(2))
                assert await client.settled(10)
                await until(other, lambda mesh: mesh.relays("a")[0].spec == relay(2))

                # The leader of etcd is killed: writes resume once another is elected.
                leader = await leader_of(members)
                leader.kill()
                client.publish(Kind.RELAY, "r", relay(3))
                assert await client.settled(20)
                await until(other, lambda mesh: mesh.relays("a")[0].spec == relay(3))

                # A second member hangs, so a minority is left. It refuses writes; reads are answered, but marked as stale.
                rest = [member for member in members if member is not leader]
                rest[1].signal(signal.SIGSTOP)
                answer = await stale_records(two)
                assert [record["id"] for record in answer.body["records"]] == ["r"]
                refused = await two.ask("PUT", "/v1/records/network/c/c", {"spec": {}})
                assert (refused.status, refused.body["error"]) == (503, "unavailable")
                async with two.watch() as lines:
                    told = [await anext(lines) for _ in range(5)]
                assert [line["type"] for line in told[:4]] == ["reset", "put", "sync", "stale"]
                assert told[4]["age_s"] > 0
                assert client.mesh.relays("a")  # no client has lost the relay
                await eventually(lambda: client.age_s)

                # The member continues. The writer of the leased record is alive, and writes it again if its lease has ended.
                rest[1].signal(signal.SIGCONT)
                client.publish(Kind.RELAY, "r", relay(4))
                assert await client.settled(20)
                await until(other, lambda mesh: mesh.relays("a") and mesh.relays("a")[0].spec == relay(4))
                await eventually(lambda: not client.age_s and not two.store.stale_s)
    assert "a request failed" not in caplog.text


@pytest.mark.needs("netns", "ip")
@pytest.mark.netns
async def test_a_real_partition(tmp_path: Path, serve: Any, run: Any, until: Any) -> None:
    """The majority keeps working. The minority refuses writes, marks reads as stale, and catches up after the partition."""
    with etcd_hosts(tmp_path) as (members, cut):
        async with (
            serve(store_at(*members[:2]), timing=TIMING) as inside,
            serve(store_at(members[2]), timing=TIMING) as outside,
            run(client_at([outside.url, inside.url], "a")) as client,
        ):
            client.publish(Kind.RELAY, "r", relay(1))
            assert await client.settled(10)
            cut(True)
            client.publish(Kind.RELAY, "r", relay(2))
            assert await client.settled(30)  # refused by one server, accepted by the other
            assert (await inside.store.get((Kind.RELAY, "a", "r"))).spec == relay(2)
            answer = await stale_records(outside)
            assert [record["spec"]["addresses"] for record in answer.body["records"]] == [["10.0.0.1"]]
            assert (await outside.ask("PUT", "/v1/records/network/c/c", {"spec": {}})).status == 503
            assert inside.store.stale_s == 0
            # The server that is cut off has ended the client's watch, and the client follows the other one.
            await until(client, lambda mesh: mesh.relays("a")[0].spec == relay(2))
            cut(False)

            async def caught_up() -> bool:
                record = await outside.store.get((Kind.RELAY, "a", "r"))
                return not outside.store.stale_s and record.spec == relay(2)

            await eventually(caught_up, 30)
            assert outside.store.epoch == inside.store.epoch
            # 200: the write that failed without an answer was on its way to the leader, and has arrived in the meantime.
            assert (await outside.ask("PUT", "/v1/records/network/c/c", {"spec": {}})).status in (200, 201)
