"""The preamble: parsed as it was signed, and every forgery of a field is refused with its reason."""

import dataclasses
import hmac
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.formats.proxy_protocol import SIGNATURE, Command, ProxyHeader, crc32c, parse
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.preamble import (
    Preamble,
    PreambleError,
    SigningKey,
    Tlv,
    WarmPreamble,
    encode_target,
    read_length,
    sign,
)
from sniproxy.tunnel.verify import PreambleVerifier, check_hello

NOW_MS = 1_800_000_000_000
AB = SigningKey(id="ab-1", secret=bytes(range(32)), from_network="a", to_network="b")
AC = SigningKey(id="ac-1", secret=bytes(range(1, 33)), from_network="a", to_network="c")
BA = SigningKey(id="ba-1", secret=bytes(range(2, 34)), from_network="b", to_network="a")
KEYS = {key.id: key for key in (AB, AC, BA)}

GOOD = Preamble(
    client=("10.9.8.7", 54321),
    local=("10.0.0.9", 443),
    authority="orders.shop.example",
    stream_id=bytes(range(16)),
    from_network="a",
    to_network="b",
    addressee="gw-1.turn-1",
    key_id="ab-1",
    time_ms=NOW_MS,
    target="orders.shop.example:8443",
    hello_digest=bytes(range(100, 132)),
    attempt=0,
)


def verifier(network: str = "b") -> PreambleVerifier:
    return PreambleVerifier(KEYS, network)


def refusal(
    header: bytes,
    *,
    by: PreambleVerifier | None = None,
    addressee: str = GOOD.addressee,
    now_ms: int = NOW_MS,
) -> Reason:
    with pytest.raises(PreambleError) as refused:
        (by or verifier()).verify(header, addressee=addressee, now_ms=now_ms)
    assert str(refused.value).startswith(f"{refused.value.reason}: ")
    return refused.value.reason


def tlvs_of(header: bytes) -> list[tuple[int, bytes]]:
    parsed = parse(header)
    assert parsed is not None
    return list(parsed[0].tlvs)


def signed(tlvs: list[tuple[int, bytes]], key: SigningKey = AB, **fields: Any) -> bytes:
    """Write and sign a header with any TLVs, as other code with the key could; the signature must be last."""
    fields = {"source": GOOD.client, "destination": GOOD.local} | fields
    header = ProxyHeader(tlvs=tuple(tlvs), **fields).pack()
    return header[:-32] + hmac.digest(key.secret, header[:-32] + bytes(32), "sha256")


words = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)
targets = st.builds(
    encode_target,
    st.ip_addresses(v=4) | st.ip_addresses(v=6).filter(lambda a: a.ipv4_mapped is None) | st.just("orders.shop"),  # type: ignore[arg-type]
    st.integers(1, 65535),
)
endpoints = st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65535))
preambles = st.builds(
    Preamble,
    client=endpoints,
    local=endpoints,
    authority=words,
    stream_id=st.binary(min_size=16, max_size=16),
    from_network=st.just("a"),
    to_network=st.just("b"),
    addressee=words,
    key_id=st.just("ab-1"),
    time_ms=st.integers(NOW_MS - 60_000, NOW_MS + 60_000),
    target=targets,
    hello_digest=st.none() | st.binary(min_size=32, max_size=32),
    attempt=st.integers(0, 255),
    imports=st.none() | st.text("a-z_.* 0", max_size=320),
)


@given(preambles)
def test_what_is_signed_is_what_is_parsed(preamble: Preamble) -> None:
    header = sign(preamble, AB.secret)
    assert read_length(header[:15]) is None
    assert read_length(header[:16]) == read_length(header + b"behind") == len(header) <= 1024
    assert verifier().verify(header, addressee=preamble.addressee, now_ms=NOW_MS) == preamble


