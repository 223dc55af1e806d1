"""Real processes: gateway.rules by name withstand a key holder that lies, and cover every name of a service."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from discovery.model.addresses import parse_endpoint
from sniproxy.engine import SocketStream, connect
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Opened, Ready, Refused
from sniproxy.tunnel.preamble import SigningKey, sign
from sniproxy.tunnel.state import Side
from tests.support.gateways import data
from tests.support.hellos import client_hello
from tests.support.preambles import preamble
from tests.support.processes import DOMAIN, Loopback, Mesh, running_mesh
from tests.support.streams import read_all

pytestmark = pytest.mark.anyio

ORDERS = "orders.shop.svc.cluster.local"
ACCESS_DENIED = bytes.fromhex("15030300020231")


async def echo(stream: SocketStream) -> None:
    with suppress(OSError):  # some clients only check that they get through, and reset
        while piece := await stream.recv():
            await stream.send(piece)


async def is_served(mesh: Mesh, name: str) -> bool:
    client = await mesh.dial(name)
    client.shutdown_write()
    answer = await read_all(client)
    client.close()
    assert answer in (client_hello(name), ACCESS_DENIED)
    return answer == client_hello(name)


async def forged(mesh: Mesh, name: str, target: str) -> str:
    """Ask the gateway directly, with network a's key. Returns the reason of REFUSED, or "opened"."""
    (record,) = mesh.records("relay", "gateway")
    address, port = parse_endpoint(record["spec"]["address"])
    secret = bytes.fromhex((mesh.folder / "ab-1.key").read_text())
    key = SigningKey(id="ab-1", secret=secret, from_network="a", to_network="b")
    hello = client_hello(name)
    connection = CapsuleConnection(await connect(str(address), port, timeout_s=10), Side.RELAY)
    header = sign(preamble(target, hello, authority=name, addressee=record["id"]), key.secret)
    await connection.stream.send(header, data(hello))
    connection.sent = len(header)
    assert await connection.next_message() == Ready()
    answer = await connection.next_message()
    connection.stream.reset()
    assert isinstance(answer, Opened | Refused)
    return answer.reason if isinstance(answer, Refused) else "opened"


async def test_rules_by_name(tmp_path: Path) -> None:
    ground = Loopback()

    def listening(document: dict[str, Any]) -> None:
        document["gateway"] |= {"listen": f"{ground.plan.gateway}:0", "rules": [{"to": ORDERS, "action": "allow"}]}

    with running_mesh(Mesh(tmp_path, ground, changes={"gateway": listening})) as mesh:
        async with mesh.serving(echo) as port, mesh.serving(echo) as other:
            endpoint = f"{ground.plan.service}:{port}"
            spec = {"name": ORDERS, "ports": {"8443": [endpoint]}}
            assert mesh.records_command("put", "service", ORDERS, json.dumps(spec)).returncode == 0
            for part in ("gateway", "relay"):
                await mesh.eventually(f"{part} has the service record", lambda part=part: mesh.records(part, "service"))  # type: ignore[misc]
            await mesh.eventually("the relay has the gateway record", lambda: mesh.records("relay", "gateway"))
            spellings = [
                ORDERS,
                f"p8443-orders.shop.b.{DOMAIN}",
                f"p8443-{ORDERS}.b.{DOMAIN}",
                f"_8443.{ORDERS}._b.{DOMAIN}",
            ]
            # An allowed name with an arbitrary target.
            for name in spellings:
                assert await forged(mesh, name, f"{ORDERS}:8443") == "opened"
                for target in (f"{ground.plan.service}:{other}", endpoint, "10.77.0.6:22"):
                    assert await forged(mesh, name, target) == "wrong_target"
            # A name that leads to the target, but that no rule allows.
            assert await forged(mesh, mesh.name(other), f"{ground.plan.service}:{other}") == "denied"
            assert await is_served(mesh, ORDERS)
            assert not await is_served(mesh, mesh.name(port))

            file = tmp_path / "gateway.yaml"
            document = yaml.safe_load(file.read_text())
            document["gateway"]["rules"] = [{"to": ORDERS, "action": "deny"}, {"action": "allow"}]
            file.with_suffix(".new").write_text(yaml.safe_dump(document))
            file.with_suffix(".new").rename(file)
            await mesh.eventually("the gateway has the new rules", lambda: mesh.events("gateway", "config_read"))
            for name in [*spellings, mesh.name(port)]:
                assert not await is_served(mesh, name), name
            assert await is_served(mesh, mesh.name(other))
            # A deny rule covers the former endpoint, even if its record is deleted.
            assert mesh.records_command("delete", "service", ORDERS).returncode == 0
            await mesh.eventually("the gateway has no service record", lambda: not mesh.records("gateway", "service"))
            assert not await is_served(mesh, mesh.name(port))
            assert await is_served(mesh, mesh.name(other))


async def test_an_address_name_does_not_bypass_an_import(tmp_path: Path) -> None:
    """Network a imports *.shop.svc.cluster.local from b, and there are no rules."""
    ground = Loopback()
    with running_mesh(Mesh(tmp_path, ground)) as mesh:
        async with mesh.serving(echo) as port, mesh.serving(echo) as other:
            for name, at in ((ORDERS, port), ("db.other.svc.cluster.local", other)):
                spec = {"name": name, "ports": {"8443": [f"{ground.plan.service}:{at}"]}}
                assert mesh.records_command("put", "service", name, json.dumps(spec)).returncode == 0
            await mesh.eventually("the gateway has both records", lambda: len(mesh.records("gateway", "service")) == 2)
            await mesh.eventually("the relay has both records", lambda: len(mesh.records("relay", "service")) == 2)
            assert await is_served(mesh, ORDERS)
            assert await is_served(mesh, mesh.name(port))
            assert not await is_served(mesh, mesh.name(other))
            assert "which network 'a' does not import" in mesh.events("relay")[-1]["detail"]
