"""A relay or gateway cannot be made to dial forbidden targets: well-known ones in all spellings, and those of captured streams."""

import asyncio
from dataclasses import replace
from pathlib import Path as File

import pytest
from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from discovery.model.mesh import GatewaySpec, Kind
from sniproxy.engine import SocketStream, connect
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Refused
from sniproxy.tunnel.preamble import SigningKey
from sniproxy.tunnel.state import Side
from tests.support.fixed_discovery import record
from tests.support.hellos import client_hello
from tests.support.path import DOMAIN, LOOPBACK, Path, a_path, name_of, proto
from tests.support.running import running
from tests.support.streams import read_all
from turnreg.gateway.gateway import Gateway, GatewayConfig

pytestmark = pytest.mark.anyio

EVERYTHING = TargetList.parse(["0.0.0.0/0", "::/0"])
NEVER_DIALLED = {"denied", "bad_name", "unknown_name", "unknown_network", "no_sni"}

HOSTS = [
    "127-0-0-1",
    "127-1",
    "127-255-255-254",
    "0-0-0-0",
    "169-254-169-254",
    "224-0-0-1",
    "255-255-255-255",
    "2130706433",
    "0177-0-0-1",
    "0x7f-0-0-1",
    "0x7f000001",
    "017700000001",
    "127-0-0-1-",
]
"""As written in a mangled name, where a dash stands for a dot or a colon."""

HOSTS_OF_IPV6 = {
    "--1": "1",
    "--": "0",
    "--ffff-7f00-1": "ffff7f000001",
    "--ffff-a9fe-a9fe": "ffffa9fea9fe",
    "64-ff9b--7f00-1": "64ff9b0000000000000000" + "7f000001",
    "fe80--1": "fe80" + "0" * 27 + "1",
    "ff02--1": "ff02" + "0" * 27 + "1",
    "--7f00-1": "7f000001",
}


def names(port: int, network: str) -> list[str]:
    """Return every form of name for the targets above in a network, and plain literals."""
    compact = [f"p{port}-{host}.{network}.{DOMAIN}" for host in HOSTS]
    compact += [f"p{port}-x{digits.rjust(32, '0')}.{network}.{DOMAIN}" for digits in HOSTS_OF_IPV6.values()]
    mangled = [f"_{port}._{host}._{network}.{DOMAIN}" for host in (*HOSTS, *HOSTS_OF_IPV6)]
    odd = [
        "127.0.0.1",
        f"127.0.0.1:{port}",
        "[::1]",
        "localhost",
        "169.254.169.254",
        "2130706433",
        f"127.0.0.1.{DOMAIN}",
    ]
    return [*compact, *mangled, *odd, f"p{port}-localhost.{network}.{DOMAIN}", f"p{port}-127-0-0-1.{network}.{DOMAIN}/"]


async def refused(path: Path, name: str) -> dict[str, object]:
    """Ask for a name, which must be refused with an alert. Returns the relay's log event."""
    before = len(path.relay_log.events)
    client = await path.dial(name)
    answer = await read_all(client)
    client.close()
    assert answer[:6] == bytes.fromhex("150303000202"), (name, answer)
    return (await path.relay_log.wait_for(before + 1))[-1]


@pytest.mark.parametrize("network", ["a", "b"])
async def test_wide_lists_do_not_allow_special_targets(network: str) -> None:
    """Relay and gateway allow all addresses, and a service listens on loopback. It must not be reached."""
    async with a_path("direct") as path:
        reached = []

        async def service(stream: SocketStream) -> None:
            reached.append(stream.peer)

        port = await path.serve(service)
        path.relay.reconfigure(replace(path.relay.config, deliver=EVERYTHING), path.relay._router.keys)
        path.gateway.reconfigure(replace(path.gateway.config, allow=EVERYTHING), path.gateway._handshakes.keys)
        for name in names(port, network):
            line = await refused(path, name)
            assert line["reason"] in NEVER_DIALLED, (name, line)
        assert reached == []


async def read_to_the_end(stream: SocketStream) -> None:
    await read_all(stream)


@pytest.mark.parametrize("turn", ["embedded", "direct"])
async def test_our_own_parts_are_refused_where_loopback_is_allowed(turn: str) -> None:
    async with a_path(turn) as path:
        admin = await path.serve(read_to_the_end)
        path.relay.reconfigure(
            replace(path.relay.config, deliver=LOOPBACK, guard=(("127.0.0.1", admin),)), path.relay._router.keys
        )
        turns = [] if turn == "direct" else list(path.turn.addresses)  # type: ignore[union-attr]
        for _, port in [*path.relay.addresses, ("127.0.0.1", admin), *turns]:
            line = await refused(path, f"p{port}-127-0-0-1.a.{DOMAIN}")
            assert line["reason"] == "denied", line
        for _, port in [*path.gateway.addresses, *turns]:
            line = await refused(path, name_of(port))
            assert line["reason"] == "denied", line