def test_layout() -> None:
    tlvs = tlvs_of(sign(GOOD, AB.secret))
    assert sorted(tlvs[:-1]) == [
        (0x02, b"orders.shop.example"),
        (0x05, bytes(range(16))),
        (0xE0, b"a"),
        (0xE1, b"ab-1"),
        (0xE2, NOW_MS.to_bytes(8, "big")),
        (0xE4, b"orders.shop.example:8443"),
        (0xE5, b"\x01"),
        (0xE7, b"b"),
        (0xE8, b"gw-1.turn-1"),
        (0xE9, bytes(range(100, 132))),
        (0xEA, b"\x00"),
    ]
    assert tlvs[-1][0] == 0xE3
    without_tls = tlvs_of(sign(dataclasses.replace(GOOD, hello_digest=None), AB.secret))
    assert [kind for kind, _ in without_tls] == [kind for kind, _ in tlvs if kind != 0xE9]


@pytest.mark.needs("openssl")
def test_the_signature_is_over_the_whole_header_with_its_value_zeroed() -> None:
    header = sign(GOOD, AB.secret)
    assert header[:12] == SIGNATURE
    command = ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{AB.secret.hex()}", "-binary"]
    ours = subprocess.run(command, input=header[:-32] + bytes(32), capture_output=True, check=True).stdout
    assert header[-32:] == ours


# --- forgeries ------------------------------------------------------------------------------------------------------


@given(st.data())
def test_no_bit_can_be_changed(data: st.DataObject) -> None:
    header = sign(GOOD, AB.secret)
    bit = data.draw(st.integers(0, 8 * len(header) - 1))
    forged = bytearray(header)
    forged[bit // 8] ^= 1 << bit % 8
    assert refusal(bytes(forged)) in (Reason.BAD_SIGNATURE, Reason.PROTOCOL_ERROR, Reason.NO_KEY)


FORGED_VALUES = [
    (Tlv.AUTHORITY, b"other.shop.example", Reason.BAD_SIGNATURE),
    (Tlv.UNIQUE_ID, bytes(16), Reason.BAD_SIGNATURE),
    (Tlv.FROM_NETWORK, b"b", Reason.NO_KEY),
    (Tlv.TO_NETWORK, b"c", Reason.NO_KEY),
    (Tlv.ADDRESSEE, b"gw-2.turn-1", Reason.BAD_SIGNATURE),
    (Tlv.KEY_ID, b"zz-1", Reason.NO_KEY),
    (Tlv.KEY_ID, b"ac-1", Reason.NO_KEY),
    (Tlv.TIME, (NOW_MS + 1).to_bytes(8, "big"), Reason.BAD_SIGNATURE),
    (Tlv.TARGET, b"169.254.169.254:80", Reason.BAD_SIGNATURE),
    (Tlv.FRAMING, b"\x02", Reason.PROTOCOL_ERROR),
    (Tlv.HELLO_DIGEST, bytes(32), Reason.BAD_SIGNATURE),
    (Tlv.ATTEMPT, b"\x01", Reason.BAD_SIGNATURE),
    (Tlv.SIGNATURE, bytes(32), Reason.BAD_SIGNATURE),
]


@pytest.mark.parametrize(("kind", "value", "reason"), FORGED_VALUES)
def test_one_forged_field_without_the_key(kind: Tlv, value: bytes, reason: Reason) -> None:
    tlvs = tlvs_of(sign(GOOD, AB.secret))
    forged = [(number, value if number == kind else old) for number, old in tlvs]
    assert forged != tlvs
    assert refusal(ProxyHeader(source=GOOD.client, destination=GOOD.local, tlvs=tuple(forged)).pack()) is reason


@pytest.mark.parametrize("field", ["source", "destination"])
@pytest.mark.parametrize("endpoint", [("10.9.8.6", 54321), ("10.9.8.7", 54322)])
def test_forged_addresses_without_the_key(field: str, endpoint: tuple[str, int]) -> None:
    tlvs = tuple(tlvs_of(sign(GOOD, AB.secret)))
    fields: dict[str, Any] = {"source": GOOD.client, "destination": GOOD.local} | {field: endpoint}
    assert refusal(ProxyHeader(tlvs=tlvs, **fields).pack()) is Reason.BAD_SIGNATURE


def test_an_added_field_without_the_key() -> None:
    tlvs = tlvs_of(sign(GOOD, AB.secret))
    forged = ProxyHeader(source=GOOD.client, destination=GOOD.local, tlvs=((0xEE, b"x"), *tlvs)).pack()
    assert refusal(forged) is Reason.BAD_SIGNATURE


def test_signed_with_another_key() -> None:
    assert refusal(sign(GOOD, AC.secret)) is Reason.BAD_SIGNATURE


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        (BA, {"key_id": "ba-1"}),
        (BA, {"key_id": "ba-1", "from_network": "a", "to_network": "b"}),
        (AC, {"key_id": "ac-1"}),
        (AB, {"from_network": "c"}),
    ],
)
def test_a_key_is_for_one_direction_only(key: SigningKey, fields: dict[str, Any]) -> None:
    assert refusal(sign(dataclasses.replace(GOOD, **fields), key.secret)) is Reason.NO_KEY


