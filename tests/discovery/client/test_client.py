"""The client with real servers: all its parts together, and its connections."""

import asyncio
import datetime as dt
import ssl
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import trustme

from discovery.api.timing import ServerTiming
from discovery.client.contract import DiscoveryError
from discovery.model.mesh import Kind, NetworkSpec
from tests.discovery.client.clients import OTHER, RELAY, WallClock, client_at, client_of
from tests.discovery.waiting import LogWaiter

pytestmark = pytest.mark.anyio


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
            # Lease and record were in the store, and were not rewritten.
            assert watcher.mesh.relays("a")[0] == mesh.relays("a")[0]
            assert watcher.mesh.relays("a")[1].lease == mesh.relays("a")[0].lease
    finally:
        await asyncio.to_thread(kill, process)


async def test_turn_credentials(serve: Any, run: Any, tokens: Any) -> None:
    async with serve(tokens_file=tokens.path, turn_secrets={"d": "s3cret"}) as at:
        client = client_of(at, network="b", token=tokens["gw-b"])
        assert (await client.turn_credentials("d")).ttl_s == 3600  # also before the run
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


async def test_a_replaced_ca_is_used_without_a_restart(
    serve: Any, run: Any, until: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = trustme.CA(), trustme.CA()

    def certify(by: trustme.CA) -> None:
        by.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")

    old.cert_pem.write_to_path(tmp_path / "ca.pem")
    certify(old)
    async with (
        serve(tls_cert=tmp_path / "server.pem", timing=ServerTiming(reload_s=0.02)) as at,
        run(client_of(at, ca_file=tmp_path / "ca.pem")) as client,
    ):
        client.publish(Kind.RELAY, "r1", RELAY)
        assert await client.settled(5)
        (tmp_path / "ca.pem").write_text("nonsense")
        client.publish(Kind.RELAY, "r2", RELAY)
        assert await client.settled(5)
        assert "cannot be used" in caplog.text
        new.cert_pem.write_to_path(tmp_path / "ca.pem")
        client.publish(Kind.RELAY, "r3", RELAY)
        assert not await client.settled(0.3)  # the old CA is no longer trusted
        certify(new)
        assert await client.settled(10)


async def test_a_failing_subscriber_does_not_affect_others(
    serve: Any, run: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as at, run(client_of(at)) as client:
        client.subscribe(lambda _: 1 / 0)
        client.publish(Kind.RELAY, "r", RELAY)
        await until(client, lambda mesh: mesh.relays("a"))
    assert "a subscriber to the mesh failed" in caplog.text


def test_a_client_needs_a_server() -> None:
    with pytest.raises(ValueError, match="URL"):
        client_at()
    with pytest.raises(ValueError, match="insecure"):
        client_at("http://10.0.0.2:8600")


async def test_a_clock_difference_to_the_server_is_logged(
    serve: Any, run: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    behind = WallClock()
    behind.ahead_s = -100
    async with serve() as at:
        async with run(client_of(at)) as client:
            await until(client, lambda _: True)
            assert client.clock_ahead_s == 0
        async with run(client_of(at, wall_clock=behind)) as client:
            await until(client, lambda _: True)
            assert 98 <= client.clock_ahead_s <= 102
    said = [record.event["why"] for record in caplog.records if record.message == "clocks_apart"]  # type: ignore[attr-defined]
    assert len(said) == 1
    assert at.url in said[0]
    assert "s ahead of ours" in said[0]


async def test_an_expired_certificate_is_reported_with_the_clock_difference(
    serve: Any, run: Any, tmp_path: Path, tokens: Any, logged: LogWaiter
) -> None:
    authority = trustme.CA()
    ended = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    certificate = authority.issue_cert("127.0.0.1", not_after=ended)
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with (
        serve(tokens_file=tokens.path, tls_cert=tmp_path / "server.pem") as at,
        run(client_of(at, network="b", token=tokens["b"], ca_file=tmp_path / "ca.pem")),
    ):
        await logged.until("it expired 36")
