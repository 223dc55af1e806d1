"""The gateway over real sockets: every check forged one at a time, and nothing dialled before all of them are passed."""

import asyncio
import gc
import hashlib
import secrets
import socket
from dataclasses import replace

import pytest

from discovery.model.addresses import TargetList
from discovery.model.mesh import GatewaySpec, Kind, RelaySpec, ServiceSpec, TurnSpec
from discovery.model.spec import HealthCheck
from sniproxy.access.rules import Policy, Rule
from sniproxy.formats.proxy_protocol import ProxyHeader
from sniproxy.streams.stream_log import StreamRecord
from sniproxy.tunnel.bridge import BridgeTiming
from sniproxy.tunnel.capsules import CapsuleType, Payload, header
from sniproxy.tunnel.messages import Continued, Done, Finished, Opened, Ready
from sniproxy.tunnel.preamble import Preamble, SigningKey, sign
from tests.support.fixed_discovery import record
from tests.support.gateways import ALLOCATION, Running, Service, Visit, a_gateway, data
from tests.support.hellos import client_hello, message, padding, records, server_name
from tests.support.preambles import KEY, name_for, preamble
from tests.support.streams import until_reset
from tests.support.waiting import eventually
from turnreg.gateway.handshake import InboundStream, StreamRefused

pytestmark = pytest.mark.anyio

NAME = "orders.shop.example"
HELLO = client_hello(NAME)
KEY_AC = SigningKey(id="ac-1", secret=bytes(range(64, 96)), from_network="a", to_network="c")
KEY_BA = SigningKey(id="ba-1", secret=bytes(range(96, 128)), from_network="b", to_network="a")
KEY_CB = SigningKey(id="cb-1", secret=bytes(range(128, 160)), from_network="c", to_network="b")
KEYS = (KEY, KEY_AC, KEY_BA, KEY_CB)


def service_record(*endpoints: str, name: str = NAME, proxy_protocol: bool = False) -> object:
    spec = ServiceSpec(name=name, ports={"8443": list(endpoints)}, proxy_protocol=proxy_protocol)
    return record(Kind.SERVICE, "b", name, spec)


# --- a good stream --------------------------------------------------------------------------------------------------


async def test_a_stream_from_its_preamble_to_its_end() -> None:
    async with a_gateway() as running:
        service = await running.service()
        asked = preamble(service.target, HELLO)
        visit = await running.visit(asked, HELLO)
        assert await visit.answer() == Ready()
        opened = await visit.answer()
        assert isinstance(opened, Opened)
        assert (str(opened.address), opened.port) == ("127.0.0.1", int(service.endpoint.rpartition(":")[2]))
        await visit.connection.send_data(b"question", final=True)
        got = bytearray()
        while not (visit.connection.exhausted and visit.connection.ends.finished_received):
            for event in await visit.connection.read():
                if isinstance(event, Payload):
                    got += event.data
        assert got == HELLO + b"question"
        assert service.got[0] == got
        await visit.connection.send(Finished())
        await visit.connection.send(Done())
        assert await visit.stream.recv() == b"", "the gateway closes"
        visit.stream.close()
        line = (await running.ended())[0]
    words = (
        "stream peer client sni from_network key_id target attempt endpoint bytes_up bytes_down "
        "ms_hello ms_connect ms_first_byte ms_total reason"
    )
    assert " ".join(line) == words
    assert line["stream"] == asked.stream_id.hex()
    assert (line["client"], line["sni"], line["from_network"], line["key_id"]) == ("10.0.0.77", NAME, "a", KEY.id)
    assert line["bytes_up"] == line["bytes_down"] == len(got)
    assert line["reason"] == "ok"


