"""The relay over real sockets: what each kind of client gets, byte for byte, and what the operator reads of it."""

import asyncio
import os
import socket
import struct
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from crossnet.logs import JsonFormatter, LogfmtFormatter
from discovery.model.addresses import parse_cidrs
from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Kind, ServiceSpec
from sniproxy.access.rules import Policy, Rule
from sniproxy.engine import SocketStream, connect
from sniproxy.formats.client_hello import HelloReason
from sniproxy.relay.relay import _ALERTS, _SILENT
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.messages import Opened, Ready
from tests.support.fixed_discovery import record
from tests.support.hellos import (
    BROKEN,
    CHANGE_CIPHER_SPEC,
    EARLY_DATA,
    X25519MLKEM768,
    client_hello,
    ech,
    key_share,
    message,
    padding,
    records,
    server_name,
)
from tests.support.hellos import (
    record as tls_record,
)
from tests.support.relays import ALERT, DOMAIN, a_relay, name_of
from tests.support.scripted_gateways import Visit, opens, refuses, reset, scripted, silent_behind_ready
from tests.support.streams import read_all, turns, until_reset
from tests.support.waiting import eventually

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
    """A service that answers nothing and reads on."""
    while await stream.recv():
        pass


async def count(stream: SocketStream) -> None:
    """A service that reads to the end and gives everything back."""
    await stream.send(await read_all(stream))
    stream.shutdown_write()


# --- refusals -------------------------------------------------------------------------------------------------------

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
        (b"", b"", "client_reset"),
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


async def test_a_client_that_resets_in_its_hello() -> None:
    async with a_relay() as running:
        client = await running.connect()
        await client.send(client_hello(NAME)[:50])
        client.reset()
        assert (await running.ended())[0]["reason"] == "client_reset"


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
    async with a_relay(hello_timeout_s=0.05) as running:
        client = await running.connect()
        await client.send(data)
        assert await read_all(client) == b""
        line = (await running.ended())[0]
        assert (line["reason"], line["bytes_up"]) == ("hello_timeout", 0)
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


@pytest.mark.parametrize("size", [0, 60_000, 1 << 20, 8 << 20])
async def test_a_client_that_sends_on_still_gets_its_alert(size: int) -> None:
    """Right behind a refused hello, more than anybody reads: the alert must not be lost to the reset that ends it."""
    async with a_relay() as running:
        client = await running.dial("stranger.example")
        try:
            await client.send(bytes(size))
        except OSError:
            pass
        assert await client.recv() == ALERT["unrecognized_name"]
        client.close()


async def test_clients_that_linger_over_their_alert_keep_nobody_out() -> None:
    async with a_relay(max_streams=1) as running:
        port = await running.serve(count)
        lingering = [await running.dial("stranger.example") for _ in range(20)]
        await running.ended(20)
        client = await running.dial(name_of(port))
        client.shutdown_write()
        assert await read_all(client) == client_hello(name_of(port))
        for stream in [*lingering, client]:
            stream.close()


async def test_a_flood_of_refused_clients_is_not_waited_for() -> None:
    async with a_relay(max_lingering=3) as running:
        clients = [await running.dial("stranger.example") for _ in range(10)]
        for client in clients:
            assert await client.recv() == ALERT["unrecognized_name"]
        assert running.relay._lingering == 3
        for client in clients:
            client.close()
        await eventually(lambda: not running.relay._lingering)


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
    """Or one ClientHello would go round until no descriptor is left."""
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


# --- what is served, unchanged --------------------------------------------------------------------------------------


