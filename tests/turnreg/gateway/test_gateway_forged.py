"""Every check of a preamble (sniproxy/tunnel/PROTOCOL.md), failed alone: its reason; nothing remembered, nothing dialled."""

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from sniproxy.formats import proxy_protocol
from sniproxy.formats.proxy_protocol import Command, ProxyHeader
from sniproxy.tunnel.preamble import Preamble, SigningKey, Tlv, sign
from tests.support.gateways import ALLOCATION, a_gateway
from tests.support.hellos import client_hello, message, padding, records, server_name
from tests.support.preambles import KEY, preamble

pytestmark = pytest.mark.anyio

NAME = "orders.shop.example"
HELLO = client_hello(NAME)
KEY_AC = SigningKey(id="ac-1", secret=bytes(range(64, 96)), from_network="a", to_network="c")
KEY_BA = SigningKey(id="ba-1", secret=bytes(range(96, 128)), from_network="b", to_network="a")
KEY_CB = SigningKey(id="cb-1", secret=bytes(range(128, 160)), from_network="c", to_network="b")
KEYS = (KEY, KEY_AC, KEY_BA, KEY_CB)


def tlvs_changed(change: Callable[[list[tuple[int, bytes]]], list[tuple[int, bytes]]]) -> Callable[[Preamble], bytes]:
    """Change the TLVs before signing, so that the signature is right and something else is wrong."""

    def forge(asked: Preamble) -> bytes:
        parsed = proxy_protocol.parse(sign(asked, KEY.secret))
        assert parsed is not None
        made = replace(parsed[0], tlvs=tuple(change(list(parsed[0].tlvs))))
        return resigned(made.pack())

    return forge


def resigned(unsigned: bytes) -> bytes:
    body = unsigned[:-32] + bytes(32)
    return unsigned[:-32] + hmac.digest(KEY.secret, body, hashlib.sha256)


def without(kind: Tlv) -> Callable[[Preamble], bytes]:
    return tlvs_changed(lambda tlvs: [tlv for tlv in tlvs if tlv[0] != kind])


def with_value(kind: Tlv, value: bytes) -> Callable[[Preamble], bytes]:
    return tlvs_changed(lambda tlvs: [(k, value if k == kind else v) for k, v in tlvs])


def twice(kind: Tlv) -> Callable[[Preamble], bytes]:
    return tlvs_changed(lambda tlvs: [tlv for tlv in tlvs for _ in range(2 if tlv[0] == kind else 1)])


def flipped(at: int) -> Callable[[Preamble], bytes]:
    def forge(asked: Preamble) -> bytes:
        good = bytearray(sign(asked, KEY.secret))
        good[at] ^= 1
        return bytes(good)

    return forge


def signed(key: SigningKey = KEY, **changes: object) -> Callable[[Preamble], bytes]:
    return lambda asked: sign(replace(asked, **changes), key.secret)  # type: ignore[arg-type]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


FORGED: dict[str, tuple[Callable[[Preamble], bytes], str]] = {
    "longer than 1,024 bytes": (lambda a: sign(a, KEY.secret)[:14] + b"\x04\x00", "protocol_error"),
    "TLVs that do not fill it": (
        lambda a: (h := sign(a, KEY.secret))[:15] + bytes([h[15] - 1]) + h[16:-1],
        "protocol_error",
    ),
    "command LOCAL": (lambda a: ProxyHeader(command=Command.LOCAL).pack(), "protocol_error"),
    "no TLV at all": (lambda a: ProxyHeader(source=a.client, destination=a.local).pack(), "protocol_error"),
    "UDP": (lambda a: sign(a, KEY.secret)[:13] + b"\x12" + sign(a, KEY.secret)[14:], "protocol_error"),
    **{
        f"without {kind.name}": (without(kind), "protocol_error")
        for kind in Tlv
        if kind not in {Tlv.HELLO_DIGEST, Tlv.CONTINUES, Tlv.EPOCH}
    },
    **{f"{kind.name} twice": (twice(kind), "protocol_error") for kind in Tlv if kind not in {Tlv.CONTINUES, Tlv.EPOCH}},
    "two epochs": (
        tlvs_changed(lambda tlvs: [(Tlv.EPOCH, bytes(16)), (Tlv.EPOCH, bytes(16)), *tlvs]),
        "protocol_error",
    ),
    "an epoch of 15 bytes": (tlvs_changed(lambda tlvs: [(Tlv.EPOCH, bytes(15)), *tlvs]), "protocol_error"),
    "no epoch known": (signed(epoch=bytes(16)), "stale_epoch"),
    "the epoch of another process": (signed(epoch=bytes(range(16))), "stale_epoch"),
    "framing version 2": (with_value(Tlv.FRAMING, b"\2"), "protocol_error"),
    "stream id of 15 bytes": (with_value(Tlv.UNIQUE_ID, bytes(15)), "protocol_error"),
    "target that is none": (with_value(Tlv.TARGET, b"localhost:80"), "protocol_error"),
    "target in another spelling": (with_value(Tlv.TARGET, b"127.0.0.01:80"), "protocol_error"),
    "target IPv4-mapped": (with_value(Tlv.TARGET, b"[::ffff:127.0.0.1]:80"), "protocol_error"),
    "authority with a line end": (with_value(Tlv.AUTHORITY, b"a\nb"), "protocol_error"),
    "signature not last": (tlvs_changed(lambda tlvs: [*tlvs[:-2], tlvs[-1], tlvs[-2]]), "protocol_error"),
    "wrong checksum": (tlvs_changed(lambda tlvs: [(3, bytes(4)), *tlvs]), "protocol_error"),
    "unknown key": (signed(key_id="ab-9"), "no_key"),
    "key of another sender": (signed(KEY_CB, key_id=KEY_CB.id), "no_key"),
    "key of the other direction": (signed(KEY_BA, key_id=KEY_BA.id), "no_key"),
    "another sender with our key": (signed(from_network="c"), "no_key"),
    "signed with another key": (signed(KEY_CB), "bad_signature"),
    "a signature of nothing": (lambda a: sign(a, KEY.secret)[:-32] + bytes(32), "bad_signature"),
    "first bit of the signature": (flipped(-32), "bad_signature"),
    "last bit of the signature": (flipped(-1), "bad_signature"),
    "client's address changed": (flipped(16), "bad_signature"),
    "client's port changed": (flipped(25), "bad_signature"),
    "61 s too early": (signed(time_ms=now_ms() - 61_000), "clock_skew"),
    "two hours ahead": (signed(time_ms=now_ms() + 7_200_000), "clock_skew"),
    "time 0": (signed(time_ms=0), "clock_skew"),
    "for another network": (signed(KEY_AC, key_id=KEY_AC.id, to_network="c"), "replay"),
    "for another record": (signed(addressee="gw-2"), "replay"),
    "for an allocation of ours": (signed(addressee=ALLOCATION), "replay"),
}


