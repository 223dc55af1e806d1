"""The test vectors of PROTOCOL.md: our code writes these bytes, reads these values, and the document quotes them."""

import json
import pathlib
import re
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

import sniproxy.tunnel
from sniproxy.formats.client_hello import HelloReader
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.capsules import (
    CapsuleError,
    CapsuleReader,
    CapsuleType,
    Control,
    Event,
    Header,
    Payload,
    header,
)
from sniproxy.tunnel.epoch import epoch_in, proto_of, stale_detail, told_epoch
from sniproxy.tunnel.messages import (
    Continued,
    Done,
    Finished,
    Heartbeat,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Ready,
    Received,
    Refused,
    Waiting,
    parse_control,
)
from sniproxy.tunnel.preamble import Preamble, PreambleError, SigningKey, Tlv, WarmPreamble, parse, read_length, sign
from sniproxy.tunnel.state import Side, StreamState
from sniproxy.tunnel.verify import PreambleVerifier, check_hello
from tests.sniproxy.tunnel.state_diagram import diagram

FOLDER = pathlib.Path(sniproxy.tunnel.__file__).parent
DOCUMENT = (FOLDER / "PROTOCOL.md").read_text()
VECTORS: dict[str, Any] = json.loads((FOLDER / "vectors.json").read_text())
NOW_MS: int = VECTORS["now_ms"]
EPOCH = bytes.fromhex(VECTORS["gateway"]["epoch"])
KEYS = {
    key["id"]: SigningKey(
        id=key["id"],
        secret=bytes.fromhex(key["secret"]),
        from_network=key["from_network"],
        to_network=key["to_network"],
    )
    for key in VECTORS["keys"]
}
SECRET = KEYS["ab-1"].secret
HEADERS = {vector["name"]: bytes.fromhex(vector["header"]) for vector in VECTORS["preambles"]}
QUOTED = re.sub(r"\s", "", DOCUMENT)
"""Return the document without white space, so that long vectors may span lines."""


def named(section: str) -> pytest.MarkDecorator:
    """Run a test for each vector of a section."""
    return pytest.mark.parametrize("vector", VECTORS[section], ids=[vector["name"] for vector in VECTORS[section]])


def verifier(*, require_epoch: bool = False) -> PreambleVerifier:
    return PreambleVerifier(KEYS, VECTORS["gateway"]["network"], epoch=EPOCH, require_epoch=require_epoch)


def verify(by: PreambleVerifier, data: bytes) -> Preamble | WarmPreamble:
    """What a gateway does with the first bytes of a connection."""
    read_length(data)
    return by.verify(data, addressee=VECTORS["gateway"]["addressee"], now_ms=NOW_MS)


# --- preambles --------------------------------------------------------------------------------------------------------


def preamble_of(vector: dict[str, Any]) -> Preamble | WarmPreamble:
    """The values of a vector."""
    fields = dict(vector["fields"])
    for name in ("stream_id", "nonce", "hello_digest", "epoch"):
        if name in fields:
            fields[name] = bytes.fromhex(fields[name])
    if vector["kind"] == "warm":
        return WarmPreamble(**fields)
    return Preamble(**{**fields, "client": tuple(fields["client"]), "local": tuple(fields["local"])})


@named("preambles")
def test_preambles(vector: dict[str, Any]) -> None:
    preamble, data = preamble_of(vector), bytes.fromhex(vector["header"])
    assert sign(preamble, SECRET) == data
    assert parse(data) == preamble
    assert verify(verifier(), data) == preamble
    assert preamble.once.hex() == vector["once"]
    assert vector["header"] in QUOTED


@named("refused_preambles")
def test_refused_preambles(vector: dict[str, Any]) -> None:
    by = verifier(require_epoch=vector.get("require_epoch", False))
    for before in vector.get("after", []):
        verify(by, HEADERS[before])
    with pytest.raises(PreambleError) as refused:
        verify(by, bytes.fromhex(vector["header"]))
    assert refused.value.reason.value == vector["reason"]
    assert refused.value.told[0].value == vector.get("told", vector["reason"])
    if "detail" in vector:
        assert refused.value.told[1] == vector["detail"]
        assert vector["detail"] in DOCUMENT
    told = f", told as `{vector['told']}`" if "told" in vector else ""
    assert f"| {vector['name']} | `{vector['reason']}`{told} |" in DOCUMENT


def test_a_clock_may_be_sixty_seconds_off() -> None:
    preamble = parse(HEADERS["stream"])
    for skew_ms in (-60_000, 60_000):
        verify(verifier(), sign(replace(preamble, time_ms=NOW_MS + skew_ms), SECRET))


def test_the_hello_is_the_one_that_was_signed() -> None:
    vector = VECTORS["hello"]
    hello = HelloReader().feed(bytes.fromhex(vector["bytes"]))
    assert hello is not None
    assert (hello.server_name, hello.digest.hex()) == (vector["server_name"], vector["digest"])
    assert vector["bytes"] in QUOTED
    assert vector["digest"] in QUOTED
    preamble = parse(HEADERS["stream"])
    assert isinstance(preamble, Preamble)
    check_hello(preamble, hello.server_name, hello.digest)
    for name, digest in ((hello.server_name, bytes(32)), ("other.shop.example", hello.digest)):
        with pytest.raises(PreambleError) as refused:
            check_hello(preamble, name, digest)
        assert refused.value.reason is Reason.BAD_SIGNATURE


def test_epochs() -> None:
    proto = VECTORS["gateway"]["proto"]
    assert proto_of(EPOCH) == proto[1]
    assert epoch_in(proto) == EPOCH
    assert proto[1] in DOCUMENT
    once = bytes.fromhex(VECTORS["preambles"][0]["once"])
    detail = next(v["detail"] for v in VECTORS["refused_preambles"] if v["name"] == "another epoch")
    assert stale_detail(EPOCH, SECRET, once) == detail
    assert told_epoch(detail, SECRET, once) == EPOCH