def whole(name: str) -> dict[str, list[bytes]]:
    """Beginnings of connections that are good, in the pieces in which they are sent."""
    plain = message(server_name(name.encode()))
    big = message(key_share(X25519MLKEM768, 1216), server_name(name.encode()))
    hello = client_hello(name)
    return {
        "in one": [hello],
        "byte by byte": [bytes([byte]) for byte in hello],
        "first byte, then the rest": [hello[:1], hello[1:]],
        "cut in the name": [hello[: hello.index(name.encode()) + 5], hello[hello.index(name.encode()) + 5 :]],
        "records of one byte": [records(plain, 1)],
        "record cut in the handshake header": [tls_record(plain[:2]) + tls_record(plain[2:])],
        "record cut in the name": [tls_record(plain[:70]) + tls_record(plain[70:])],
        "post-quantum share before the name": [records(big)],
        "15.7 kB in one record": [records(message(server_name(name.encode()), padding(15_600)))],
        "18 kB in two records": [records(message(server_name(name.encode()), padding(18_000)))],
        "name behind 23 kB": [records(message(padding(23_000), server_name(name.encode())))],
        "60 kB": [records(message(padding(60_000), server_name(name.encode())))],
        "record version 3.0": [records(plain, version=0x0300)],
        "record version 3.4": [records(plain, version=0x0304)],
        "ECH": [client_hello(name, ech())],
        "GREASE": [
            records(message((0x0A0A, b""), server_name(name.encode()), (0x1A1A, b"\0"), ciphers=b"\x0a\x0a\x13\x01"))
        ],
        "with early data": [hello + CHANGE_CIPHER_SPEC + EARLY_DATA],
        "upper case": [client_hello(name.upper())],
        "trailing dot": [client_hello(name + ".")],
    }


async def test_every_good_hello_reaches_its_service_unchanged() -> None:
    async with a_relay() as running:
        port = await running.serve(count)
        cases = whole(name_of(port))
        for what, pieces in cases.items():
            client = await running.connect()
            for piece in pieces:
                await client.send(piece)
            client.shutdown_write()
            assert await read_all(client) == b"".join(pieces), what
            client.close()
        lines = await running.ended(len(cases))
    assert {line["reason"] for line in lines} == {"ok"}
    assert {line["sni"] for line in lines} == {name_of(port)}, "as it routes"
    assert [what for what, line in zip(cases, lines, strict=True) if line.get("ech")] == ["ECH"]
    for pieces, line in zip(cases.values(), lines, strict=True):
        assert line["bytes_up"] == line["bytes_down"] == sum(map(len, pieces))


async def test_half_closes_pass_both_ways() -> None:
    async with a_relay() as running:

        async def first_to_end(stream: SocketStream) -> None:
            await stream.recv_exactly(hello_bytes)
            await stream.send(b"greeting")
            stream.shutdown_write()
            got.set_result(await read_all(stream))

        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        name = name_of(await running.serve(first_to_end))
        hello_bytes = len(client_hello(name))
        client = await running.dial(name)
        assert await read_all(client) == b"greeting"
        await client.send(b"after the service's end")
        client.shutdown_write()
        assert await got == b"after the service's end"
        client.close()
        assert (await running.ended())[0]["reason"] == "ok"


async def test_bulk_behind_the_hello_by_the_local_route() -> None:
    """Hello in records of one byte, and more behind it than a pipe holds: nothing overtakes what was read with the hello."""
    async with a_relay() as running:
        port = await running.serve(count)
        data = records(message(server_name(name_of(port).encode()), padding(12_500)), 1) + os.urandom(3 << 20)
        client = await running.connect()
        async with asyncio.TaskGroup() as group:

            async def send() -> None:
                await client.send(data)
                client.shutdown_write()

            group.create_task(send())
            assert await read_all(client) == data
        client.close()


@pytest.mark.parametrize("who", ["client", "service"])
async def test_a_reset_passes_as_a_reset(who: str) -> None:
    async with a_relay() as running:
        served: asyncio.Future[SocketStream] = asyncio.get_running_loop().create_future()

        async def service(stream: SocketStream) -> None:
            served.set_result(stream)
            await asyncio.get_running_loop().create_future()

        client = await running.dial(name_of(await running.serve(service)))
        stream = await served
        await stream.recv()
        near, far = (client, stream) if who == "client" else (stream, client)
        near.reset()
        await until_reset(far)
        assert (await running.ended())[0]["reason"] == f"{'client' if who == 'client' else 'server'}_reset"
        client.close()


async def test_an_idle_stream_ends() -> None:
    async with a_relay(idle_timeout_s=0.05) as running:
        client = await running.dial(name_of(await running.serve(hold)))
        await until_reset(client)
        assert (await running.ended())[0]["reason"] == "idle_timeout"
        client.close()