def test_a_real_relay_dials_neither_its_admin_server_nor_itself(tmp_path: File) -> None:
    config = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
relay: {id: relay-1, listen: "127.0.0.1:0", deliver: ["127.0.0.0/8", "0.0.0.0/0"]}
"""
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}]")

    async def ask(relay: str, name: str) -> bytes:
        address, _, port = relay.rpartition(":")
        client = await connect(address, int(port), timeout_s=10)
        await client.send(client_hello(name))
        try:
            return await read_all(client)
        finally:
            client.close()

    with running(tmp_path, config) as process:
        listening = process.started()
        relay = listening["relay"][0]
        for role in ("admin", "relay"):
            for host in ("127-0-0-1", "0-0-0-0", "169-254-169-254"):
                port = listening[role][0].rpartition(":")[2]
                answer = asyncio.run(ask(relay, f"p{port}-{host}.a.{DOMAIN}"))
                assert answer == bytes.fromhex("15030300020231"), (role, host, answer)


class Captured:
    """The bytes that a relay wrote to a gateway, split into header and capsules."""

    def __init__(self, data: bytes) -> None:
        length = 16 + int.from_bytes(data[14:16], "big")
        self.header, self.capsules = data[:length], data[length:]


async def captured(path: Path) -> Captured:
    """Capture one stream between relay and gateway."""
    seen = bytearray()
    gateway = path.gateway.addresses[0]

    async def between(relay: SocketStream) -> None:
        onward = await connect(*gateway, timeout_s=10)

        async def copy(source: SocketStream, sink: SocketStream, keep: bytearray) -> None:
            while data := await source.recv():
                keep += data
                await sink.send(data)
            sink.shutdown_write()

        async with asyncio.TaskGroup() as group:
            group.create_task(copy(relay, onward, seen))
            await copy(onward, relay, bytearray())
        onward.close()

    tap = await path.serve(between)
    path.discovery.put(
        record(Kind.GATEWAY, "b", "gw-1", GatewaySpec(address=f"127.0.0.1:{tap}", proto=proto(path.gateway)))
    )
    name = name_of(await path.serve(read_to_the_end))
    client = await path.dial(name)
    client.shutdown_write()
    assert await read_all(client) == b""
    client.close()
    await path.ended()
    return Captured(bytes(seen))


async def replay(address: tuple[str, int], data: bytes) -> list[object]:
    """Send these bytes to a gateway. Returns its messages up to REFUSED."""
    stream = await connect(*address, timeout_s=10)
    await stream.send(data)
    connection = CapsuleConnection(stream, Side.RELAY)
    messages: list[object] = []
    try:
        async with asyncio.timeout(10):
            while not any(isinstance(message, Refused) for message in messages):
                messages.append(await connection.next_message())
    finally:
        stream.close()
    return messages


async def test_a_captured_stream_is_refused_by_every_gateway() -> None:
    async with a_path("direct") as path:
        capture = await captured(path)
        keys = dict(path.gateway._handshakes.keys)
        keys["cb-1"] = SigningKey(id="cb-1", secret=bytes(32), from_network="c", to_network="b")
        messages = await replay(path.gateway.addresses[0], capture.header + capture.capsules)
        assert [message.reason for message in messages if isinstance(message, Refused)] == [Reason.REPLAY]
        others = [("gw-2", "b", Reason.REPLAY), ("gw-1", "c", Reason.REPLAY), ("gw-1", "b", Reason.STALE_EPOCH)]
        for gateway_id, network, reason in others:
            config = GatewayConfig(
                id=gateway_id, network=network, domain=DOMAIN, allow=LOOPBACK, listen=(("127.0.0.1", 0),)
            )
            other = Gateway(config, path.discovery, keys, registry=CollectorRegistry())
            await other.open()
            async with asyncio.TaskGroup() as group:
                running_gateway = group.create_task(other.run())
                messages = await replay(other.addresses[0], capture.header + capture.capsules)
                assert [type(message) for message in messages] == [Refused]
                assert messages[0].reason == reason  # type: ignore[attr-defined]
                running_gateway.cancel()