@pytest.mark.parametrize(("skew_ms", "fresh"), [(-60_000, True), (60_000, True), (-60_001, False), (60_001, False)])
def test_the_clocks_may_differ_by_a_minute(skew_ms: int, fresh: bool) -> None:
    header = sign(GOOD, AB.secret)
    if fresh:
        assert verifier().verify(header, addressee=GOOD.addressee, now_ms=NOW_MS + skew_ms) == GOOD
    else:
        assert refusal(header, now_ms=NOW_MS + skew_ms) is Reason.CLOCK_SKEW


@pytest.mark.parametrize("time_ms", [0, (1 << 64) - 1])
def test_no_time_is_too_far(time_ms: int) -> None:
    assert refusal(sign(dataclasses.replace(GOOD, time_ms=time_ms), AB.secret)) is Reason.CLOCK_SKEW


def test_a_captured_header_is_useless() -> None:
    header, here = sign(GOOD, AB.secret), verifier()
    here.verify(header, addressee=GOOD.addressee, now_ms=NOW_MS)
    assert refusal(header, by=here) is Reason.REPLAY  # at the same gateway
    assert refusal(header, by=here, now_ms=NOW_MS + 60_000) is Reason.REPLAY
    assert refusal(header, by=here, now_ms=NOW_MS + 120_001) is Reason.CLOCK_SKEW  # forgotten, and too old by then
    assert refusal(header, addressee="gw-2.turn-1") is Reason.REPLAY  # at another gateway of that network
    assert refusal(header, by=here, addressee="gw-1.turn-2") is Reason.REPLAY  # by another allocation of that gateway
    assert (
        refusal(header, by=verifier("c")) is Reason.REPLAY
    )  # at another network that should not have the key but does
    assert refusal(header, by=PreambleVerifier({"ac-1": AC}, "c")) is Reason.NO_KEY  # and at one that has not
    with pytest.raises(PreambleError) as refused:
        check_hello(GOOD, GOOD.authority, bytes(32))  # with another ClientHello
    assert refused.value.reason is Reason.BAD_SIGNATURE


def test_a_header_as_far_ahead_as_allowed_is_remembered_while_it_is_valid() -> None:
    header, here = sign(dataclasses.replace(GOOD, time_ms=NOW_MS + 60_000), AB.secret), verifier()
    here.verify(header, addressee=GOOD.addressee, now_ms=NOW_MS)
    assert refusal(header, by=here, now_ms=NOW_MS + 120_000) is Reason.REPLAY
    assert refusal(header, by=here, now_ms=NOW_MS + 120_001) is Reason.CLOCK_SKEW


def test_the_next_attempt_and_the_next_stream_are_no_replay() -> None:
    here = verifier()
    for fields in ({}, {"attempt": 1}, {"attempt": 2}, {"stream_id": bytes(16)}, {"addressee": "gw-1.turn-2"}):
        preamble = dataclasses.replace(GOOD, **fields)
        here.verify(sign(preamble, AB.secret), addressee=preamble.addressee, now_ms=NOW_MS)
    assert len(here.replays) == 5


