"""Targets in their one spelling, key files, and the first bytes of a connection."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.formats.proxy_protocol import SIGNATURE
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.preamble import (
    FirstBytes,
    PreambleError,
    classify_first_bytes,
    decode_target,
    encode_target,
    parse_key,
)

TARGETS = [
    ("10.1.0.5:8443", ip_address("10.1.0.5"), 8443),
    ("[fd00::5]:1", ip_address("fd00::5"), 1),
    ("[::1]:65535", ip_address("::1"), 65535),
    ("orders.shop.svc.cluster.local:443", "orders.shop.svc.cluster.local", 443),
    ("10-1-0-5.x:443", "10-1-0-5.x", 443),
]


@pytest.mark.parametrize(("text", "where", "port"), TARGETS)
def test_targets(text: str, where: IPv4Address | IPv6Address | str, port: int) -> None:
    assert decode_target(text) == (where, port)
    assert encode_target(where, port) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "10.1.0.5",
        "10.1.0.5:",
        "10.1.0.5:0",
        "10.1.0.5:65536",
        "10.1.0.5:080",
        "10.1.0.5:+80",
        "10.1.0.5: 80",
        "10.1.0.5:８０",  # full-width digits, which int() would take
        "010.1.0.5:80",
        "10.1.5:80",
        "0x0a.1.0.5:80",
        "2130706433:80",
        "fd00::5:80",
        "[10.1.0.5]:80",
        "[fd00::5]",
        "[fd00:0::5]:80",
        "[FD00::5]:80",
        "[::ffff:10.1.0.5]:80",
        "[fe80::1%eth0]:80",
        "orders:80",
        "Orders.shop:80",
        "orders.shop.:80",
        ".orders.shop:80",
        "orders..shop:80",
        "_orders.shop:80",
        "orders.shop:80:80",
        "orders.shop/x:80",
        "orders.10:80",
        "a" * 64 + ".b:80",
        "a." * 127 + "b:80",
        "x" * 5000,
    ],
)
def test_invalid_targets(text: str) -> None:
    with pytest.raises(PreambleError) as refused:
        decode_target(text)
    assert refused.value.reason is Reason.PROTOCOL_ERROR


@pytest.mark.parametrize(
    ("where", "port"),
    [
        ("orders", 80),
        ("10.1.0.5", 80),
        ("orders.shop:80", 80),
        ("orders.shop", 0),
        (ip_address("10.1.0.5"), 65536),
        (ip_address("::ffff:10.1.0.5"), 80),
        (ip_address("fe80::1%eth0"), 80),
    ],
)
def test_targets_that_cannot_be_written(where: IPv4Address | IPv6Address | str, port: int) -> None:
    with pytest.raises(PreambleError):
        encode_target(where, port)


@given(st.text(max_size=30))
def test_a_target_has_one_spelling(text: str) -> None:
    try:
        where, port = decode_target(text)
    except PreambleError:
        return
    assert encode_target(where, port) == text


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_key_file(end: str) -> None:
    assert parse_key("00ff" * 16 + end) == b"\x00\xff" * 16
    assert parse_key("00FF" * 16 + end) == b"\x00\xff" * 16


@pytest.mark.parametrize(
    "text", ["", "00" * 31, "00" * 33, "0" * 63 + "g", " " + "0" * 63, "00" * 32 + "\n\n", "0" * 62 + "_0", "٠" * 64]
)
def test_not_a_key_file(text: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits") as refused:
        parse_key(text)
    assert text.strip() == "" or text not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "first"),
    [
        (b"", FirstBytes.NEED_MORE),
        (b"\x16", FirstBytes.NEED_MORE),
        (b"\x16\x03", FirstBytes.TLS),
        (b"\x16\x03\x01\x02\x00", FirstBytes.TLS),
        (b"\x16\x02", FirstBytes.UNKNOWN),
        (b"\r", FirstBytes.NEED_MORE),
        (SIGNATURE[:11], FirstBytes.NEED_MORE),
        (SIGNATURE, FirstBytes.PROXY),
        (SIGNATURE + b"\x21", FirstBytes.PROXY),
        (SIGNATURE[:11] + b"x", FirstBytes.UNKNOWN),
        (b"PROXY TCP4", FirstBytes.UNKNOWN),
        (b"GET /", FirstBytes.UNKNOWN),
        (b"\x00", FirstBytes.UNKNOWN),
    ],
)
def test_first_bytes(data: bytes, first: FirstBytes) -> None:
    assert classify_first_bytes(data) is first
    assert classify_first_bytes(bytearray(data)) is first
