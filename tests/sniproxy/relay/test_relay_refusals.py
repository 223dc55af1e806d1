"""Refused clients: the alert, byte for byte, and the reason in log and metrics."""

import asyncio
import socket
import struct
from dataclasses import replace

import pytest

from discovery.model.addresses import parse_cidrs
from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Kind, ServiceSpec
from sniproxy.access.rules import Policy, Rule
from sniproxy.engine import SocketStream, connect
from tests.support.fixed_discovery import record
from tests.support.hellos import (
    BROKEN,
    client_hello,
    message,
    padding,
    records,
)
from tests.support.hellos import (
    record as tls_record,
)
from tests.support.relays import ALERT, DOMAIN, a_relay, name_of
from tests.support.streams import read_all

pytestmark = pytest.mark.anyio

NAME = "orders.shop.example"
MESH = (
    record(Kind.SERVICE, "b", "two", ServiceSpec(name="two.shop.example", ports={"1": [], "2": []})),
    record(Kind.SERVICE, "b", "x1", ServiceSpec(name="x.shop.one", ports={"8443": []})),
    record(Kind.SERVICE, "b", "x2", ServiceSpec(name="x.shop.two", ports={"8443": []})),
)
IMPORTS = Imports([ImportRule(names=("two.shop.example",), sources=("b",), prefer="local")])
HTTP = b"GET / HTTP/1.1\r\nHost: orders.shop.example\r\n\r\n"


async def hold(stream: SocketStream) -> None:
    """A service that reads and never answers."""
    while await stream.recv():
        pass


async def count(stream: SocketStream) -> None:
    """A service that reads to the end and sends everything back."""
    await stream.send(await read_all(stream))
    stream.shutdown_write()


