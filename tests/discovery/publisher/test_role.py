"""The publisher with a test server for the Kubernetes API and a real discovery server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from discovery.client.client import DiscoveryClient
from discovery.client.config import DiscoveryClientConfig
from discovery.model.mesh import Kind, ServiceSpec
from discovery.pacing.backoff import Backoff
from discovery.publisher import Publisher, PublisherConfig
from discovery.publisher.events import EVENT_TIMING, EventTiming
from discovery.publisher.table import record_id
from tests.discovery.waiting import LogWaiter, stored
from tests.support.kube_server import KubeServer, kube_server

pytestmark = pytest.mark.anyio

EXPORTED = {"annotations": {"crossnet.io/export": "true"}}
IMPATIENT = Backoff(0.1, 0.1)
PORTS = {"ports": [{"name": "https", "port": 8443, "protocol": "TCP"}]}


def put_service(server: KubeServer, name: str, namespace: str = "shop", **metadata: Any) -> None:
    server.put("services", namespace, name, metadata=EXPORTED | metadata, spec=PORTS)


def put_slice(server: KubeServer, name: str, service: str, *addresses: str, namespace: str = "shop") -> None:
    server.put(
        "endpointslices",
        namespace,
        name,
        metadata={"labels": {"kubernetes.io/service-name": service}},
        addressType="IPv4",
        endpoints=[{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
        ports=[{"name": "https", "port": 9443, "protocol": "TCP"}],
    )


@asynccontextmanager
async def publishing(
    kube: KubeServer, at: Any, tmp_path: Path, *, timing: EventTiming = EVENT_TIMING, **settings: Any
) -> AsyncIterator[tuple[Publisher, DiscoveryClient]]:
    (tmp_path / "token").write_text("t0ken\n")
    client = DiscoveryClient(DiscoveryClientConfig(urls=[at.url], network="b"))
    config = PublisherConfig(network="b", api=kube.url, token_file=tmp_path / "token", **settings)
    publisher = Publisher(config, client, backoff=IMPATIENT, event_timing=timing)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client.run()), group.create_task(publisher.run())]
        try:
            yield publisher, client
        finally:
            for task in tasks:
                task.cancel()


async def endpoints(at: Any) -> dict[str, list[str]]:
    records = (await at.store.snapshot(Kind.SERVICE, "b")).records
    return {record.spec.name: record.spec.ports.get("8443", []) for record in records}


async def until(at: Any, expected: dict[str, list[str]]) -> None:
    """Wait until these services are published, with these endpoints."""

    async def published() -> bool:
        return await endpoints(at) == expected

    await stored(at.store, published)


NAME = "orders.shop.svc.cluster.local"


async def test_a_cluster_is_published_and_followed(serve: Any, tmp_path: Path) -> None:
    async with kube_server() as kube, serve() as at:
        put_service(kube, "orders")
        kube.put("services", "shop", "private", spec=PORTS)
        for number in range(3):  # more than a page
            put_slice(kube, f"orders-{number}", "orders", f"10.1.0.{number}")
        async with publishing(kube, at, tmp_path) as (publisher, client):
            await until(at, {NAME: ["10.1.0.0:9443", "10.1.0.1:9443", "10.1.0.2:9443"]})
            assert publisher.listed
            assert all(record.lease is None for record in (await at.store.snapshot()).records)
            kube.delete("endpointslices", "shop", "orders-0")
            await until(at, {NAME: ["10.1.0.1:9443", "10.1.0.2:9443"]})
            put_slice(kube, "orders-1", "orders", "10.1.0.9")
            await until(at, {NAME: ["10.1.0.2:9443", "10.1.0.9:9443"]})
            put_service(kube, "orders", annotations={})  # no longer exported
            await until(at, {})
            put_service(kube, "orders")
            put_service(kube, "cart", "other")
            await until(at, {NAME: ["10.1.0.2:9443", "10.1.0.9:9443"], "cart.other.svc.cluster.local": []})
            kube.delete("services", "other", "cart")
            await until(at, {NAME: ["10.1.0.2:9443", "10.1.0.9:9443"]})
            assert await client.settled(5)
        assert list(await endpoints(at)) == [NAME]  # the services outlive their publisher


async def test_a_watch_resumes_from_its_last_version(serve: Any, tmp_path: Path) -> None:
    async with kube_server() as kube, serve() as at:
        put_service(kube, "orders")
        async with publishing(kube, at, tmp_path):
            await until(at, {NAME: []})
            await kube.until(lambda: kube.watches == 2)
            put_slice(kube, "orders-1", "orders", "10.1.0.1")
            await until(at, {NAME: ["10.1.0.1:9443"]})
            kube.bookmark()
            version = kube.version
            await kube.until(lambda: kube.told == {"services": version, "endpointslices": version})
            del kube.asked[:]
            kube.end_watches()
            await kube.until(lambda: len(kube.asked) >= 2)
            assert {query.get("resourceVersion") for _, query in kube.asked} == {version}
            put_slice(kube, "orders-1", "orders", "10.1.0.2")
            await until(at, {NAME: ["10.1.0.2:9443"]})
            assert all(query.get("watch") for _, query in kube.asked)  # nothing was listed again


@pytest.mark.parametrize("in_stream", [False, True])
async def test_everything_is_listed_again_when_the_history_is_gone(serve: Any, tmp_path: Path, in_stream: bool) -> None:
    async with kube_server() as kube, serve() as at:
        kube.gone_in_stream = in_stream
        put_service(kube, "orders")
        put_service(kube, "cart")
        put_slice(kube, "orders-1", "orders", "10.1.0.1")
        async with publishing(kube, at, tmp_path):
            await until(at, {NAME: ["10.1.0.1:9443"], "cart.shop.svc.cluster.local": []})
            await kube.until(lambda: kube.watches == 2)
            kube.end_watches()
            # Changes before the watches are resumed, and without a history of them.
            kube.delete("services", "shop", "cart")
            kube.delete("endpointslices", "shop", "orders-1")
            put_slice(kube, "orders-2", "orders", "10.1.0.2")
            kube.compact()
            await until(at, {NAME: ["10.1.0.2:9443"]})


async def test_services_removed_while_no_publisher_ran_are_withdrawn(serve: Any, tmp_path: Path) -> None:
    async with kube_server() as kube, serve() as at:
        stale, mine = (
            ServiceSpec(name="old.shop.svc.cluster.local", ports={"1": []}),
            ServiceSpec(name="o.s", ports={"8443": []}),
        )
        await at.store.put((Kind.SERVICE, "b", record_id("k8s", ("shop", "old"))), stale)
        await at.store.put((Kind.SERVICE, "b", record_id("other", ("shop", "old"))), stale)
        await at.store.put((Kind.SERVICE, "b", "by-hand"), mine)
        put_service(kube, "orders")
        async with publishing(kube, at, tmp_path):
            # Records of another cluster's publisher and of people stay.
            await until(at, {"old.shop.svc.cluster.local": [], "o.s": [], NAME: []})
            old = (Kind.SERVICE, "b", record_id("k8s", ("shop", "old")))

            async def gone() -> bool:
                return await at.store.get(old) is None

            await stored(at.store, gone)
            ids = {record.id for record in (await at.store.snapshot()).records}
            assert ids == {record_id("other", ("shop", "old")), "by-hand", record_id("k8s", ("shop", "orders"))}


async def test_namespaces_and_a_renewed_token(serve: Any, tmp_path: Path, logged: LogWaiter) -> None:
    async with kube_server() as kube, serve() as at:
        for namespace in ("shop", "bank", "hidden"):
            put_service(kube, "orders", namespace)
        kube.token = "renewed"
        async with publishing(kube, at, tmp_path, namespaces=("shop", "bank")):
            await logged.until("status 401")
            assert await endpoints(at) == {}
            (tmp_path / "token").write_text("renewed")
            await until(at, {NAME: [], "orders.bank.svc.cluster.local": []})
            kube.delete("services", "bank", "orders")
            await until(at, {NAME: []})


@pytest.mark.parametrize("bad", [b"two\r\nlines: 1", b"\xff\xfe", None])
async def test_an_invalid_token_is_logged_and_read_again(
    serve: Any, tmp_path: Path, logged: LogWaiter, bad: bytes | None
) -> None:
    async with kube_server() as kube, serve() as at:
        put_service(kube, "orders")
        async with publishing(kube, at, tmp_path):
            await until(at, {NAME: []})
            if bad is None:
                (tmp_path / "token").unlink()
            else:
                (tmp_path / "token").write_bytes(bad)
            kube.end_watches()
            await logged.until("the Kubernetes API failed")
            put_service(kube, "cart")
            (tmp_path / "token").write_text("t0ken")
            await until(at, {NAME: [], "cart.shop.svc.cluster.local": []})


async def test_a_version_that_always_fails_is_abandoned(serve: Any, tmp_path: Path) -> None:
    """Another cluster at the same address does not know our versions."""
    async with kube_server() as kube, serve() as at:
        put_service(kube, "orders")
        async with publishing(kube, at, tmp_path):
            await until(at, {NAME: []})
            await kube.until(lambda: kube.watches == 2)
            kube.forget()
            put_service(kube, "cart")
            await until(at, {"cart.shop.svc.cluster.local": []})


def test_defaults_come_from_the_pods_environment() -> None:
    config = PublisherConfig(network="b").resolved({"KUBERNETES_SERVICE_HOST": "10.96.0.1"})
    assert config.api == "https://10.96.0.1:443"
    assert str(config.token_file) == "/var/run/secrets/kubernetes.io/serviceaccount/token"
    config = PublisherConfig(network="b").resolved(
        {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    )
    assert config.api == "https://[fd00::1]:6443"
    with pytest.raises(ValueError, match=r"publisher\.api"):
        PublisherConfig(network="b").resolved({})