@pytest.mark.parametrize("pieces", ["bytes", "records of one byte", "60 kB", "with more behind it", "end behind it"])
async def test_a_hello_in_any_pieces(pieces: str) -> None:
    hello, capsules = HELLO, [HELLO]
    match pieces:
        case "bytes":
            capsules = [bytes([byte]) for byte in HELLO]
        case "records of one byte":
            hello = records(message(server_name(NAME.encode())), 1)
            capsules = [hello[at : at + 7] for at in range(0, len(hello), 7)]
        case "60 kB":
            hello = client_hello(NAME, padding(60_000))
            capsules = [hello[at : at + 9000] for at in range(0, len(hello), 9000)]
        case "with more behind it":
            capsules = [HELLO[:50], HELLO[50:] + b"early ", b"data"]
    joined = b"".join(capsules)
    async with a_gateway(keys=KEYS) as running:
        service = await running.service()
        digest = hashlib.sha256(b"".join(_payloads(hello))).digest()
        visit = await running.visit(preamble(service.target, hello_digest=digest), *capsules)
        if pieces == "end behind it":
            await visit.connection.send_data(b"", final=True)
        await visit.opened()
        got = bytearray()
        while len(got) < len(joined):
            got += b"".join(bytes(event.data) for event in await visit.connection.read() if isinstance(event, Payload))
        assert got == joined == service.got[0]
        visit.stream.reset()
        await running.ended()


def _payloads(stream: bytes) -> list[bytes]:
    """Return the payloads of the TLS records of a stream."""
    payloads, at = [], 0
    while at < len(stream):
        size = int.from_bytes(stream[at + 3 : at + 5], "big")
        payloads.append(stream[at + 5 : at + 5 + size])
        at += 5 + size
    return payloads


async def test_a_retry_is_the_same_stream_and_another_attempt() -> None:
    async with a_gateway() as running:
        service = await running.service()
        asked = preamble(service.target, HELLO)
        for attempt in (1, 2, 3):
            visit = await running.visit(replace(asked, attempt=attempt), HELLO)
            await visit.opened()
            visit.stream.reset()
        lines = await running.ended(3)
    assert len({line["stream"] for line in lines}) == 1
    assert [line["attempt"] for line in lines] == [1, 2, 3]


# --- capsules and silence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (b"\xff" * 16, "protocol_error"),
        (header(CapsuleType.READY, 0), "protocol_error"),
        (header(CapsuleType.DONE, 0), "protocol_error"),
        (header(CapsuleType.CONTINUED, 0), "protocol_error"),
        (header(CapsuleType.OPEN, 10) + bytes(10), "protocol_error"),
        (header(0x1234, 1 << 20), "protocol_error"),
        (data(HELLO[:50], final=True) + data(HELLO[50:]), "protocol_error"),
        (data(HELLO[:50], final=True), "bad_hello"),
        (data(b"", final=True), "bad_hello"),
    ],
)
async def test_invalid_capsules_instead_of_a_hello(wrong: bytes, reason: str) -> None:
    async with a_gateway() as running:
        service = await running.service()
        visit = await running.visit(preamble(service.target, HELLO))
        await visit.stream.send(wrong)
        assert (await visit.refused(after_ready=True)).reason == reason
        assert not service.streams


@pytest.mark.parametrize("stranger", [b"GET / HTTP/1.1\r\n\r\n", HELLO, b"\r\n\r\n\0\r\nQUIX\n" + bytes(20)])
async def test_strangers_get_no_answer(stranger: bytes) -> None:
    async with a_gateway() as running:
        visit = await running.connect()
        await visit.stream.send(stranger)
        with pytest.raises((ConnectionResetError, EOFError)):
            assert not await visit.stream.recv()
            raise EOFError
        assert (await running.ended())[0]["reason"] == "protocol_error"
        visit.stream.close()


@pytest.mark.parametrize("sent", [0, 15, 16, 100])
async def test_silence_before_the_preamble_is_whole(sent: int) -> None:
    async with a_gateway(hello_timeout_s=0.05) as running:
        visit = await running.connect()
        await visit.stream.send(sign(preamble("127.0.0.1:1", HELLO), KEY.secret)[:sent])
        assert await visit.stream.recv() == b""
        visit.stream.close()
        assert (await running.ended())[0]["reason"] == "hello_timeout"


async def test_silence_before_the_hello_is_whole() -> None:
    async with a_gateway(hello_timeout_s=0.05) as running:
        visit = await running.visit(preamble("127.0.0.1:1", HELLO), HELLO[:-1])
        assert (await visit.refused(after_ready=True)).reason == "hello_timeout"


