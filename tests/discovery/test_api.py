"""The server over real HTTP: records, conditions, leases, watches, and who may do what."""

import asyncio
import base64
import hashlib
import hmac
import logging
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import trustme
from prometheus_client import CollectorRegistry, generate_latest

from discovery.api import DiscoveryServer, DiscoveryServerConfig
from discovery.api.tokens import format_entry, make_entry
from discovery.api.watching import WatchTiming
from discovery.client.client import DiscoveryClient
from discovery.client.config import DiscoveryClientConfig
from discovery.model.addresses import TargetList
from discovery.model.mesh import GatewaySpec, Kind, RelaySpec, ServiceSpec
from discovery.store import MemoryStore, StoreError

pytestmark = pytest.mark.anyio

RELAY = {"spec": {"addresses": ["10.0.0.9"], "ports": [443]}}
VIP = {"spec": {"name": "orders.shop.svc", "address": "10.200.0.1"}}
TURN = {
    "spec": {"url": "turn:192.0.2.7", "relay_addresses": ["10.0.0.7"], "port_min": 49152, "port_max": 65535},
}


def service(name: str) -> dict[str, Any]:
    return {"spec": {"name": name, "ports": {"8443": ["10.1.0.5:8443"]}}}


async def test_a_record_from_its_making_to_its_end(serve: Any) -> None:
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


async def test_a_body_that_is_not_what_its_encoding_says_is_bad(serve: Any) -> None:
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


async def test_a_lease_from_its_making_to_its_end(serve: Any) -> None:
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


async def test_a_lease_that_ends_withdraws_its_records(serve: Any) -> None:
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


# Watches.


async def test_a_watch_tells_everything_and_then_every_change(serve: Any) -> None:
    async with serve() as at:
        made = await at.ask("PUT", "/v1/records/relay/a/r", RELAY)
        epoch = at.store.epoch
        async with at.watch() as lines:
            assert await anext(lines) == {"revision": 1, "type": "reset", "epoch": epoch}
            assert await anext(lines) == {"revision": 1, "type": "put", "record": made.body}
            assert await anext(lines) == {"revision": 1, "type": "sync", "epoch": epoch}
            await at.ask("PUT", "/v1/records/vip/b/v", VIP)
            line = await anext(lines)
            assert (line["revision"], line["type"], line["record"]["kind"]) == (2, "put", "vip")
            await at.ask("DELETE", "/v1/records/vip/b/v")
            line = await anext(lines)
            assert line == {"revision": 3, "type": "delete", "record": {"kind": "vip", "network": "b", "id": "v"}}


async def test_a_watch_resumes_from_a_revision(serve: Any) -> None:
    async with serve(MemoryStore(max_tombstones=1)) as at:
        for name in ("v1", "v2"):
            await at.ask("PUT", f"/v1/records/vip/b/{name}", VIP)
        epoch = at.store.epoch

        async def told(query: str) -> list[tuple[str, int]]:
            seen = []
            async with at.watch(query) as lines:
                async for line in lines:
                    seen.append((line["type"], line["revision"]))
                    if line["type"] == "sync":
                        break
            return seen

        assert await told("?from=1") == [("put", 2), ("sync", 2)]
        assert await told(f"?from=2&epoch={epoch}") == [("sync", 2)]
        everything = [("reset", 2), ("put", 1), ("put", 2), ("sync", 2)]
        assert await told("?from=2&epoch=another") == everything
        assert await told("?from=9") == everything
        assert await told("?from=") == everything
        for name in ("v1", "v2"):
            await at.ask("DELETE", f"/v1/records/vip/b/{name}")
        assert await told("?from=3") == [("delete", 4), ("sync", 4)]
        assert await told("?from=2") == [("reset", 4), ("sync", 4)]  # what was deleted at 3 is forgotten


