"""A file in addition to servers: its records win, and both are followed."""

from pathlib import Path
from typing import Any

import pytest

from discovery.client.client import DiscoveryClient
from discovery.client.config import DiscoveryClientConfig
from discovery.client.merged import MergedDiscovery
from discovery.client.mesh_file import StaticDiscovery
from discovery.model.mesh import Kind, RelaySpec, ServiceSpec
from tests.discovery.waiting import LogWaiter

pytestmark = pytest.mark.anyio


async def test_the_file_wins_and_both_are_followed(
    tmp_path: Path, serve: Any, run: Any, until: Any, logged: LogWaiter
) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(
        "networks: [{id: b}]\n"
        "relays: [{network: b, id: r, addresses: [10.0.0.1], ports: [443]}]\n"
        "services: [{network: b, name: o.s, ports: {8443: ['10.1.0.1:1']}}]\n"
    )
    async with serve() as at:
        await at.store.put((Kind.RELAY, "b", "r"), RelaySpec(addresses=["10.0.0.2"], ports=[443]))
        await at.store.put((Kind.RELAY, "b", "r2"), RelaySpec(addresses=["10.0.0.3"], ports=[443]))
        # The same service with an id that would otherwise take precedence.
        await at.store.put((Kind.SERVICE, "b", "a"), ServiceSpec(name="o.s", ports={"8443": ["10.1.0.2:1"]}))
        client = DiscoveryClient(DiscoveryClientConfig(urls=[at.url], network="b"))
        both = MergedDiscovery(client, StaticDiscovery(path, network="b", reload_s=0.02))
        assert both.mesh.relays("b")[0].spec.addresses == ["10.0.0.1"]
        assert (both.synced, both.connected, both.age_s) == (False, False, None)
        async with run(both):
            mesh = await until(both, lambda mesh: len(mesh.relays("b")) == 2)
            assert [relay.spec.addresses for relay in mesh.relays("b")] == [["10.0.0.1"], ["10.0.0.3"]]
            assert [service.spec.ports for service in mesh.services("b")] == [{"8443": ["10.1.0.1:1"]}]
            both.publish(Kind.RELAY, "r3", RelaySpec(addresses=["10.0.0.4"], ports=[443]))
            assert await both.settled(5)
            await until(both, lambda mesh: len(mesh.relays("b")) == 3)
            both.withdraw(Kind.RELAY, "r3")
            path.write_text("nonsense")
            await logged.until("cannot be used")
            assert both.mesh.relays("b")[0].spec.addresses == ["10.0.0.1"]
            path.write_text("networks: [{id: b}]\n")
            mesh = await until(both, lambda mesh: mesh.relays("b")[0].spec.addresses == ["10.0.0.2"])
            assert mesh.service("b", "o.s").spec.ports == {"8443": ["10.1.0.2:1"]}
            assert both.connected
            assert both.age_s == 0
