"""The server over real HTTP: records, conditions, leases, errors, start and end."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from discovery.api import DiscoveryServer, DiscoveryServerConfig
from discovery.api.timing import ServerTiming
from discovery.http.listener import ListenerTiming
from discovery.model.addresses import TargetList
from discovery.model.mesh import AnyRecord, Deletion, Key, RelaySpec
from discovery.store import MemoryStore, StoreError
from discovery.store.memory import Batch
from tests.discovery.bodies import RELAY, VIP
from tests.discovery.waiting import LogWaiter, stored

pytestmark = pytest.mark.anyio


async def test_the_life_of_a_record(serve: Any) -> None:
    async with serve() as at:
        path = "/v1/records/relay/a/relay-1"
        made = await at.ask("PUT", path, RELAY)
        assert made.status == 201
        assert made.headers["ETag"] == '"1"'
        assert made.body == {
            "kind": "relay",
            "network": "a",
            "id": "relay-1",
            "revision": 1,
            "lease": None,
            "spec": msgspec.to_builtins(RelaySpec(addresses=["10.0.0.9"], ports=[443])),
        }
        assert (await at.ask("GET", path)).body == made.body
        again = await at.ask("PUT", path, RELAY)
        assert (again.status, again.body["revision"]) == (200, 2)
        listed = (await at.ask("GET", "/v1/records")).body
        assert listed == {"epoch": at.store.epoch, "revision": 2, "records": [again.body]}
        gone = await at.ask("DELETE", path)
        assert (gone.status, gone.body) == (200, {"revision": 3})
        for method in ("GET", "DELETE"):
            answer = await at.ask(method, path)
            assert (answer.status, answer.body["error"]) == (404, "not_found")


async def test_lists_by_kind_and_network(serve: Any) -> None:
    async with serve() as at:
        for path, body in (("relay/a/r", RELAY), ("relay/b/r", RELAY), ("vip/b/v", VIP)):
            assert (await at.ask("PUT", f"/v1/records/{path}", body)).status == 201

        async def keys(query: str) -> list[tuple[str, str]]:
            records = (await at.ask("GET", f"/v1/records{query}")).body["records"]
            return [(record["kind"], record["network"]) for record in records]

        assert await keys("") == [("relay", "a"), ("relay", "b"), ("vip", "b")]
        assert await keys("?kind=relay") == [("relay", "a"), ("relay", "b")]
        assert await keys("?network=b") == [("relay", "b"), ("vip", "b")]
        assert await keys("?kind=vip&network=b") == [("vip", "b")]
        assert (await at.ask("GET", "/v1/records?kind=other")).status == 400


async def test_conditions(serve: Any) -> None:
    path = "/v1/records/vip/b/v"
    async with serve() as at:
        assert (await at.ask("PUT", path, VIP, headers={"If-Match": "1"})).status == 412
        assert (await at.ask("PUT", path, VIP, headers={"If-None-Match": "*"})).status == 201
        refused = await at.ask("PUT", path, VIP, headers={"If-None-Match": "*"})
        assert (refused.status, refused.body["error"]) == (412, "precondition_failed")
        assert (await at.ask("PUT", path, VIP, headers={"If-Match": '"1"'})).body["revision"] == 2
        assert (await at.ask("DELETE", path, headers={"If-Match": "1"})).status == 412
        for headers in ({"If-Match": "x"}, {"If-Match": "-1"}, {"If-None-Match": "2"}):
            assert (await at.ask("PUT", path, VIP, headers=headers)).status == 400
        assert (await at.ask("DELETE", path, headers={"If-Match": "2"})).status == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "detail"),
    [
        ("relay/a/r", {"spec": {"addresses": ["127.0.0.1"], "ports": [1]}}, 400, "bad_record", "$.spec.addresses[0]"),
        ("relay/a/r", {"spec": {"addresses": ["10.0.0.9"]}}, 400, "bad_record", "`ports`"),
        ("relay/a/r", {"spec": {"addresses": [], "ports": [1], "x": 1}}, 400, "bad_record", "`x`"),
        ("relay/a/r", {"spec": RELAY["spec"], "leese": "1"}, 400, "bad_request", "leese"),
        ("relay/a/r", {}, 400, "bad_request", "spec"),
        ("relay/a/r", b"{", 400, "bad_request", "body"),
        ("relay/a/r", b"[" * 100_000, 400, "bad_request", "body"),
        ("relay/a/r", b"\xff" * 1_100_000, 413, "too_large", "bytes"),
        ("relay/A/r", RELAY, 400, "bad_record", "$.network"),
        ("relay/a/R", RELAY, 400, "bad_record", "$.id"),
        ("relay/a/x%2Fy", RELAY, 400, "bad_record", "$.id"),
        ("network/a/b", {"spec": {}}, 400, "bad_record", "$.id"),
        ("other/a/r", RELAY, 400, "bad_request", "relay"),
        ("relay/a/r", RELAY | {"lease": "none"}, 409, "no_lease", "none"),
        ("relay/a", RELAY, 404, "not_found", "path"),
    ],
)
async def test_bad_writes(serve: Any, path: str, body: Any, status: int, code: str, detail: str) -> None:
    async with serve() as at:
        answer = await at.ask("PUT", f"/v1/records/{path}", body)
        assert (answer.status, answer.body["error"]) == (status, code)
        assert detail in answer.body["detail"]
        assert at.store.revision == 0


async def test_a_body_that_does_not_match_its_encoding_is_refused(serve: Any) -> None:
    async with serve() as at:
        answer = await at.ask("POST", "/v1/leases", b'{"ttl_s": 10}', headers={"Content-Encoding": "gzip"})
        assert (answer.status, answer.body["error"]) == (400, "bad_request")
        assert "Content-Encoding" in answer.body["detail"]


async def test_other_methods_and_paths(serve: Any) -> None:
    async with serve() as at:
        assert (await at.ask("GET", "/healthz")).body == {"ok": True}
        assert (await at.ask("POST", "/v1/records")).status == 405
        assert (await at.ask("GET", "/v2")).status == 404
        assert (await at.ask("GET", "/v1/watch?from=x")).status == 400


async def test_an_allowed_range_lets_tests_use_loopback(serve: Any) -> None:
    async with serve(allow_addresses=TargetList.parse(["127.0.0.0/8"])) as at:
        body = {"spec": {"addresses": ["127.0.0.1"], "ports": [443]}}
        assert (await at.ask("PUT", "/v1/records/relay/a/r", body)).status == 201


async def test_limits(serve: Any) -> None:
    async with serve(max_records_per_network=2, max_leases_per_token=1, max_watchers=1, max_body_bytes=500) as at:
        for number in range(2):
            assert (await at.ask("PUT", f"/v1/records/vip/b/v{number}", VIP)).status == 201
        answer = await at.ask("PUT", "/v1/records/vip/b/v2", VIP)
        assert (answer.status, answer.body["error"]) == (429, "too_many")
        assert (await at.ask("PUT", "/v1/records/vip/b/v1", VIP)).status == 200
        assert (await at.ask("PUT", "/v1/records/vip/c/v1", VIP)).status == 201
        assert (await at.ask("POST", "/v1/leases", {})).status == 201
        assert (await at.ask("POST", "/v1/leases", {})).status == 429
        async with at.watch():
            assert (await at.ask("GET", "/v1/watch")).status == 429
        assert (await at.ask("PUT", "/v1/records/vip/b/v1", b" " * 501)).status == 413


# Leases.


async def test_the_life_of_a_lease(serve: Any) -> None:
    async with serve() as at:
        made = await at.ask("POST", "/v1/leases", {"ttl_s": 10})
        assert made.status == 201
        lease = made.body["id"]
        assert made.body == {"id": lease, "ttl_s": 10}
        assert (await at.ask("PUT", "/v1/records/relay/a/r", RELAY | {"lease": lease})).body["lease"] == lease
        assert (await at.ask("PUT", f"/v1/leases/{lease}")).body == made.body
        assert (await at.ask("DELETE", f"/v1/leases/{lease}")).body == {"withdrawn": 1, "revision": 2}
        assert (await at.ask("GET", "/v1/records/relay/a/r")).status == 404
        for method in ("PUT", "DELETE"):
            answer = await at.ask(method, f"/v1/leases/{lease}")
            assert (answer.status, answer.body["error"]) == (410, "lease_gone")
        for ttl_s in (0, -1, 3601, 10**30, "10", 1.5):
            assert (await at.ask("POST", "/v1/leases", {"ttl_s": ttl_s})).status == 400


async def test_records_are_deleted_when_their_lease_expires(serve: Any) -> None:
    async with serve() as at:
        lease = (await at.ask("POST", "/v1/leases", {"ttl_s": 1})).body["id"]
        await at.ask("PUT", "/v1/records/relay/a/r", RELAY | {"lease": lease})
        async with at.watch("?from=1") as lines:
            assert (await anext(lines))["type"] == "sync"
            assert await anext(lines) == {
                "revision": 2,
                "type": "delete",
                "record": {"kind": "relay", "network": "a", "id": "r"},
            }


# The server itself.


class FailingStore(MemoryStore):
    """A store that raises the given errors in reads, writes or sweeps."""

    def __init__(self) -> None:
        super().__init__()
        self.reading: Exception | None = None
        self.writing: Exception | None = None
        self.expiring: list[Exception] = []

    def _persist(self, batch: Batch) -> asyncio.Future[None] | None:
        if self.writing is not None:
            raise self.writing
        return super()._persist(batch)

    async def get(self, key: Key) -> AnyRecord | None:
        if self.reading is not None:
            raise self.reading
        return await super().get(key)

    async def expire(self) -> Sequence[Deletion]:
        if self.expiring:
            raise self.expiring.pop()
        return await super().expire()


async def test_a_failure_of_the_store_has_its_own_status(serve: Any) -> None:
    store = FailingStore()
    async with serve(store) as at:
        store.writing = StoreError("the disk is full")
        answer = await at.ask("PUT", "/v1/records/relay/a/r", RELAY)
        assert (answer.status, answer.body["error"]) == (503, "unavailable")
        store.reading = store.writing
        assert (await at.ask("GET", "/v1/records/relay/a/r")).status == 503
        store.reading = ZeroDivisionError()
        answer = await at.ask("GET", "/v1/records/relay/a/r")
        assert (answer.status, answer.body["error"]) == (500, "internal")


async def test_leases_that_cannot_be_ended_are_tried_again(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = FailingStore()
    store.expiring = [StoreError("the disk is full")]
    async with serve(store, timing=ServerTiming(sweep_s=0.01)) as at:
        lease = (await at.ask("POST", "/v1/leases", {"ttl_s": 1})).body["id"]
        await at.ask("PUT", "/v1/records/relay/a/r", RELAY | {"lease": lease})

        async def ended() -> bool:
            return await store.lease(lease) is None

        await stored(store, ended)
    assert "leases cannot be ended: the disk is full" in caplog.text


async def test_metrics() -> None:
    registry = CollectorRegistry()
    server = DiscoveryServer(DiscoveryServerConfig(listen=(("127.0.0.1", 0),)), registry=registry)
    async with server.serving():
        text = generate_latest(registry).decode()
    assert 'crossnet_discovery_requests_total{code="403"} 0.0' in text
    assert "crossnet_discovery_watchers 0.0" in text


async def test_a_connection_without_a_whole_request_is_closed(serve: Any) -> None:
    async def say(at: Any, data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(data)
        try:
            async with asyncio.timeout(10):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    timing = ServerTiming(connections=ListenerTiming(header_s=0.1, overdue_check_s=0.02))
    async with serve(timing=timing) as at, at.watch() as lines:
        assert [(await anext(lines))["type"] for _ in range(2)] == ["reset", "sync"]
        for data in (b"", b"GET /v1/records HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            assert await say(at, data) == b""
        # A client that has sent a request stays connected.
        await at.ask("PUT", "/v1/records/relay/b/r", RELAY)
        assert (await anext(lines))["type"] == "put"


async def test_run_serves_until_cancelled(logged: LogWaiter, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = DiscoveryServer(DiscoveryServerConfig(listen=(("127.0.0.1", 0), ("::1", 0))))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server.run())
        await logged.until("discovery server listens", 2)
        task.cancel()
    assert task.cancelled()
    async with DiscoveryServer(DiscoveryServerConfig(listen=(("127.0.0.1", 0), ("::1", 0)))).serving() as addresses:
        assert [host for host, _ in addresses] == ["127.0.0.1", "::1"]
        assert all(port for _, port in addresses)
        with pytest.raises(OSError, match="Address already in use"):
            async with DiscoveryServer(DiscoveryServerConfig(listen=addresses)).serving():
                pass
    with pytest.raises(ValueError, match="the body's own"):
        async with DiscoveryServer(DiscoveryServerConfig(listen=(("127.0.0.1", 0),))).serving():
            raise ValueError("the body's own")