async def test_a_watcher_that_does_not_keep_up_is_reset(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.api.watchers.MAX_QUEUED_BYTES", 200_000)
    async with serve() as at:
        async with at.watch() as lines:
            assert (await anext(lines))["type"] == "reset"
            assert (await anext(lines))["type"] == "sync"
            # Nothing is read while far more is written than socket buffers and the queue hold together.
            big = ServiceSpec(name="o.s", ports={"1": ["10.1.0.5:8443"] * 1000})
            for _ in range(600):
                await at.store.put((Kind.SERVICE, "b", "s"), big)
                await asyncio.sleep(0)
            seen = [line["type"] async for line in lines]
        assert seen[-1] == "reset"
        assert set(seen[:-1]) == {"put"}
        assert len(seen) < 600


async def test_a_quiet_watch_has_a_heartbeat(serve: Any) -> None:
    async with serve(timing=WatchTiming(heartbeat_s=0.02)) as at, at.session.get(f"{at.url}/v1/watch") as response:
        lines = [await response.content.readline() for _ in range(5)]
        assert lines[2:] == [b"\n"] * 3


async def test_watches_end_when_the_server_does(serve: Any) -> None:
    async with aiohttp.ClientSession() as session:
        async with serve() as at:
            response = await session.get(f"{at.url}/v1/watch")
            assert b"reset" in await response.content.readline()
            assert b"sync" in await response.content.readline()
        assert await response.content.read() == b""


async def test_a_watcher_that_takes_nothing_is_cut_off(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serve(timing=WatchTiming(write_timeout_s=0.1)) as at:
        big = ServiceSpec(name="o.s", ports={"1": ["10.1.0.5:8443"] * 1000})
        for number in range(400):
            await at.store.put((Kind.SERVICE, "b", f"s{number}"), big)
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port, limit=1)
        writer.write(b"GET /v1/watch HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        async with asyncio.timeout(10):
            while not any("read nothing" in record.message for record in caplog.records):
                await asyncio.sleep(0.01)
        data = b""
        try:
            while piece := await reader.read(1_000_000):
                data = piece
        except ConnectionResetError:
            pass
        assert not data.endswith(b"0\r\n\r\n")  # a whole answer would end so: this one was cut
        writer.close()
        assert len(at.server._hub) == 0


# Who may do what.


async def test_who_is_not_known_gets_nothing(serve: Any, tokens: Any) -> None:
    async with serve(tokens_file=tokens.path) as at:
        assert (await at.ask("GET", "/healthz")).status == 200
        for headers in (
            {},
            {"Authorization": "Bearer x"},
            {"Authorization": f"Basic {tokens['b']}"},
            {"Authorization": ""},
        ):
            for method, path in (
                ("GET", "/v1/records"),
                ("PUT", "/v1/records/relay/b/r"),
                ("DELETE", "/v1/records/relay/b/r"),
                ("GET", "/v1/watch"),
                ("POST", "/v1/leases"),
                ("POST", "/v1/turn-credentials"),
            ):
                answer = await at.ask(method, path, headers=headers)
                assert (answer.status, answer.body["error"]) == (401, "unauthorized")
                assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_a_token_writes_for_its_network_only(serve: Any, tokens: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(tokens_file=tokens.path) as at:
        assert (await at.ask("PUT", "/v1/records/relay/b/r", RELAY, token=tokens["b"])).status == 201
        with caplog.at_level(logging.WARNING):
            answer = await at.ask("PUT", "/v1/records/relay/c/r", RELAY, token=tokens["b"])
        assert (answer.status, answer.body["error"]) == (403, "forbidden")
        events = [record.event for record in caplog.records if record.message == "request_refused"]  # type: ignore[attr-defined]
        assert [(event["status"], event["token"], event["path"], event["why"]) for event in events] == [
            (403, "b", "/v1/records/relay/c/r", answer.body["detail"])
        ]
        assert (await at.ask("DELETE", "/v1/records/relay/b/r", token=tokens["c"])).status == 403
        assert (await at.ask("PUT", "/v1/records/relay/c/r", RELAY, token=tokens["operator"])).status == 201
        assert tokens["b"] not in caplog.text


async def test_a_token_writes_its_kinds_and_names_only(serve: Any, tokens: Any) -> None:
    async with serve(tokens_file=tokens.path) as at:

        async def put(token: str, path: str, body: Any) -> int:
            return int((await at.ask("PUT", f"/v1/records/{path}", body, token=tokens[token])).status)

        assert await put("gw-b", "relay/b/r", RELAY) == 403
        assert await put("gw-b", "gateway/b/g", {"spec": {"address": "10.9.0.1:7443"}}) == 201
        assert await put("b", "service/b/s", service("orders.shop.svc")) == 201
        assert await put("b", "service/b/s", service("a.orders.shop.svc")) == 403
        assert await put("b", "service/b/s", service("bank.example")) == 403
        assert await put("b", "service/b/t", service("a.b.open")) == 201
        assert await put("operator", "service/b/u", service("bank.example")) == 201
        # Neither taken over nor deleted by who does not cover the name that stands there.
        assert await put("b", "service/b/u", service("orders.shop.svc")) == 403
        assert (await at.ask("DELETE", "/v1/records/service/b/u", token=tokens["b"])).status == 403


async def test_others_see_no_endpoints_and_no_vips(serve: Any, tokens: Any) -> None:
    async with serve(tokens_file=tokens.path) as at:
        lease = (await at.ask("POST", "/v1/leases", {}, token=tokens["b"])).body["id"]
        written = service("orders.shop.svc") | {"lease": lease}
        await at.ask("PUT", "/v1/records/service/b/s", written, token=tokens["b"])
        await at.ask("PUT", "/v1/records/vip/b/v", VIP, token=tokens["b"])
        await at.ask("PUT", "/v1/records/turn/b/t", TURN, token=tokens["b"])

        def endpoints(record: Any) -> Any:
            return record["spec"]["ports"]

        for name, ports, seen, whose in (
            ("b", {"8443": ["10.1.0.5:8443"]}, ["service", "turn", "vip"], lease),
            ("operator", {"8443": ["10.1.0.5:8443"]}, ["service", "turn", "vip"], lease),
            ("c", {"8443": []}, ["service", "turn"], None),
        ):
            token = tokens[name]
            record = (await at.ask("GET", "/v1/records/service/b/s", token=token)).body
            assert endpoints(record) == ports
            assert record["lease"] == whose
            records = (await at.ask("GET", "/v1/records", token=token)).body["records"]
            assert [record["kind"] for record in records] == seen
            assert endpoints(records[0]) == ports
            async with at.watch(token=token) as lines:
                told = []
                async for line in lines:
                    told.append(line)
                    if line["type"] == "sync":
                        break
                assert sorted(line["record"]["kind"] for line in told if line["type"] == "put") == seen
                assert [endpoints(line["record"]) for line in told if "8443" in str(line)] == [ports]
                # Live changes are told by the same rule; the relay's shows that nothing came between.
                await at.ask("PUT", "/v1/records/vip/b/v", VIP, token=tokens["b"])
                await at.ask("DELETE", "/v1/records/vip/b/v", token=tokens["b"])
                await at.ask("PUT", "/v1/records/service/b/s", written, token=tokens["b"])
                await at.ask("PUT", "/v1/records/vip/b/v", VIP, token=tokens["b"])
                await at.ask("PUT", "/v1/records/relay/b/r", RELAY, token=tokens["b"])
                live = []
                async for line in lines:
                    live.append((line["type"], line["record"]["kind"]))
                    if line["record"]["kind"] == "service":
                        assert endpoints(line["record"]) == ports
                    if line["record"]["kind"] == "relay":
                        break
                own = [("put", "vip"), ("delete", "vip"), ("put", "service"), ("put", "vip"), ("put", "relay")]
                assert live == (own if "vip" in seen else [("put", "service"), ("put", "relay")])
            await at.ask("DELETE", "/v1/records/relay/b/r", token=tokens["b"])
        assert (await at.ask("GET", "/v1/records/vip/b/v", token=tokens["c"])).status == 404


async def test_a_lease_is_its_makers_alone(serve: Any, tokens: Any) -> None:
    async with serve(tokens_file=tokens.path) as at:
        lease = (await at.ask("POST", "/v1/leases", {}, token=tokens["b"])).body["id"]
        for other in ("c", "relay-b", "operator"):
            for method in ("PUT", "DELETE"):
                assert (await at.ask(method, f"/v1/leases/{lease}", token=tokens[other])).status == 403
        answer = await at.ask("PUT", "/v1/records/relay/b/r", RELAY | {"lease": lease}, token=tokens["relay-b"])
        assert answer.status == 403
        assert (await at.ask("PUT", f"/v1/leases/{lease}", token=tokens["b"])).status == 200


async def test_turn_credentials(serve: Any, tokens: Any) -> None:
    store = MemoryStore()
    config = DiscoveryServerConfig(
        listen=(("127.0.0.1", 0),), tokens_file=tokens.path, turn_secrets={"d": "s3cret"}, turn_credential_ttl_s=600
    )
    assert "s3cret" not in repr(config)
    async with serve(store, tokens_file=tokens.path, turn_secrets={"d": "s3cret"}, turn_credential_ttl_s=600) as at:
        at.server._credentials._wall_clock = lambda: 1_700_000_000.5
        await at.ask("PUT", "/v1/records/turn/d/t", TURN, token=tokens["operator"])
        answer = await at.ask("POST", "/v1/turn-credentials", {"network": "d"}, token=tokens["gw-b"])
        username = "1700000600:b.gw-b"
        password = base64.b64encode(hmac.new(b"s3cret", username.encode(), hashlib.sha1).digest()).decode()
        assert answer.body == {"username": username, "password": password, "ttl_s": 600, "urls": ["turn:192.0.2.7"]}
        for name, network, status in (("relay-b", "d", 403), ("gw-b", "x", 404), ("gw-b", "D", 400)):
            answer = await at.ask("POST", "/v1/turn-credentials", {"network": network}, token=tokens[name])
            assert answer.status == status


async def test_a_network_that_asks_too_often_waits_and_no_other(
    serve: Any, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tokens_file=tokens.path, requests_per_s=0.01, request_burst=3) as at:
        for _ in range(3):
            assert (await at.ask("GET", "/v1/records", token=tokens["b"])).status == 200
        for name in ("b", "gw-b", "relay-b"):
            answer = await at.ask("GET", "/v1/records", token=tokens[name])
            assert (answer.status, answer.body["error"]) == (429, "rate_limited")
            assert 90 < int(answer.headers["Retry-After"]) < 110
        assert (await at.ask("GET", "/v1/records", token=tokens["c"])).status == 200
        assert (await at.ask("GET", "/healthz")).status == 200
    assert sum("exceeded its rate limit" in entry.message for entry in caplog.records) == 1


async def test_turn_credentials_are_limited_and_logged(
    serve: Any, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = {"turn_secrets": {"d": "s3cret"}, "credentials_per_s": 0.01, "credentials_burst": 2}
    async with serve(tokens_file=tokens.path, **settings) as at:
        answers = [
            await at.ask("POST", "/v1/turn-credentials", {"network": "d"}, token=tokens["gw-b"]) for _ in range(3)
        ]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert (await at.ask("GET", "/v1/records", token=tokens["gw-b"])).status == 200
    issued = [record.event for record in caplog.records if "were issued" in record.message]  # type: ignore[attr-defined]
    assert [(event["token"], event["network"], event["for"]) for event in issued] == [("gw-b", "b", "d")] * 2
    assert answers[0].body["password"] not in caplog.text


async def test_a_browser_reads_with_basic_and_writes_nothing(serve: Any, tokens: Any) -> None:
    async with serve(tokens_file=tokens.path) as at:
        basic = {"Authorization": "Basic " + base64.b64encode(f"any:{tokens['b']}".encode()).decode()}
        assert (await at.ask("GET", "/v1/records", headers=basic)).status == 200
        assert (await at.ask("POST", "/v1/leases", {}, headers=basic)).status == 401
        for site, status in (("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)):
            answer = await at.ask("GET", "/v1/records", headers=basic | {"Sec-Fetch-Site": site})
            assert answer.status == status
        assert (await at.ask("GET", "/v1/records", headers=basic | {"Host": "any.example"})).status == 200
    async with serve() as at:  # without tokens a name that somebody points here must not give them our rights
        assert (await at.ask("GET", "/v1/records", headers={"Host": "rebound.example"})).status == 403
        assert (await at.ask("GET", "/v1/records", headers={"Host": "localhost"})).status == 200
        assert (await at.ask("GET", "/v1/records", headers={"Host": "localhost:99999"})).status == 403


async def test_a_changed_tokens_file_counts_at_once(
    serve: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("discovery.api.server.RELOAD_S", 0.02)
    async with serve(tokens_file=tokens.path) as at:
        whole = tokens.path.read_text()
        async with at.watch(token=tokens["c"]) as cut, at.watch(token=tokens["b"]) as kept:
            assert [(await anext(lines))["type"] for lines in (cut, kept, cut, kept)] == [
                "reset",
                "reset",
                "sync",
                "sync",
            ]
            tokens.path.write_text("\n".join(line for line in whole.splitlines() if '"name":"c"' not in line))
            assert [line async for line in cut] == []  # its watch ends with its token
            assert (await at.ask("GET", "/v1/records", token=tokens["c"])).status == 401
            await at.ask("PUT", "/v1/records/relay/b/r", RELAY, token=tokens["b"])
            assert (await anext(kept))["type"] == "put"
        tokens.path.write_text("nonsense")
        async with asyncio.timeout(5):
            while "cannot be used" not in caplog.text:
                await asyncio.sleep(0.01)
        assert (await at.ask("GET", "/v1/records", token=tokens["b"])).status == 200
        tokens.path.write_text(whole)
        async with asyncio.timeout(5):
            while (await at.ask("GET", "/v1/records", token=tokens["c"])).status != 200:
                await asyncio.sleep(0.01)


async def test_certificates_in_place_of_tokens_and_both_renewed(
    tmp_path: Path, run: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("discovery.api.server.RELOAD_S", 0.02)
    authority, other = trustme.CA(), trustme.CA()

    def issue(name: str, *hosts: str, by: trustme.CA = authority) -> None:
        made = by.issue_cert(*hosts)
        made.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        made.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")

    issue("server", "127.0.0.1")
    issue("gw", "gw-1.b.example")
    issue("stranger", "stranger.example")
    for file in ("ca.pem", "servers.pem"):
        authority.cert_pem.write_to_path(tmp_path / file)
    entry = make_entry(None, certificate="gw-1.b.example", network="b", kinds=[Kind.GATEWAY])
    (tmp_path / "tokens.yaml").write_text(format_entry(entry))
    config = DiscoveryServerConfig(
        listen=(("127.0.0.1", 0),),
        tls_cert=tmp_path / "server.pem",
        tls_key=tmp_path / "server.key",
        tls_client_ca=tmp_path / "ca.pem",
        tokens_file=tmp_path / "tokens.yaml",
    )
    async with DiscoveryServer(config).serving() as addresses:
        url = f"https://127.0.0.1:{addresses[0][1]}"

        async def ask(name: str | None) -> tuple[int, str]:
            context = ssl.create_default_context(cafile=str(tmp_path / "servers.pem"))
            if name is not None:
                context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
            connector = aiohttp.TCPConnector(ssl=context, force_close=True)
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.get(f"{url}/v1/records") as answer,
            ):
                status = answer.status
            shown = await asyncio.to_thread(ssl.get_server_certificate, addresses[0])
            return status, shown

        status, before = await ask("gw")
        assert status == 200
        assert (await ask("stranger"))[0] == 401
        assert (await ask(None))[0] == 401
        files: dict[str, Any] = {
            "ca_file": tmp_path / "servers.pem",
            "cert_file": tmp_path / "gw.pem",
            "key_file": tmp_path / "gw.key",
        }
        async with run(DiscoveryClient(DiscoveryClientConfig(urls=[url], network="b", **files))) as client:
            client.publish(Kind.GATEWAY, "gw-1", GatewaySpec(address="10.9.0.1:7443"))
            assert await client.settled(5)
        # A renewed certificate is shown to whoever comes next; one that does not fit its key changes nothing.
        (tmp_path / "server.pem").write_text("nonsense")
        await asyncio.sleep(0.1)
        assert (await ask("gw"))[1] == before
        issue("server", "127.0.0.1")
        async with asyncio.timeout(5):
            while (await ask("gw"))[1] == before:
                await asyncio.sleep(0.02)
        # An authority that is taken out is trusted no more, nor is who came in by it and is still there.
        async with run(DiscoveryClient(DiscoveryClientConfig(urls=[url], network="b", **files))) as client:
            await until(client, lambda _: client.connected)
            other.cert_pem.write_to_path(tmp_path / "ca.pem")
            async with asyncio.timeout(5):
                while client.connected:
                    await asyncio.sleep(0.01)
        with pytest.raises((aiohttp.ClientError, OSError)):
            await ask("gw")
        issue("gw", "gw-1.b.example", by=other)
        assert (await ask("gw"))[0] == 200


# The server itself.


async def test_a_store_that_fails_is_told_as_such(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve() as at:

        def fail(*_: object) -> None:
            raise StoreError("the disk is full")

        monkeypatch.setattr(at.store, "_persist", fail)
        answer = await at.ask("PUT", "/v1/records/relay/a/r", RELAY)
        assert (answer.status, answer.body["error"]) == (503, "unavailable")
        monkeypatch.setattr(at.store, "get", fail)
        assert (await at.ask("GET", "/v1/records/relay/a/r")).status == 503
        monkeypatch.setattr(at.store, "get", lambda _: 1 / 0)
        answer = await at.ask("GET", "/v1/records/relay/a/r")
        assert (answer.status, answer.body["error"]) == (500, "internal")


async def test_leases_that_cannot_be_ended_are_tried_again(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("discovery.api.server.SWEEP_S", 0.01)
    store = MemoryStore()
    expire, tried = store.expire, asyncio.Event()

    async def fail_once() -> Any:
        if not tried.is_set():
            tried.set()
            raise StoreError("the disk is full")
        return await expire()

    monkeypatch.setattr(store, "expire", fail_once)
    async with serve(store) as at:
        lease = (await at.ask("POST", "/v1/leases", {"ttl_s": 1})).body["id"]
        async with asyncio.timeout(5):
            while await store.lease(lease) is not None:
                await asyncio.sleep(0.02)
    assert "leases cannot be ended: the disk is full" in caplog.text


async def test_metrics() -> None:
    registry = CollectorRegistry()
    server = DiscoveryServer(DiscoveryServerConfig(listen=(("127.0.0.1", 0),)), registry=registry)
    async with server.serving():
        text = generate_latest(registry).decode()
    assert 'crossnet_discovery_requests_total{code="403"} 0.0' in text
    assert "crossnet_discovery_watchers 0.0" in text


async def test_who_asks_nothing_is_not_waited_for(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.http.listener.HEADER_S", 0.1)
    monkeypatch.setattr("discovery.http.listener.OVERDUE_CHECK_S", 0.02)

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

    async with serve() as at, at.watch() as lines:
        assert [(await anext(lines))["type"] for _ in range(2)] == ["reset", "sync"]
        for data in (b"", b"GET /v1/records HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            assert await say(at, data) == b""
        # Who has asked stays, however long.
        await at.ask("PUT", "/v1/records/relay/b/r", RELAY)
        assert (await anext(lines))["type"] == "put"


async def test_run_serves_until_cancelled() -> None:
    server = DiscoveryServer(DiscoveryServerConfig(listen=(("127.0.0.1", 0), ("::1", 0))))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server.run())
        await asyncio.sleep(0.05)
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
