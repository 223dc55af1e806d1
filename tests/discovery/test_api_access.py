"""Access control of a server: tokens, certificates, rate limits, browsers."""

import asyncio
import base64
import hashlib
import hmac
import logging
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from discovery.api import DiscoveryServer, DiscoveryServerConfig
from discovery.api.timing import ServerTiming
from discovery.api.tokens import format_entry, make_entry
from discovery.client.client import DiscoveryClient
from discovery.client.config import DiscoveryClientConfig
from discovery.model.mesh import GatewaySpec, Kind
from discovery.store import MemoryStore
from tests.discovery.bodies import RELAY, TURN, VIP, service
from tests.discovery.waiting import LogWaiter

pytestmark = pytest.mark.anyio

RELOADING = ServerTiming(reload_s=0.02)


def replace(path: Path, text: str) -> None:
    """Replace a file atomically: the server must not read half of it."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


async def test_unknown_clients_are_refused(serve: Any, tokens: Any) -> None:
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


async def test_a_token_writes_only_for_its_network(serve: Any, tokens: Any, caplog: pytest.LogCaptureFixture) -> None:
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


async def test_a_token_writes_only_its_kinds_and_names(serve: Any, tokens: Any) -> None:
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
        # A token that does not cover the current name can neither take the record over nor delete it.
        assert await put("b", "service/b/u", service("orders.shop.svc")) == 403
        assert (await at.ask("DELETE", "/v1/records/service/b/u", token=tokens["b"])).status == 403


async def test_other_networks_see_no_endpoints_and_no_vips(serve: Any, tokens: Any) -> None:
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
                # Live changes follow the same rule. The relay's comes last, so nothing else can arrive after it.
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


async def test_a_lease_can_be_used_only_by_its_own_token(serve: Any, tokens: Any) -> None:
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
    settings = {"turn_secrets": {"d": "s3cret"}, "turn_credential_ttl_s": 600}
    async with serve(store, tokens_file=tokens.path, wall_clock=lambda: 1_700_000_000.5, **settings) as at:
        await at.ask("PUT", "/v1/records/turn/d/t", TURN, token=tokens["operator"])
        answer = await at.ask("POST", "/v1/turn-credentials", {"network": "d"}, token=tokens["gw-b"])
        username = "1700000600:b.gw-b"
        password = base64.b64encode(hmac.new(b"s3cret", username.encode(), hashlib.sha1).digest()).decode()
        assert answer.body == {"username": username, "password": password, "ttl_s": 600, "urls": ["turn:192.0.2.7"]}
        for name, network, status in (("relay-b", "d", 403), ("gw-b", "x", 404), ("gw-b", "D", 400)):
            answer = await at.ask("POST", "/v1/turn-credentials", {"network": network}, token=tokens[name])
            assert answer.status == status


async def test_a_rate_limit_affects_only_its_network(serve: Any, tokens: Any, caplog: pytest.LogCaptureFixture) -> None:
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
    async with serve() as at:  # without tokens, DNS rebinding must not give a page our rights
        assert (await at.ask("GET", "/v1/records", headers={"Host": "rebound.example"})).status == 403
        assert (await at.ask("GET", "/v1/records", headers={"Host": "localhost"})).status == 200
        assert (await at.ask("GET", "/v1/records", headers={"Host": "localhost:99999"})).status == 403


async def test_a_changed_tokens_file_is_used_at_once(
    serve: Any, tokens: Any, logged: LogWaiter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serve(tokens_file=tokens.path, timing=RELOADING) as at:
        whole = tokens.path.read_text()
        async with at.watch(token=tokens["c"]) as cut, at.watch(token=tokens["b"]) as kept:
            assert [(await anext(lines))["type"] for lines in (cut, kept, cut, kept)] == [
                "reset",
                "reset",
                "sync",
                "sync",
            ]
            replace(tokens.path, "\n".join(line for line in whole.splitlines() if '"name":"c"' not in line))
            assert [line async for line in cut] == []  # its watch ends with its token
            assert (await at.ask("GET", "/v1/records", token=tokens["c"])).status == 401
            await at.ask("PUT", "/v1/records/relay/b/r", RELAY, token=tokens["b"])
            assert (await anext(kept))["type"] == "put"
        replace(tokens.path, "nonsense")
        await logged.until("cannot be used")
        assert (await at.ask("GET", "/v1/records", token=tokens["b"])).status == 200
        reloads = logged.count("the tokens file was reloaded")
        replace(tokens.path, whole)
        await logged.until("the tokens file was reloaded", reloads + 1)
        assert (await at.ask("GET", "/v1/records", token=tokens["c"])).status == 200


async def test_client_certificates_and_their_renewal(
    tmp_path: Path, run: Any, until: Any, logged: LogWaiter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
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
    async with DiscoveryServer(config, timing=RELOADING).serving() as addresses:
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
        # A renewed certificate is used for new connections. An invalid one is not used.
        (tmp_path / "server.pem").write_text("nonsense")
        await logged.until("the certificate cannot be used")
        assert (await ask("gw"))[1] == before
        issue("server", "127.0.0.1")
        await logged.until("the certificate was reloaded")
        assert (await ask("gw"))[1] != before
        # A removed CA is no longer trusted, and open connections with its certificates are closed.
        async with run(DiscoveryClient(DiscoveryClientConfig(urls=[url], network="b", **files))) as client:
            await until(client, lambda _: client.connected)
            other.cert_pem.write_to_path(tmp_path / "ca.pem")
            await logged.until("discovery is away")
        with pytest.raises((aiohttp.ClientError, OSError)):
            await ask("gw")
        issue("gw", "gw-1.b.example", by=other)
        assert (await ask("gw"))[0] == 200
