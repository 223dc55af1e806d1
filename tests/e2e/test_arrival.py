"""Clients that connect to a relay through a load balancer with PROXY headers, and clients over a limit."""

from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

import pytest

from sniproxy.engine import SocketStream
from sniproxy.formats.proxy_protocol import Command, ProxyHeader
from tests.support.hellos import client_hello, padding
from tests.support.path import Path, a_path, name_of
from tests.support.streams import read_all
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

INTERNAL_ERROR = bytes.fromhex("15030300020250")
ACCESS_DENIED = bytes.fromhex("15030300020231")
LOOPBACK = (IPv4Network("127.0.0.0/8"),)
V1 = b"PROXY TCP4 10.7.0.9 192.0.2.1 50000 8443\r\n"
V2 = ProxyHeader(source=("10.7.0.9", 50000), destination=("192.0.2.1", 8443)).pack()


async def echo(stream: SocketStream) -> None:
    while data := await stream.recv():
        await stream.send(data)


def reconfigure(path: Path, **changes: Any) -> None:
    path.relay.reconfigure(replace(path.relay.config, **changes), path.relay._router.keys)


async def relay_line(path: Path, count: int = 1) -> dict[str, object]:
    return (await path.relay_log.wait_for(count))[count - 1]


@pytest.mark.parametrize("header", [V1, V2])
@pytest.mark.parametrize("split", [False, True])
async def test_a_load_balancer_gives_the_clients_address(header: bytes, split: bool) -> None:
    async with a_path("direct") as path:
        reconfigure(path, proxy_from=LOOPBACK, allow=(IPv4Network("10.7.0.0/16"),))
        name = name_of(await path.serve(echo))
        client = await path.connect()
        if split:
            for byte in header + client_hello(name)[:5]:
                await client.send(bytes([byte]))
            await client.send(client_hello(name)[5:])
        else:
            await client.send(header + client_hello(name))
        client.shutdown_write()
        assert await read_all(client) == client_hello(name)
        client.close()
        relay, gateway = await path.ended()
    assert (relay[0]["client"], relay[0]["proxy"], relay[0]["local"]) == ("10.7.0.9", "127.0.0.1", "192.0.2.1:8443")
    assert gateway[0]["client"] == "10.7.0.9"


@pytest.mark.parametrize("header", [V1, V2])
async def test_a_header_from_anywhere_else_is_not_tls(header: bytes) -> None:
    async with a_path("direct") as path:
        reconfigure(path, proxy_from=(IPv4Network("10.0.0.0/8"),))
        client = await path.connect()
        await client.send(header + client_hello("a.example"))
        assert await read_all(client) == b""
        client.close()
        assert (await relay_line(path))["reason"] == "not_tls"


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (client_hello("a.example"), "not_tls"),
        (b"PROXY TCP4 10.0.0.1\r\n", "not_tls"),
        (b"PROXY " + b"x" * 200, "not_tls"),
        (V2[:12] + b"\x31" + V2[13:], "not_tls"),
        (V1[:-4], "client_reset"),
        (b"", "probe"),
    ],
)
async def test_a_load_balancer_must_send_a_header(sent: bytes, reason: str) -> None:
    async with a_path("direct") as path:
        reconfigure(path, proxy_from=LOOPBACK)
        client = await path.connect()
        if sent:
            await client.send(sent)
        client.shutdown_write()
        assert await read_all(client) == b""
        client.close()
        assert (await relay_line(path))["reason"] == reason


async def test_a_header_and_a_hello_have_one_deadline() -> None:
    async with a_path("direct") as path:
        reconfigure(path, proxy_from=LOOPBACK, hello_timeout_s=0.2)
        for sent in (V2[:20], V1 + client_hello("a.example")[:20]):
            client = await path.connect()
            await client.send(sent)
            assert await read_all(client) == b""
            client.close()
        assert [(await relay_line(path, n))["reason"] for n in (1, 2)] == ["hello_timeout"] * 2