# --- capsules ---------------------------------------------------------------------------------------------------------


def message_of(name: str, fields: dict[str, Any]) -> Message:
    """The message of a control capsule's vector."""
    bare: dict[str, Message] = {
        message.type.name: message for message in (Ready(), Finished(), Done(), Continued(), Heartbeat())
    }
    match name:
        case "OPENED":
            return Opened(ip_address(fields["address"]), fields["port"], fields["ms"])
        case "REFUSED":
            return Refused(**fields)
        case "PING":
            return Ping(bytes.fromhex(fields["token"]))
        case "PONG":
            return Pong(bytes.fromhex(fields["token"]))
        case "OPEN":
            return Open(HEADERS[fields["preamble"]])
        case "RECEIVED":
            return Received(**fields)
        case "WAITING":
            return Waiting(**fields)
    return bare[name]


@named("capsules")
def test_capsules(vector: dict[str, Any]) -> None:
    name, fields, data = vector["name"], vector["fields"], bytes.fromhex(vector["bytes"])
    events = CapsuleReader().feed(data)
    if "payload" in fields:
        payload = bytes.fromhex(fields["payload"])
        assert header(CapsuleType[name], len(payload)) + payload == data
        assert said(events) == [(name, fields["payload"])]
    else:
        message = message_of(name, fields)
        assert message.pack() == data
        (control,) = events
        assert isinstance(control, Control)
        assert parse_control(control) == message
    if name != "OPEN":  # its value is the first preamble, which stands there already
        assert vector["bytes"] in QUOTED


def test_no_capsule_is_left_out() -> None:
    assert {vector["name"] for vector in VECTORS["capsules"]} == set(CapsuleType.__members__)
    for kind in CapsuleType:
        assert f"0x{kind:08X}" in DOCUMENT
    for tlv in Tlv:
        assert f"| 0x{tlv:02X} |" in DOCUMENT


def said(events: list[Event]) -> list[tuple[str, str]]:
    """Name and value of each capsule, its payload joined."""
    found: list[tuple[str, str]] = []
    for event in events:
        match event:
            case Header(kind, _):
                found.append((kind.name, ""))
            case Payload(data):
                found[-1] = found[-1][0], found[-1][1] + bytes(data).hex()
            case Control(kind, value):
                found.append((kind.name, value.hex()))
    return found


@named("other_forms")
def test_forms_that_we_read_and_do_not_write(vector: dict[str, Any]) -> None:
    events = CapsuleReader().feed(bytes.fromhex(vector["bytes"]))
    assert said(events) == [tuple(event) for event in vector["events"]]
    assert vector["bytes"] in QUOTED


@named("refused_capsules")
def test_refused_capsules(vector: dict[str, Any]) -> None:
    state = StreamState(Side(vector["to"]))
    for step in vector["before"]:
        if step == "warm":
            state.warm = True
            state.sent(CapsuleType.READY)
        elif step == "PING":
            state.warm = True
            state.received(CapsuleType.READY)
            state.sent(CapsuleType.PING)
        else:
            state.received(CapsuleType[step])
    with pytest.raises(CapsuleError) as refused:
        for event in CapsuleReader().feed(bytes.fromhex(vector["bytes"])):
            if not isinstance(event, Payload):
                state.received(event.type)
            if isinstance(event, Control):
                parse_control(event)
    assert refused.value.reason.value == vector["reason"]
    assert f"| {vector['name']} | {vector['to']} |" in DOCUMENT


@named("conversations")
def test_conversations(vector: dict[str, Any]) -> None:
    """Both sides take every line."""
    states = {side: StreamState(side) for side in Side}
    readers = {side: CapsuleReader() for side in Side}
    for state in states.values():
        state.warm = vector["warm"]
    for line in vector["lines"]:
        speaker, data, names = Side(line["from"]), bytes.fromhex(line["bytes"]), list(line["says"])
        listener = next(side for side in Side if side is not speaker)
        if names[0] == "preamble":
            length = read_length(data)
            assert length is not None
            assert parse(data[:length]).from_network == "a"
            data, names = data[length:], names[1:]
        events = readers[speaker].feed(data)
        assert [name for name, _ in said(events)] == names
        for event in events:
            if not isinstance(event, Payload):
                states[speaker].sent(event.type)
                states[listener].received(event.type)
    assert states[Side.RELAY].complete is states[Side.GATEWAY].complete is (vector["name"] == "a stream")


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_document_shows_the_state_machines() -> None:
    assert diagram() in DOCUMENT


def test_the_document_names_every_reason_that_a_gateway_tells() -> None:
    told = set(Reason) - {  # what only logs and metrics say
        Reason.OK,
        Reason.PROBE,
        Reason.CLIENT_RESET,
        Reason.SERVER_RESET,
        Reason.CLIENT_LOST,
        Reason.SERVER_LOST,
        Reason.PATH_LOST,
        Reason.TRUNCATED,
        Reason.IDLE_TIMEOUT,
        Reason.EVICTED,
        Reason.PROBE,
        Reason.NO_KEY,
        Reason.UNKNOWN_NETWORK,
        Reason.AMBIGUOUS_PORT,
        Reason.NO_ROUTE,
        Reason.NO_PERMISSION,
        Reason.READY_TIMEOUT,
        Reason.OPEN_TIMEOUT,
        Reason.FLOOD,
        Reason.OTHER,
    }
    assert {reason for reason in told if f"| `{reason}` |" not in DOCUMENT} == set()