def test_what_is_refused_is_not_remembered() -> None:
    here = verifier()
    header = sign(GOOD, AB.secret)
    refusal(header[:-1] + bytes([header[-1] ^ 1]), by=here)
    refusal(header, by=here, addressee="other")
    refusal(header, by=here, now_ms=0)
    assert len(here.replays) == 0
    here.verify(header, addressee=GOOD.addressee, now_ms=NOW_MS)


def test_a_peer_without_a_key_learns_nothing_about_our_keys() -> None:
    said = set()
    for key_id in ("ac-1", "zz-1"):
        with pytest.raises(PreambleError) as refused:
            verifier().verify(sign(dataclasses.replace(GOOD, key_id=key_id), bytes(32)), addressee="", now_ms=0)
        said.add(refused.value.detail.replace(key_id, "KEY"))
    assert said == {"no key 'KEY' here for streams from 'a' to 'b'"}


def test_checks_come_in_order() -> None:
    """A header with several errors is refused for the first one; when that is fixed, for the next."""
    here = verifier()
    here.verify(sign(GOOD, AB.secret), addressee=GOOD.addressee, now_ms=NOW_MS)
    stale = dataclasses.replace(GOOD, time_ms=NOW_MS - 60_001, addressee="other", key_id="none")
    assert refusal(sign(stale, AC.secret) + b"\0", by=here) is Reason.PROTOCOL_ERROR
    assert refusal(sign(stale, AC.secret), by=here) is Reason.NO_KEY
    stale = dataclasses.replace(stale, key_id="ab-1")
    assert refusal(sign(stale, AC.secret), by=here) is Reason.BAD_SIGNATURE
    assert refusal(sign(stale, AB.secret), by=here) is Reason.CLOCK_SKEW
    fresh = dataclasses.replace(stale, time_ms=NOW_MS)
    with pytest.raises(PreambleError, match="meant for 'other'"):
        here.verify(sign(fresh, AB.secret), addressee=GOOD.addressee, now_ms=NOW_MS)
    with pytest.raises(PreambleError, match="here before"):
        here.verify(sign(GOOD, AB.secret), addressee=GOOD.addressee, now_ms=NOW_MS)


# --- layout, by somebody who holds a key ----------------------------------------------------------------------------

TLVS = tlvs_of(sign(GOOD, AB.secret))


def without(kind: int) -> list[tuple[int, bytes]]:
    return [tlv for tlv in TLVS if tlv[0] != kind]


@pytest.mark.parametrize(
    "kind", [kind for kind in Tlv if kind not in (Tlv.HELLO_DIGEST, Tlv.CONTINUES, Tlv.EPOCH, Tlv.SIGNATURE)]
)
def test_each_field_must_be_there(kind: Tlv) -> None:
    assert refusal(signed(without(kind))) is Reason.PROTOCOL_ERROR


@pytest.mark.parametrize("kind", Tlv)
def test_each_field_must_be_there_once(kind: Tlv) -> None:
    again = [tlv for tlv in TLVS if tlv[0] == kind] or [(int(kind), b"\1"), (int(kind), b"\1")]
    assert refusal(signed(again + TLVS)) is Reason.PROTOCOL_ERROR


def test_a_second_connection_is_marked_in_the_signed_header() -> None:
    header = sign(dataclasses.replace(GOOD, continues=True), AB.secret)
    assert verifier().verify(header, addressee=GOOD.addressee, now_ms=NOW_MS).continues  # type: ignore[union-attr]
    assert not verifier().verify(signed(TLVS), addressee=GOOD.addressee, now_ms=NOW_MS).continues  # type: ignore[union-attr]
    assert refusal(signed([(Tlv.CONTINUES, b"\2"), *TLVS])) is Reason.PROTOCOL_ERROR