REFUSED: list[tuple[str, bytes, str | None, str]] = [
    ("no SNI", records(message()), "unrecognized_name", "no_sni"),
    ("empty name", client_hello(b""), "unrecognized_name", "bad_name"),
    ("NUL", client_hello(NAME.encode() + b"\0.evil.example"), "unrecognized_name", "bad_name"),
    ("CR LF", client_hello(b"a\r\nevent=stream.example"), "unrecognized_name", "bad_name"),
    ("ESC", client_hello(b"\x1b[2K.example"), "unrecognized_name", "bad_name"),
    ("quotes", client_hello(b'a","reason":"ok.example'), "unrecognized_name", "bad_name"),
    ("a port", client_hello(b"orders.shop.example:8443"), "unrecognized_name", "bad_name"),
    ("a path", client_hello(b"10.0.0.5:8443/x"), "unrecognized_name", "bad_name"),
    ("beyond ASCII", client_hello("bücher.example".encode()), "unrecognized_name", "bad_name"),
    ("label of 64", client_hello("a" * 64 + ".example"), "unrecognized_name", "bad_name"),
    ("name of 256", client_hello(".".join(["a" * 50] * 5) + "x"), "unrecognized_name", "bad_name"),
    ("IPv4 literal", client_hello("10.0.0.5"), "unrecognized_name", "bad_name"),
    ("IPv6 literal", client_hello("::1"), "unrecognized_name", "bad_name"),
    ("bad mangled name", client_hello(f"p0-10-1-0-5.b.{DOMAIN}"), "unrecognized_name", "bad_name"),
    ("unknown network", client_hello(f"p443-10-1-0-5.nowhere.{DOMAIN}"), "unrecognized_name", "unknown_network"),
    ("unknown name", client_hello("stranger.example"), "unrecognized_name", "unknown_name"),
    ("unknown service", client_hello(f"p443-stock.shop.b.{DOMAIN}"), "unrecognized_name", "unknown_name"),
    ("ambiguous name", client_hello(f"p8443-x.shop.b.{DOMAIN}"), "unrecognized_name", "ambiguous_name"),
    ("ambiguous port", client_hello("two.shop.example"), "unrecognized_name", "ambiguous_port"),
    ("no route", client_hello(f"p443-10-1-0-5.b.{DOMAIN}"), "internal_error", "no_route"),
    ("not delivered", client_hello(name_of(443, address="10.0.0.1")), "access_denied", "denied"),
    ("nobody listens", client_hello(name_of(1)), "internal_error", "dial_failed"),
    ("handshake length 0xFFFFFF", b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", "decode_error", "bad_hello"),
    ("record length 0xFFFF", b"\x16\x03\x01\xff\xff", "decode_error", "bad_hello"),
    ("empty record", b"\x16\x03\x01\x00\x00", "decode_error", "bad_hello"),
    ("another handshake message", tls_record(b"\x02\x00\x00\x01x"), "decode_error", "bad_hello"),
    ("another record inside", tls_record(message()[:9]) + b"\x15\x03\x03\x00\x02\x01\x00", "decode_error", "bad_hello"),
    ("application data first", b"\x17\x03\x03\x00\x05hello", None, "not_tls"),
    ("record version 2", b"\x16\x02\x00\x00\x05hello", None, "not_tls"),
    ("SSLv2", bytes.fromhex("802e0103010015000000100100800300800700c0") + bytes(30), None, "not_tls"),
    ("HTTP", HTTP, None, "not_tls"),
    ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n", None, "not_tls"),
    ("Postgres", bytes.fromhex("00000008 04d2162f"), None, "not_tls"),
    ("PROXY v1", b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + client_hello(NAME), None, "not_tls"),
    ("PROXY v2", bytes.fromhex("0d0a0d0a000d0a515549540a21110000") + client_hello(NAME), None, "not_tls"),
    ("one wrong byte", b"\x80", None, "not_tls"),
    ("HAProxy's ssl-hello-chk", records(message(version=0x0300)), "unrecognized_name", "probe"),
    *((f"broken: {what}", records(broken), "decode_error", "bad_hello") for what, broken in BROKEN.items()),
]


async def test_every_refusal_by_its_bytes_and_its_reason() -> None:
    """The alert, then FIN and no reset; the reason in the log and in the metrics."""
    async with a_relay(*MESH, imports=IMPORTS) as running:
        expected: dict[str, int] = {}
        for what, data, alert, reason in REFUSED:
            client = await running.connect()
            await client.send(data)
            assert await read_all(client) == (ALERT[alert] if alert else b""), what
            client.close()
            expected[reason] = expected.get(reason, 0) + 1
            line = (await running.ended(sum(expected.values())))[-1]
            assert line["reason"] == reason, what
            assert line["detail"], what
            assert "route" not in line
        assert {reason: running.counted(reason) for reason in expected} == expected
        assert len(running.relay.ledger) == 0


@pytest.mark.parametrize(
    ("data", "alert", "reason"),
    [
        (b"", b"", "probe"),
        (client_hello(NAME)[:1], ALERT["decode_error"], "bad_hello"),
        (client_hello(NAME)[:100], ALERT["decode_error"], "bad_hello"),
    ],
)
async def test_a_client_that_ends_too_early(data: bytes, alert: bytes, reason: str) -> None:
    async with a_relay() as running:
        client = await running.connect()
        await client.send(data)
        client.shutdown_write()
        assert await read_all(client) == alert
        assert (await running.ended())[0]["reason"] == reason
        client.close()


@pytest.mark.parametrize(("data", "reason"), [(client_hello(NAME)[:50], "client_reset"), (b"", "probe")])
async def test_a_client_that_resets_in_its_hello(data: bytes, reason: str) -> None:
    async with a_relay() as running:
        client = await running.connect()
        await running.opened(state="hello")
        await client.send(data)
        client.reset()
        assert (await running.ended())[0]["reason"] == reason
        assert not running.relay.ledger.ended() or reason != "probe", "probes leave the room to streams"


async def test_a_client_that_resets_behind_its_hello_before_it_is_accepted() -> None:
    """getpeername fails by then; the stream has its client's address all the same."""
    async with a_relay() as running:
        port = await running.serve(hold)
        with socket.socket() as client:
            client.connect(running.relay.addresses[0])
            source = client.getsockname()[0]
            client.sendall(client_hello(name_of(port)))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line = (await running.ended())[0]
    assert (line["reason"], line["client"]) == ("client_reset", source)


@pytest.mark.parametrize("data", [b"", b"\x16", client_hello(NAME)[:-1]])
async def test_silence_gets_an_end_and_no_alert(data: bytes) -> None:
    """A client that waits for the server to speak first, as MySQL's does, is told apart from one that is slow."""
    async with a_relay(hello_timeout_s=0.05) as running:
        client = await running.connect()
        await client.send(data)
        assert await read_all(client) == b""
        line = (await running.ended())[0]
        assert (line["reason"], line["bytes_up"]) == ("hello_timeout" if data else "not_tls", 0)
        assert ("MySQL" in str(line["detail"])) == (not data)
        client.close()


async def test_the_deadline_is_absolute_however_the_hello_drips() -> None:
    hello = client_hello(NAME, padding(2000))
    async with a_relay(hello_timeout_s=0.2) as running:
        client = await running.connect()
        sent = 0
        async with asyncio.TaskGroup() as group:
            ending = group.create_task(read_all(client))
            for byte in hello:
                if ending.done():
                    break
                await client.send(bytes([byte]))
                sent += 1
                await asyncio.sleep(0.005)
        assert ending.result() == b""
        assert 0 < sent < len(hello)
        assert (await running.ended())[0]["reason"] == "hello_timeout"
        client.close()


async def test_clients_from_elsewhere() -> None:
    async with a_relay(allow=parse_cidrs(["10.0.0.0/8"])) as running:
        port = await running.serve(hold)
        client = await running.dial(name_of(port))
        assert await read_all(client) == ALERT["access_denied"]
        client.close()
        line = (await running.ended())[0]
        assert (line["reason"], line["sni"]) == ("denied", name_of(port))
        assert "relay.allow" in str(line["detail"])


async def test_rules() -> None:
    rules = [
        Rule.parse(action="deny", to=[f"denied.b.{DOMAIN}", "*.a." + DOMAIN], ports=["1"]),
        Rule.parse(action="allow"),
    ]
    async with a_relay(policy=Policy(tuple(rules))) as running:
        port = await running.serve(count)
        client = await running.dial(name_of(1))
        assert await read_all(client) == ALERT["access_denied"]
        client.close()
        client = await running.dial(name_of(port))
        client.shutdown_write()
        assert await read_all(client) == client_hello(name_of(port))
        client.close()
        lines = await running.ended(2)
    assert "rule 1 denies" in str(lines[0]["detail"])


async def test_max_streams() -> None:
    async with a_relay(max_streams=2) as running:
        port = await running.serve(count)
        first, second = [await running.dial(name_of(port)) for _ in range(2)]
        await running.opened(2)
        third = await running.connect()
        assert await read_all(third) == ALERT["internal_error"], "at once, without a hello"
        assert (await running.ended())[0]["reason"] == "overloaded"
        first.shutdown_write()
        assert await read_all(first) == client_hello(name_of(port)), "none in progress suffers"
        await running.ended(2)
        fourth = await running.dial(name_of(port))
        fourth.shutdown_write()
        assert await read_all(fourth) == client_hello(name_of(port))
        for stream in (first, second, third, fourth):
            stream.close()


async def test_a_relay_is_no_service_of_its_own() -> None:
    """Otherwise one ClientHello would loop until no descriptor is left."""
    for listen in ("127.0.0.1", "0.0.0.0"):
        async with a_relay(listen=((listen, 0),)) as running:
            port = running.relay.addresses[0][1]
            client = await connect("127.0.0.1", port, timeout_s=5)
            await client.send(client_hello(name_of(port)))
            assert await read_all(client) == ALERT["access_denied"]
            client.close()
            assert "would loop" in str((await running.ended())[0]["detail"])


async def test_the_admin_server_is_no_service_either() -> None:
    async with a_relay() as running:
        port = await running.serve(hold)
        guarded = replace(running.relay.config, guard=(("0.0.0.0", port),))
        running.relay.reconfigure(guarded, running.relay._router.keys)
        client = await running.dial(name_of(port))
        assert await read_all(client) == ALERT["access_denied"]
        client.close()