async def test_a_relay_that_goes_before_its_hello_is_whole() -> None:
    async with a_gateway() as running:
        for cut in ("close", "reset"):
            visit = await running.visit(preamble("127.0.0.1:1", HELLO), HELLO[:-1])
            assert await visit.answer() == Ready()
            getattr(visit.stream, cut)()
        assert {line["reason"] for line in await running.ended(2)} == {"truncated"}


# --- where to -------------------------------------------------------------------------------------------------------


async def test_targets_that_are_refused() -> None:
    async with a_gateway() as running:
        service = await running.service()
        own = f"127.0.0.1:{running.gateway.addresses[0][1]}"
        port = int(service.endpoint.rpartition(":")[2])
        running.discovery.put(
            record(Kind.GATEWAY, "b", "gw-1", GatewaySpec(address=own)),
            record(Kind.RELAY, "b", "relay-1", RelaySpec(addresses=["127.0.0.2"], ports=[port])),
            record(
                Kind.TURN,
                "c",
                "turn-1",
                TurnSpec(url=f"turn:127.0.0.3:{port}", relay_addresses=["127.0.0.3"], port_min=1, port_max=9),
            ),
            service_record(name="empty.shop.example"),  # type: ignore[arg-type]
        )
        for target, reason in {
            "192.0.2.1:8443": "denied",
            "169.254.169.254:80": "denied",
            "0.0.0.0:80": "denied",
            "[::1]:80": "denied",
            own: "denied",
            f"127.0.0.2:{port}": "denied",
            f"127.0.0.3:{port}": "denied",
            "unknown.shop.example:8443": "unknown_name",
            "empty.shop.example:8443": "no_endpoint",
            "127.0.0.1:1": "dial_failed",
        }.items():
            name = name_for(target)
            hello = client_hello(name)
            visit = await running.visit(preamble(target, hello, authority=name), hello)
            assert (await visit.refused(after_ready=True)).reason == reason, target
        assert not service.streams


async def test_a_service_with_a_proxy_header_and_a_dead_endpoint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = f"127.0.0.1:{server.getsockname()[1]}"
    async with a_gateway() as running:
        service = await running.service()
        running.discovery.put(service_record(dead, service.endpoint, proxy_protocol=True))  # type: ignore[arg-type]
        visit = await running.visit(preamble(f"{NAME}:8443", HELLO), HELLO)
        await visit.opened()
        wanted = ProxyHeader(source=("10.0.0.77", 40000), destination=("10.0.0.9", 443)).pack() + HELLO
        assert await service.received(len(wanted)) == wanted
        visit.stream.reset()
        assert (await running.ended())[0]["endpoint"] == service.endpoint


async def test_rules() -> None:
    rules = (Rule.parse(action="deny", sources=["10.0.0.0/8"], to=[NAME]), Rule.parse(action="allow", sources=["a"]))
    async with a_gateway(policy=Policy(rules)) as running:
        service = await running.service()
        visit = await running.visit(preamble(service.target, HELLO), HELLO)
        assert "rule 1 denies" in (await visit.refused(after_ready=True)).detail
        visit = await running.visit(preamble(service.target, HELLO, client=("192.0.2.9", 1)), HELLO)
        await visit.opened()
        visit.stream.reset()


# --- second connections ---------------------------------------------------------------------------------------------


async def opened_behind_turn(running: Running, service: Service) -> tuple[Preamble, Visit]:
    asked = preamble(service.target, HELLO, addressee=ALLOCATION)
    visit = await running.visit(asked, HELLO, behind_turn=True)
    await visit.opened()
    return asked, visit


@pytest.mark.parametrize("tries", [1, 2])
async def test_an_upload_goes_on_over_a_second_connection(tries: int) -> None:
    """Also if a first second connection was lost before its relay got READY."""
    async with a_gateway() as running:
        service = await running.service()
        asked, visit = await opened_behind_turn(running, service)
        seconds: list[Visit] = []
        for number in range(tries):
            again = replace(asked, attempt=2 + number, continues=True)
            seconds.append(second := await running.visit(again, behind_turn=True))
            assert await second.answer() == Ready()
        await visit.connection.send(Continued())
        await second.connection.send_data(b"the rest", final=True)
        await service.received(len(HELLO) + 8)
        visit.connection.ends.end_elsewhere()
        while not (visit.connection.exhausted and visit.connection.ends.finished_received):
            await visit.connection.read()
        await visit.connection.send(Finished())
        await visit.connection.send(Done())
        for connection in [visit, *seconds]:
            await until_reset(connection.stream)  # the gateway has dialled all of them and keeps no port
            connection.stream.close()
        await service.reach(lambda service: service.ends == ["fin"])
        assert [line["reason"] for line in await running.ended()] == ["ok"]
        assert len(running.log.events) == 1, "one stream, one line"