def test_the_signature_must_be_last() -> None:
    assert refusal(signed([*TLVS, (0xEE, bytes(32))])) is Reason.PROTOCOL_ERROR
    assert refusal(signed([TLVS[-1], *TLVS[:-1], (0xEE, bytes(32))])) is Reason.PROTOCOL_ERROR
    assert refusal(signed(TLVS[:-1])) is Reason.PROTOCOL_ERROR
    assert refusal(signed([*TLVS[:-1], (0xE3, bytes(33))])) is Reason.PROTOCOL_ERROR


def test_unknown_fields_are_ignored_but_signed() -> None:
    header = signed([(0xEF, b"later"), (0xEF, b"twice"), (0x01, b"h2"), *TLVS])
    assert verifier().verify(header, addressee=GOOD.addressee, now_ms=NOW_MS) == GOOD
    assert refusal(header.replace(b"later", b"laten")) is Reason.BAD_SIGNATURE


@pytest.mark.parametrize(
    ("value", "said"), [(b"", False), (b"\0", False), (b"\1", True), (b"\3\xff", True), (b"\2", False)]
)
def test_features(value: bytes, said: bool) -> None:
    header = signed([(0xEE, value), *TLVS])
    assert verifier().verify(header, addressee=GOOD.addressee, now_ms=NOW_MS) == dataclasses.replace(
        GOOD, heartbeats=said
    )
    assert refusal(signed([(0xEE, b"\1"), (0xEE, b"\1"), *TLVS])) is Reason.PROTOCOL_ERROR


@pytest.mark.parametrize("imports", ["a" * 321, "Orders.shop", "a,b", "a\n"])
def test_invalid_imports(imports: str) -> None:
    with pytest.raises(PreambleError):
        sign(dataclasses.replace(GOOD, imports=imports), AB.secret)
    assert refusal(signed([(0xED, imports.encode()), *TLVS])) is Reason.PROTOCOL_ERROR
    assert refusal(signed([(0xED, b"a.b"), (0xED, b"a.b"), *TLVS])) is Reason.PROTOCOL_ERROR


def test_a_wrong_checksum_is_refused() -> None:
    header = signed([(0x03, bytes(4)), *TLVS])
    assert crc32c(header)
    assert refusal(header) is Reason.PROTOCOL_ERROR


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Tlv.AUTHORITY, b""),
        (Tlv.AUTHORITY, b"a b"),
        (Tlv.AUTHORITY, b"a\n"),
        (Tlv.AUTHORITY, b"\xff"),
        (Tlv.AUTHORITY, b"a" * 256),
        (Tlv.UNIQUE_ID, bytes(15)),
        (Tlv.UNIQUE_ID, bytes(17)),
        (Tlv.FROM_NETWORK, b""),
        (Tlv.TO_NETWORK, b"\0"),
        (Tlv.ADDRESSEE, b""),
        (Tlv.KEY_ID, b""),
        (Tlv.TIME, bytes(7)),
        (Tlv.TIME, bytes(9)),
        (Tlv.TARGET, b"nowhere"),
        (Tlv.FRAMING, b""),
        (Tlv.FRAMING, b"\0"),
        (Tlv.FRAMING, b"\1\1"),
        (Tlv.HELLO_DIGEST, b""),
        (Tlv.HELLO_DIGEST, bytes(31)),
        (Tlv.ATTEMPT, b""),
        (Tlv.ATTEMPT, bytes(2)),
    ],
)
def test_invalid_values(kind: Tlv, value: bytes) -> None:
    tlvs = [(number, value if number == kind else old) for number, old in TLVS]
    assert refusal(signed(tlvs)) is Reason.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "header",
    [
        b"",
        SIGNATURE,
        sign(GOOD, AB.secret)[:-1],
        sign(GOOD, AB.secret) + b"\0",
        signed(TLVS, source=None, destination=None),
        signed(TLVS, command=Command.LOCAL),
        SIGNATURE + b"\x21\x11\xff\xff" + bytes(65535),
    ],
)
def test_not_one_header_of_a_client(header: bytes) -> None:
    assert refusal(header) is Reason.PROTOCOL_ERROR