@pytest.mark.parametrize("header", [ProxyHeader(command=Command.LOCAL).pack(), b"PROXY UNKNOWN\r\n"])
async def test_a_load_balancer_may_connect_for_itself(header: bytes) -> None:
    async with a_path("direct") as path:
        reconfigure(path, proxy_from=LOOPBACK)
        name = name_of(await path.serve(echo))
        client = await path.connect()
        await client.send(header + client_hello(name))
        client.shutdown_write()
        assert await read_all(client) == client_hello(name)
        client.close()
        line = await relay_line(path)
    assert (line["client"], "proxy" in line) == ("127.0.0.1", False)


async def test_the_address_in_the_header_must_be_allowed() -> None:
    async with a_path("direct") as path:
        reconfigure(path, proxy_from=LOOPBACK, allow=LOOPBACK)
        client = await path.connect()
        await client.send(V2 + client_hello("p1-10-0-0-1.b.svc.mesh.internal"))
        assert await read_all(client) == ACCESS_DENIED
        client.close()


@pytest.mark.parametrize(
    ("source", "served"),
    [
        ("10.1.2.3", True),
        ("172.31.255.255", True),
        ("192.168.0.1", True),
        ("100.64.0.1", True),
        ("fd00::1", True),
        ("::1", True),
        ("8.8.8.8", False),
        ("172.32.0.0", False),
        ("100.128.0.0", False),
        ("169.254.169.254", True),
        ("2001:db8::1", False),
        ("fe80::1", True),
    ],
)
async def test_by_default_only_private_addresses_may_use_a_relay(source: str, served: bool) -> None:
    async with a_path("direct") as path:
        reconfigure(path, proxy_from=LOOPBACK)
        name = name_of(await path.serve(echo))
        destination = "::2" if ":" in source else "10.0.0.1"
        header = ProxyHeader(source=(source, 50000), destination=(destination, 443)).pack()
        client = await path.connect()
        await client.send(header + client_hello(name))
        client.shutdown_write()
        assert await read_all(client) == (client_hello(name) if served else ACCESS_DENIED)
        client.close()
        assert (await relay_line(path))["client"] == source


async def test_a_client_at_its_limit_is_refused_and_its_open_streams_continue() -> None:
    async with a_path("direct") as path:
        reconfigure(path, max_streams_per_client=2, proxy_from=LOOPBACK)
        name = name_of(await path.serve(echo))
        hello = client_hello(name)
        held = []
        for _ in range(2):
            client = await path.connect()
            await client.send(V1 + hello)
            await client.recv_exactly(len(hello))
            held.append(client)
        third = await path.connect()
        await third.send(V1 + hello)
        assert await read_all(third) == INTERNAL_ERROR
        other = await path.connect()
        await other.send(V1.replace(b"10.7.0.9", b"10.7.0.8") + hello)
        assert await other.recv_exactly(len(hello)) == hello
        for client in (*held, other):
            await client.send(b"still here")
            assert await client.recv_exactly(10) == b"still here"
            client.shutdown_write()
            await read_all(client)
            client.close()
        third.close()
        line = await relay_line(path)
        assert (line["reason"], line["client"]) == ("overloaded", "10.7.0.9")
        await relay_line(path, 4)
        again = await path.connect()
        await again.send(V1 + hello)
        assert await again.recv_exactly(len(hello)) == hello
        again.close()


async def test_the_rate_of_new_streams_is_limited() -> None:
    async with a_path("direct") as path:
        reconfigure(path, new_streams_per_s=1)  # which allows two at once
        for answer in (b"", b"", INTERNAL_ERROR):
            client = await path.connect()
            await client.send(b"GET / HTTP/1.1\r\n" if not answer else client_hello("a.example"))
            assert await read_all(client) == answer
            client.close()


async def test_the_bytes_of_incomplete_hellos_are_limited_together() -> None:
    async with a_path("direct") as path:
        reconfigure(path, max_hello_held_bytes=40_000)
        large = client_hello("a.example", padding(30_000))
        waiting = await path.connect()
        await waiting.send(large[:-1])
        await eventually(lambda: path.relay._hellos.held == len(large) - 1, what="the relay has read all but one byte")
        refused = await path.connect()
        await refused.send(large)
        assert await read_all(refused) == INTERNAL_ERROR
        assert (await relay_line(path))["reason"] == "overloaded"
        await waiting.send(large[-1:])
        assert (await read_all(waiting))[-1] == 112
        assert path.relay._hellos.held == 0
        waiting.close()
        refused.close()