async def test_a_stream_whose_client_has_ended_is_given_its_own_time() -> None:
    async with a_relay(half_close_timeout_s=0.05) as running:

        async def never_answer(stream: SocketStream) -> None:
            await read_all(stream)
            await asyncio.get_running_loop().create_future()

        client = await running.dial(name_of(await running.serve(never_answer)))
        client.shutdown_write()
        await until_reset(client)
        assert (await running.ended())[0]["reason"] == "idle_timeout"
        client.close()


async def test_a_name_of_two_networks_is_where_the_import_says_first_and_nobody_elses_counts() -> None:
    published = [
        record(Kind.SERVICE, network, name.partition(".")[0], ServiceSpec(name=name, ports={"443": []}))
        for network, name in (("b", NAME), ("c", NAME), ("b", "pay.shop.example"))
    ]
    for sources in (("b", "c"), ("c", "b")):
        imports = Imports([ImportRule(names=(NAME,), sources=sources, prefer="remote")])
        async with (
            scripted(opens) as of_b,
            scripted(opens, network="c") as of_c,
            a_relay(*published, imports=imports) as running,
        ):
            running.add(of_b)
            running.add(of_c, network="c")
            client = await running.dial(NAME)
            await running.opened()
            assert (len(of_b.visits), len(of_c.visits)) == ((1, 0) if sources[0] == "b" else (0, 1))
            client.close()
            stranger = await running.dial("pay.shop.example")
            assert await read_all(stranger) == ALERT["unrecognized_name"], "published, and imported by nobody here"
            stranger.close()


# --- through a gateway ----------------------------------------------------------------------------------------------


async def test_a_stream_through_a_gateway() -> None:
    async def answers(visit: Visit) -> None:
        await visit.framed.send(Ready())
        await visit.framed.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
        assert await visit.payload(len(hello)) == hello
        await visit.framed.send_data(b"answer", final=True)
        await asyncio.get_running_loop().create_future()

    name = f"p8443-10-1-0-5.b.{DOMAIN}"
    hello = client_hello(name)
    async with scripted(answers) as gateway, a_relay() as running:
        running.add(gateway)
        client = await running.dial(name)
        assert await read_all(client) == b"answer"
        (row,) = running.relay.ledger.rows()
        assert (row["state"], row["route"], row["candidate"]) == ("open", "direct", "direct:gw-1")
        assert row["bytes_up"] == len(hello)
        client.reset()
        line = (await running.ended())[0]
    assert line["stream"] == gateway.visits[0].preamble.stream_id.hex()


@pytest.mark.parametrize(
    ("script", "alert", "reason"),
    [
        (refuses("denied", behind_ready=True), "access_denied", "denied"),
        (refuses("unknown_name", behind_ready=True), "unrecognized_name", "unknown_name"),
        (refuses("dial_failed", behind_ready=True), "internal_error", "dial_failed"),
        (refuses("no_endpoint", behind_ready=True), "internal_error", "no_endpoint"),
        (refuses("overloaded"), "internal_error", "overloaded"),
        (refuses("bad_signature"), "internal_error", "bad_signature"),
        (refuses("clock_skew"), "internal_error", "clock_skew"),
        (refuses("never_heard_of"), "internal_error", "other"),
        (reset, "internal_error", "dial_failed"),
    ],
)
async def test_what_a_gateway_refuses_is_told_to_the_client(script: object, alert: str, reason: str) -> None:
    async with scripted(script) as gateway, a_relay() as running:  # type: ignore[arg-type]
        running.add(gateway)
        client = await running.dial(f"p8443-10-1-0-5.b.{DOMAIN}")
        assert await read_all(client) == ALERT[alert]
        client.close()
        line = (await running.ended())[0]
    assert (line["reason"], line["attempts"]) == (reason, 1)
    assert running.counted(reason) == 1


async def test_the_next_gateway_gets_the_same_stream() -> None:
    async with (
        scripted(refuses("draining")) as first,
        scripted(opens, addressee="gw-2") as second,
        a_relay(zone="near") as running,
    ):
        running.add(first, zone="near")
        running.add(second, name="gw-2")
        client = await running.dial(f"p8443-10-1-0-5.b.{DOMAIN}")
        await running.opened()
        client.reset()
        line = (await running.ended())[0]
    assert (line["candidate"], line["attempts"], line["reason"]) == ("direct:gw-2", 2, "client_reset")
    assert first.visits[0].preamble.stream_id == second.visits[0].preamble.stream_id