@given(st.binary(max_size=300), st.integers(0, 180))
def test_garbage_raises_only_preamble_errors(tail: bytes, kept: int) -> None:
    garbage = sign(GOOD, AB.secret)[:kept] + tail
    refusal(garbage)
    try:
        read_length(garbage)
    except PreambleError as error:
        assert error.reason is Reason.PROTOCOL_ERROR  # noqa: PT017 - there may be none


@pytest.mark.parametrize(
    "fields",
    [
        {"authority": ""},
        {"authority": "ü.example"},
        {"stream_id": bytes(15)},
        {"attempt": 256},
        {"attempt": -1},
        {"time_ms": -1},
        {"time_ms": 1 << 64},
        {"hello_digest": b""},
        {"target": "a:1"},
        {"client": ("a", 1)},
        {"client": ("10.0.0.1", 65536)},
        {"authority": "a" * 255, "addressee": "a" * 255, "from_network": "a" * 255, "to_network": "a" * 255},
    ],
)
def test_what_cannot_be_signed(fields: dict[str, Any]) -> None:
    with pytest.raises(PreambleError) as refused:
        sign(dataclasses.replace(GOOD, **fields), AB.secret)
    assert refused.value.reason is Reason.PROTOCOL_ERROR


def test_the_longest_names_fit() -> None:
    longest = dataclasses.replace(
        GOOD,
        client=("fd00::1", 65535),
        authority="a" * 253,
        from_network="a" * 63,
        to_network="b" * 63,
        addressee="g" * 100,
        key_id="k" * 63,
        target="s" * 63 + ".s" * 95 + ":65535",
    )
    assert len(sign(longest, AB.secret)) <= 1024


def test_a_key_does_not_show_its_secret() -> None:
    assert AB.secret.hex() not in repr(AB)
    assert repr(AB.secret) not in repr(AB)


# --- connections that are kept ready ----------------------------------------------------------------------------------

WARM = WarmPreamble(
    nonce=bytes(range(16)), from_network="a", to_network="b", addressee="gw-1.turn-1", key_id="ab-1", time_ms=NOW_MS
)


def test_a_warm_header_has_no_client() -> None:
    header = sign(WARM, AB.secret)
    assert header[12:14] == b"\x20\x00"  # version 2 LOCAL, AF_UNSPEC
    assert [kind for kind, _ in tlvs_of(header)] == [0x05, 0xE0, 0xE7, 0xE8, 0xE1, 0xE2, 0xE5, 0xE3]
    assert verifier().verify(header, addressee=WARM.addressee, now_ms=NOW_MS) == WARM


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key_id": "ac-1"}, Reason.NO_KEY),
        ({"to_network": "c"}, Reason.NO_KEY),
        ({"time_ms": NOW_MS - 60_001}, Reason.CLOCK_SKEW),
        ({"addressee": "gw-2.turn-1"}, Reason.REPLAY),
    ],
)
def test_what_a_warm_header_is_refused_for(changes: dict[str, object], reason: Reason) -> None:
    assert refusal(sign(dataclasses.replace(WARM, **changes), AB.secret)) is reason  # type: ignore[arg-type]


def test_a_warm_header_is_good_once() -> None:
    header = sign(WARM, AB.secret)
    once = verifier()
    once.verify(header, addressee=WARM.addressee, now_ms=NOW_MS)
    assert refusal(header, by=once) is Reason.REPLAY


@given(st.data())
def test_no_bit_of_a_warm_header_can_be_changed(data: st.DataObject) -> None:
    header = sign(WARM, AB.secret)
    bit = data.draw(st.integers(0, 8 * len(header) - 1))
    forged = bytearray(header)
    forged[bit // 8] ^= 1 << bit % 8
    assert refusal(bytes(forged)) in (Reason.BAD_SIGNATURE, Reason.PROTOCOL_ERROR, Reason.NO_KEY)


def test_a_warm_header_with_a_target_is_neither() -> None:
    assert refusal(signed(TLVS, command=Command.LOCAL)) is Reason.PROTOCOL_ERROR
