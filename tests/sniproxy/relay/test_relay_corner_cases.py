"""Every corner case of a ClientHello over real sockets: the exact bytes arrive, or the exact alert comes."""

from collections.abc import AsyncIterator

import pytest

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Kind, ServiceSpec
from sniproxy.engine import SocketStream
from tests.support.corner_cases import (
    BAD_NAMES,
    FROM_THE_HEADER,
    NAME,
    NAMELESS,
    OTHER_PROTOCOLS,
    PLAIN,
    ROUTED,
    SNI,
    grow,
)
from tests.support.fixed_discovery import record
from tests.support.hellos import BROKEN, CHANGE_CIPHER_SPEC, EARLY_DATA, client_hello, ech, records
from tests.support.relays import ALERT, Running, a_relay
from tests.support.streams import read_all, turns

pytestmark = pytest.mark.anyio

IMPORTS = Imports([ImportRule(names=(NAME.decode(),), sources=("a",), prefer="local")])


@pytest.fixture
async def relay() -> AsyncIterator[Running]:
    """A relay that reaches NAME in its own network. The service returns everything that it reads up to the end."""

    async def give_back(stream: SocketStream) -> None:
        await stream.send(await read_all(stream))
        stream.shutdown_write()

    async with a_relay(imports=IMPORTS) as running:
        port = await running.serve(give_back)
        spec = ServiceSpec(name=NAME.decode(), ports={"443": [f"127.0.0.1:{port}"]})
        running.discovery.put(record(Kind.SERVICE, "a", "orders", spec))
        yield running


GOOD = ROUTED | {
    "64 KiB": [records(grow(65_536 + 4, last=SNI))],
    "ECH, GREASE or real": [client_hello(NAME, ech())],
    "ECH with a long inner hello": [client_hello(NAME, ech(size=900))],
    "upper case": [client_hello(NAME.upper())],
    "trailing dot": [client_hello(NAME + b".")],
    "early data in the same segment": [client_hello(NAME) + CHANGE_CIPHER_SPEC + EARLY_DATA],
}


async def test_what_is_routed_arrives_byte_for_byte(relay: Running) -> None:
    """Each ends with FIN right behind the hello, and the answer still comes."""
    for what, pieces in GOOD.items():
        client = await relay.connect()
        for piece in pieces:
            await client.send(piece)
            await turns()  # the relay reads each piece by itself
        client.shutdown_write()
        assert await read_all(client) == b"".join(pieces), what
        client.close()
    lines = await relay.ended(len(GOOD))
    assert {line["reason"] for line in lines} == {"ok"}
    assert {line["sni"] for line in lines} == {NAME.decode()}


BAD = [
    *((what, wire, b"", "not_tls") for what, wire in OTHER_PROTOCOLS.items()),
    *((what, wire, ALERT["decode_error"], "bad_hello") for what, wire in FROM_THE_HEADER.items()),
    ("one byte over 64 KiB", records(grow(65_536 + 5, last=SNI)), ALERT["decode_error"], "bad_hello"),
    ("64 KiB in records of one byte", records(grow(65_536 + 4, last=SNI), 1), ALERT["decode_error"], "bad_hello"),
    *((what, records(whole), ALERT["decode_error"], "bad_hello") for what, whole in BROKEN.items()),
    *((what, records(whole, 1), ALERT["decode_error"], "bad_hello") for what, whole in BROKEN.items()),
    *((what, records(whole), ALERT["unrecognized_name"], "no_sni") for what, whole in NAMELESS.items()),
    *((repr(name), client_hello(name), ALERT["unrecognized_name"], "bad_name") for name in BAD_NAMES),
]


async def test_what_is_refused_gets_its_alert_at_once(relay: Running) -> None:
    for count, (what, wire, alert, reason) in enumerate(BAD, start=1):
        client = await relay.connect()
        await client.send(wire)
        assert await read_all(client) == alert, what
        client.close()
        assert (await relay.ended(count))[-1]["reason"] == reason, what


@pytest.mark.parametrize("sent", [b"", b"\x16", records(PLAIN)[:-1], records(PLAIN, 1)[:-1]])
async def test_silence_is_waited_for_and_then_ended(sent: bytes) -> None:
    async with a_relay(hello_timeout_s=0.1) as running:
        client = await running.connect()
        await client.send(sent)
        assert await read_all(client) == b""
        client.close()
        line = (await running.ended())[0]
    assert line["reason"] == ("hello_timeout" if sent else "not_tls")
    assert (f"{len(sent)} bytes came" if sent else "nothing came") in str(line["detail"])