@pytest.mark.parametrize("who", ["nobody", "another network", "directly", "too late"])
async def test_a_second_connection_that_no_stream_awaits_is_refused_before_ready(who: str) -> None:
    """After READY, the relay may send the rest of an upload on it."""
    async with a_gateway(keys=KEYS) as running:
        service = await running.service()
        asked, visit = await opened_behind_turn(running, service)
        again, key = replace(asked, attempt=2, continues=True), KEY
        match who:
            case "nobody":
                again = replace(again, stream_id=secrets.token_bytes(16))
            case "another network":
                again, key = replace(again, from_network="c", key_id=KEY_CB.id), KEY_CB
            case "directly":
                again = replace(again, addressee="gw-1")
            case "too late":
                visit.stream.reset()
                await running.ended()
        second = await running.visit(again, key=key, behind_turn=who != "directly")
        answer = await second.refused()
        assert (answer.reason, "not open here" in answer.detail) == ("protocol_error", True)
        visit.stream.close()


async def test_second_connections_are_served_at_the_limit_and_while_draining() -> None:
    async with a_gateway(max_streams=1) as running:
        service = await running.service()
        asked, visit = await opened_behind_turn(running, service)
        running.gateway.close()
        second = await running.visit(replace(asked, attempt=2, continues=True), behind_turn=True)
        assert await second.answer() == Ready()
        visit.stream.reset()
        second.stream.close()
        await running.ended()


async def test_a_second_connection_that_is_never_used_goes_with_its_stream() -> None:
    async with a_gateway(timing=BridgeTiming(linger_s=0.02)) as running:
        service = await running.service()
        asked, visit = await opened_behind_turn(running, service)
        second = await running.visit(replace(asked, attempt=2, continues=True), behind_turn=True)
        assert await second.answer() == Ready()
        service.streams[0].reset()
        await until_reset(visit.stream)
        await until_reset(second.stream)
        second.stream.close()
        visit.stream.close()


@pytest.mark.parametrize("refused", ["denied", "dial_failed", "bad_signature"])
async def test_a_refused_stream_leaves_no_cycle(refused: str) -> None:
    """The cycle collector runs rarely (crossnet.process), and a cycle would stay in memory until then."""
    async with a_gateway() as running:
        service = await running.service()
        target = {"denied": "192.0.2.1:1", "dial_failed": "127.0.0.1:1"}.get(refused, service.target)
        name = name_for(target)
        signed = client_hello(name)
        hello = client_hello("other.example") if refused == "bad_signature" else signed

        async def one(count: int) -> None:
            visit = await running.visit(preamble(target, signed, authority=name), hello)
            assert (await visit.refused(after_ready=True)).reason == refused
            await running.ended(count)

        await one(1)
        gc.collect()
        gc.disable()
        before = asyncio.all_tasks()
        try:
            await one(2)
            if serving := asyncio.all_tasks() - before:
                await asyncio.wait(serving)
            del serving
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = [item for item in gc.garbage if isinstance(item, StreamRecord | InboundStream | StreamRefused)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert left == []


async def test_endpoints_are_checked_where_their_record_asks_for_it() -> None:
    async with a_gateway(allow=TargetList.parse(["127.0.0.0/8:1"])) as running:
        health = HealthCheck(check="tcp", interval_s=1)
        spec = ServiceSpec(name=NAME, ports={"8443": ["127.0.0.1:1", "127.0.0.1:2"]}, health=health)
        running.discovery.put(record(Kind.SERVICE, "b", "orders", spec))
        await eventually(lambda: running.gateway.endpoints.health.left_out)
        assert [line["endpoint"] for line in running.gateway.endpoints.status()] == ["127.0.0.1:1"]
        running.gateway.reconfigure(replace(running.gateway.config, allow=TargetList()), {})
        assert not running.gateway.endpoints.health.left_out