# --- the end of a relay ---------------------------------------------------------------------------------------------


async def test_close_lets_streams_go_on() -> None:
    async with a_relay() as running:
        port = await running.serve(count)
        client = await running.dial(name_of(port))
        await running.opened()
        running.relay.close()
        with pytest.raises(ConnectionRefusedError):
            await running.connect()
        client.shutdown_write()
        assert await read_all(client) == client_hello(name_of(port))
        client.close()


async def test_a_stream_can_be_ended_from_outside() -> None:
    async with a_relay() as running:
        client = await running.dial(name_of(await running.serve(hold)))
        await running.opened()
        (account,) = running.relay.ledger._live
        assert account.end is not None
        account.end()
        await until_reset(client)
        client.close()
        assert (await running.ended())[0]["reason"] == "other"


@pytest.mark.parametrize("state", ["hello", "dialling", "open"])
async def test_cancelling_ends_every_stream_in_every_state(state: str) -> None:
    before = descriptors()
    async with scripted(silent_behind_ready) as gateway:
        async with a_relay() as running:
            running.add(gateway)
            names = {"dialling": f"p8443-10-1-0-5.b.{DOMAIN}", "open": name_of(await running.serve(hold))}
            client = await (running.connect() if state == "hello" else running.dial(names[state]))
            await running.opened(state=state)
        try:
            assert await client.recv() == b""
            assert state != "open", "a stream that was cut must not look complete"
        except ConnectionResetError:
            pass
        client.close()
    assert descriptors() == before


# --- what the operator reads ----------------------------------------------------------------------------------------


async def test_the_line_of_a_stream() -> None:
    async with a_relay() as running:
        port = await running.serve(count)
        client = await running.dial(name_of(port), behind=b"question")
        client.shutdown_write()
        await read_all(client)
        line = (await running.ended())[0]
        client.close()
    words = (
        "stream client local sni network target route candidate attempts bytes_up bytes_down "
        "ms_hello ms_route ms_connect ms_first_byte ms_total reason"
    )
    assert " ".join(line) == words
    assert len(str(line["stream"])) == 32
    assert (line["client"], line["network"], line["route"], line["attempts"]) == ("127.0.0.1", "a", "local", 1)
    assert line["target"] == f"127.0.0.1:{port}"
    assert line["candidate"] == f"local:127.0.0.1:{port}"
    steps = [float(str(line[f"ms_{step}"])) for step in ("hello", "route", "connect", "first_byte", "total")]
    assert steps == sorted(steps)


async def test_no_name_forges_a_line(caplog: pytest.LogCaptureFixture) -> None:
    evil = [
        b'x","reason":"ok',
        b"x\nevent=stream reason=ok",
        b"x\r\n",
        b"x reason=ok",
        "x\u2028y".encode(),
        b"a" * 60_000,
    ]
    async with a_relay() as running:
        for number, name in enumerate(evil, 1):
            client = await running.connect()
            await client.send(client_hello(name))
            await read_all(client)
            client.close()
            await running.ended(number)
    lines = [line for line in caplog.records if line.name == "crossnet.relay"]
    assert len(lines) == len(evil)
    for line in lines:
        for formatter in (JsonFormatter(), LogfmtFormatter()):
            text = formatter.format(line)
            assert len(text.splitlines()) == 1
            assert text.isascii()
            assert "event=stream reason=ok" not in text
            assert '"reason":"ok"' not in text
            assert len(text) < 2000


def test_reasons_and_alerts_are_complete() -> None:
    assert {reason.value for reason in HelloReason} <= {reason.value for reason in Reason}
    assert not set(_ALERTS) & _SILENT


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_relays_share_a_port_where_they_are_told_to() -> None:
    async with a_relay(reuse_port=True) as one, a_relay(reuse_port=True, listen=one.relay.addresses) as other:
        assert one.relay.addresses == other.relay.addresses
        clients = []
        while not (len(one.relay.ledger) and len(other.relay.ledger)):
            clients.append(await one.connect())
            await turns()
        for client in clients:
            client.close()
    async with a_relay() as alone:
        (await alone.connect()).close()
        with pytest.raises(OSError, match="cannot listen"):
            async with a_relay(reuse_port=True, listen=alone.relay.addresses):
                pass
