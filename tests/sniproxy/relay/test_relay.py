"""The relay over real sockets: what each kind of client gets, and what the operator sees."""

import asyncio
import os
from ipaddress import IPv4Address

import pytest

from crossnet.logs import JsonFormatter, LogfmtFormatter
from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Kind, ServiceSpec
from sniproxy.engine import SocketStream
from sniproxy.tunnel.messages import Opened, Ready
from tests.support.fixed_discovery import record
from tests.support.hellos import (
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

pytestmark = pytest.mark.anyio

NAME = "orders.shop.example"


async def hold(stream: SocketStream) -> None:
    """A service that reads and never answers."""
    while await stream.recv():
        pass


async def count(stream: SocketStream) -> None:
    """A service that reads to the end and sends everything back."""
    await stream.send(await read_all(stream))
    stream.shutdown_write()


# --- what is served, unchanged --------------------------------------------------------------------------------------


def whole(name: str) -> dict[str, list[bytes]]:
    """Valid starts of connections, in the pieces in which they are sent."""
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
    """A hello in records of one byte with more data behind it than a pipe holds: nothing overtakes what was read with the hello."""
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


async def test_a_name_in_two_networks_leads_to_the_first_one_in_the_import() -> None:
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
        await visit.connection.send(Ready())
        await visit.connection.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
        assert await visit.payload(len(hello)) == hello
        await visit.connection.send_data(b"answer")
        await asyncio.get_running_loop().create_future()

    name = f"p8443-10-1-0-5.b.{DOMAIN}"
    hello = client_hello(name)
    async with scripted(answers) as gateway, a_relay() as running:
        running.add(gateway)
        client = await running.dial(name)
        assert await client.recv_exactly(6) == b"answer"
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
