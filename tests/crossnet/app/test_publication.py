"""A relay's own record in discovery, with a real TURN server."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from crossnet.app.publication import RelayPublication, publish_turn_servers
from crossnet.config.file import load
from discovery.client.contract import Discovery
from discovery.client.mesh_file import StaticDiscovery
from discovery.model.mesh import Kind
from discovery.model.spec import RelaySpec, TurnSpec
from tests.support.running import free_port
from tests.support.waiting import discovery_has, eventually
from turnreg.server.config import TurnServerConfig
from turnreg.server.server import TurnServer

pytestmark = pytest.mark.anyio
TIMEOUT_S = 20.0

CONFIG = "network: a\ndiscovery: mesh.yaml\nrelay: {id: relay-1, listen: 127.0.0.1:443%s}\n"


def publication(
    folder: Path, more: str = "", registry: CollectorRegistry | None = None, **options: Any
) -> tuple[RelayPublication, StaticDiscovery]:
    (folder / "mesh.yaml").write_text("networks: [{id: a}]")
    (folder / "crossnet.yaml").write_text(CONFIG % more)
    discovery = StaticDiscovery(folder / "mesh.yaml", network="a")
    config = load(folder / "crossnet.yaml")
    return RelayPublication(config, discovery, [443], ["10.0.0.9"], registry, **options), discovery


def spec(discovery: Discovery) -> RelaySpec | None:
    record = discovery.mesh.record(Kind.RELAY, "a", "relay-1")
    return None if record is None else record.spec


def turn_spec(port: int) -> TurnSpec:
    url = f"turn:127.0.0.1:{port}?transport=tcp"
    return TurnSpec(url=url, relay_addresses=["127.0.0.1"], port_min=49152, port_max=65535)


async def test_sources_are_asked_of_each_turn_server_and_forgotten_with_it(tmp_path: Path) -> None:
    relay, discovery = publication(tmp_path)
    config = TurnServerConfig(listen=(("127.0.0.1", 0),), relay_addresses=("127.0.0.1",), realm="r", secrets=("s",))
    async with TurnServer.serving(config) as server, asyncio.TaskGroup() as group:
        running = group.create_task(relay.run())
        await discovery_has(discovery, lambda: spec(discovery) == RelaySpec(addresses=["10.0.0.9"], ports=[443]))
        discovery.publish(Kind.TURN, "turn-1", turn_spec(server.addresses[0][1]))
        await discovery_has(
            discovery, lambda: (made := spec(discovery)) is not None and made.sources == {"turn-1": ["127.0.0.1"]}
        )
        discovery.withdraw(Kind.TURN, "turn-1")
        await discovery_has(discovery, lambda: (made := spec(discovery)) is not None and made.sources == {})
        relay.withdraw()
        await discovery_has(discovery, lambda: spec(discovery) is None)
        discovery.publish(Kind.TURN, "turn-2", turn_spec(1))
        running.cancel()
    assert spec(discovery) is None


async def test_configured_sources_are_not_asked(tmp_path: Path) -> None:
    relay, discovery = publication(tmp_path, ", sources: {turn-1: [192.0.2.7]}")
    discovery.publish(Kind.TURN, "turn-1", turn_spec(1))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(relay.run())
        await discovery_has(
            discovery, lambda: (made := spec(discovery)) is not None and made.sources == {"turn-1": ["192.0.2.7"]}
        )
        running.cancel()


async def test_a_relay_says_which_networks_it_asks_for(tmp_path: Path) -> None:
    imported = '}\nimport: [{names: ["*.shop.svc.cluster.local"], from: [c, b]}]\nlog: {level: info'
    relay, discovery = publication(tmp_path, ", asks: [b, d]" + imported)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(relay.run())
        await discovery_has(discovery, lambda: (made := spec(discovery)) is not None and made.asks == ["b", "c", "d"])
        running.cancel()


async def test_turn_servers_of_somebody_else_are_published_as_configured(tmp_path: Path) -> None:
    (tmp_path / "crossnet.yaml").write_text(
        "network: a\ndiscovery: http://127.0.0.1:1\n"
        "turn_servers: [{id: turn-2, url: 'turn:10.0.0.8', relay_addresses: [10.0.0.8], port_max: 50000}]\n"
    )
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}]")
    discovery = StaticDiscovery(tmp_path / "mesh.yaml", network="a")
    publish_turn_servers(load(tmp_path / "crossnet.yaml"), discovery)
    (record,) = discovery.mesh.turns("a")
    assert record.spec == TurnSpec(url="turn:10.0.0.8", relay_addresses=["10.0.0.8"], port_min=49152, port_max=50000)


async def test_a_turn_server_that_cannot_be_asked_is_logged_once_and_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    relay, discovery = publication(tmp_path, registry=registry, ask_again_first_s=0.05)

    def counted() -> dict[str, float | None]:
        states = ("asked", "assumed", "kept", "unknown", "configured")
        return {
            state: count
            for state in states
            if (count := registry.get_sample_value("crossnet_relay_sources", {"state": state}))
        }

    async def until(state: str) -> None:
        await eventually(lambda: counted() == {state: 1.0}, TIMEOUT_S)

    async def asked_again() -> None:
        before = relay._learned["turn-1"]
        await eventually(lambda: relay._learned["turn-1"] is not before, TIMEOUT_S)

    def said() -> list[str]:
        """The logged states; `asked` if the server has answered."""
        events = [vars(entry)["event"] for entry in caplog.records if entry.message.startswith("relay_source")]
        return [event.get("state", "asked") for event in events]

    caplog.set_level("INFO")
    port = free_port()
    config = TurnServerConfig(listen=(("127.0.0.1", port),), relay_addresses=("127.0.0.1",), realm="r", secrets=("s",))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(relay.run())
        discovery.publish(Kind.TURN, "turn-1", turn_spec(port))
        await until("assumed")
        assert relay.sources()[0]["addresses"] == ["127.0.0.1"]
        assert "connect_failed" in str(relay.sources()[0]["detail"])
        for _ in range(3):
            await asked_again()
        assert said() == ["assumed"]
        async with TurnServer.serving(config):
            await until("asked")
        await until("kept")
        assert said() == ["assumed", "asked", "kept"]
        made = spec(discovery)
        assert made is not None
        assert made.sources == {"turn-1": ["127.0.0.1"]}
        # Another record means another server: the answer of the former one does not count any more.
        discovery.publish(Kind.TURN, "turn-1", turn_spec(1))
        await until("assumed")
        running.cancel()