@pytest.mark.parametrize(("forge", "reason"), FORGED.values(), ids=FORGED)
async def test_a_forged_preamble(forge: Callable[[Preamble], bytes], reason: str) -> None:
    async with a_gateway(keys=KEYS) as running:
        service = await running.service()
        visit = await running.visit(forge(preamble(service.target, HELLO)), HELLO)
        # Who has not proven to have a key hears one word, whatever was wrong.
        assert (await visit.refused()).reason == ("bad_signature" if reason == "no_key" else reason)
        line = (await running.ended())[0]
        assert line["reason"] == reason
        assert "client" not in line, "nothing that is not proven is written down"
        assert not service.streams, "and nothing is dialled"


@pytest.mark.parametrize(
    "field", [Tlv.AUTHORITY, Tlv.UNIQUE_ID, Tlv.TIME, Tlv.TARGET, Tlv.ADDRESSEE, Tlv.HELLO_DIGEST, Tlv.ATTEMPT]
)
async def test_each_field_is_signed(field: Tlv) -> None:
    """One bit of its value, in a header that is otherwise as it was signed."""
    async with a_gateway(keys=KEYS) as running:
        service = await running.service()
        good = sign(preamble(service.target, HELLO), KEY.secret)
        parsed = proxy_protocol.parse(good)
        assert parsed is not None
        changed = tuple(
            (kind, bytes([value[0] ^ (2 if field != Tlv.TARGET else 3)]) + value[1:] if kind == field else value)
            for kind, value in parsed[0].tlvs
        )
        visit = await running.visit(replace(parsed[0], tlvs=changed).pack(), HELLO)
        assert (await visit.refused()).reason == "bad_signature"
        assert not service.streams


@pytest.mark.parametrize("skew_ms", [-59_000, 59_000])
async def test_clocks_may_differ_by_a_minute(skew_ms: int) -> None:
    async with a_gateway() as running:
        service = await running.service()
        visit = await running.visit(preamble(service.target, HELLO, time_ms=now_ms() + skew_ms), HELLO)
        await visit.opened()
        visit.stream.reset()


async def test_a_captured_header_is_good_once_here_and_nowhere_else() -> None:
    async with (
        a_gateway(keys=KEYS) as running,
        a_gateway(keys=KEYS, id="gw-2") as other,
        a_gateway(keys=KEYS, network="c") as foreign,
    ):
        service = await running.service()
        captured = sign(preamble(service.target, HELLO), KEY.secret)
        visit = await running.visit(captured, HELLO)
        await visit.opened()
        visit.stream.reset()
        for where in (running, other, foreign, running):
            again = await where.visit(captured, HELLO)
            assert (await again.refused()).reason == "replay"
        by_turn = await running.visit(captured, HELLO, behind_turn=True)
        assert (await by_turn.refused()).reason == "replay"
        assert len(service.streams) == 1


HELLOS: dict[str, tuple[bytes, str]] = {
    "another name": (client_hello("stock.shop.example"), "bad_signature"),
    "the same name in another hello": (client_hello(NAME, padding(1)), "bad_signature"),
    "one bit elsewhere": (HELLO[:20] + bytes([HELLO[20] ^ 1]) + HELLO[21:], "bad_signature"),
    "no name": (records(message()), "no_sni"),
    "a name that is none": (client_hello("10.0.0.5"), "bad_name"),
    "broken": (records(message(server_name(NAME.encode()), behind=b"x")), "bad_hello"),
    "endless": (b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", "bad_hello"),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", "not_tls"),
}


@pytest.mark.parametrize(("hello", "reason"), HELLOS.values(), ids=HELLOS)
async def test_a_hello_that_was_not_signed_for(hello: bytes, reason: str) -> None:
    async with a_gateway() as running:
        service = await running.service()
        visit = await running.visit(preamble(service.target, HELLO), hello)
        assert (await visit.refused(after_ready=True)).reason == reason
        assert (await running.ended())[0]["reason"] == reason
        assert not service.streams


@pytest.mark.parametrize(
    "changes", [{"authority": "stock.shop.example"}, {"hello_digest": None}, {"hello_digest": bytes(32)}]
)
async def test_a_preamble_that_was_signed_for_another_hello(changes: dict[str, object]) -> None:
    async with a_gateway() as running:
        service = await running.service()
        visit = await running.visit(preamble(service.target, HELLO, **changes), HELLO)
        assert (await visit.refused(after_ready=True)).reason == "bad_signature"
        assert not service.streams
