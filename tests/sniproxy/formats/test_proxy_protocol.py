"""PROXY protocol: both versions are written and parsed as specified, strictly, in any pieces."""

import socket
import subprocess
from ipaddress import IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.formats.proxy_protocol import (
    MAX_HEADER,
    MAX_V1,
    SIGNATURE,
    TLV_AUTHORITY,
    TLV_CRC32C,
    Command,
    ProxyError,
    ProxyHeader,
    crc32c,
    parse,
    parse_any,
    parse_v1,
    read_length,
)

addresses = (st.ip_addresses(v=4) | st.ip_addresses(v=6)).map(
    lambda address: str(address.ipv4_mapped or address) if isinstance(address, IPv6Address) else str(address)
)
endpoints = st.tuples(addresses, st.integers(0, 65535))
tlvs = st.lists(
    st.tuples(st.integers(0, 255).filter(lambda kind: kind != TLV_CRC32C), st.binary(max_size=60)), max_size=6
).map(tuple)
headers = st.builds(
    lambda source, destination, tlvs: ProxyHeader(source=source, destination=destination, tlvs=tlvs),
    endpoints,
    endpoints,
    tlvs,
) | st.builds(lambda command, tlvs: ProxyHeader(command=command, tlvs=tlvs), st.sampled_from(Command), tlvs)


def raw(body: bytes, *, version: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    return SIGNATURE + bytes([version, family]) + (len(body) if length is None else length).to_bytes(2, "big") + body


IPV4 = bytes.fromhex("0a000001 0a000009 d431 01bb")


@given(headers, st.binary(max_size=20))
def test_what_is_written_is_what_is_read(header: ProxyHeader, behind: bytes) -> None:
    wire = header.pack()
    assert parse(wire + behind) == (header, len(wire))
    assert read_length(wire[:16]) == len(wire)


@given(headers)
def test_an_incomplete_header_is_no_header_yet(header: ProxyHeader) -> None:
    wire = header.pack()
    for end in range(len(wire)):
        assert parse(wire[:end]) is None
        assert read_length(wire[:end]) == (None if end < 16 else len(wire))


def test_bytes() -> None:
    header = ProxyHeader(source=("10.0.0.1", 54321), destination=("10.0.0.9", 443), tlvs=((TLV_AUTHORITY, b"a.b"),))
    assert header.pack() == raw(IPV4 + bytes.fromhex("020003") + b"a.b")
    header = ProxyHeader(source=("fd00::1", 1), destination=("fd00::2", 2))
    wire = raw(IPv6Address("fd00::1").packed + IPv6Address("fd00::2").packed + bytes.fromhex("00010002"), family=0x21)
    assert header.pack() == wire
    assert ProxyHeader(command=Command.LOCAL).pack() == raw(b"", version=0x20, family=0)


def test_ipv4_mapped_addresses_are_written_as_ipv4() -> None:
    mapped = ProxyHeader(source=("::ffff:10.0.0.1", 54321), destination=("::ffff:10.0.0.9", 443))
    assert mapped.pack() == raw(IPV4)
    assert parse(mapped.pack()) == (ProxyHeader(source=("10.0.0.1", 54321), destination=("10.0.0.9", 443)), 28)


def test_mixed_families_meet_in_ipv6() -> None:
    header = ProxyHeader(source=("10.0.0.1", 1), destination=("fd00::2", 2))
    wire = header.pack()
    assert wire[13] == 0x21
    assert wire[16:32] == IPv6Address("::ffff:10.0.0.1").packed
    assert parse(wire) == (header, 52)


def test_the_zone_of_an_address_is_dropped() -> None:
    parsed = parse(ProxyHeader(source=("fe80::1%eth0", 1), destination=("fe80::2%2", 2)).pack())
    assert parsed is not None
    assert parsed[0].source == ("fe80::1", 1)


@pytest.mark.parametrize("family", [0x00, 0x11])
def test_addresses_of_local_are_skipped(family: int) -> None:
    body = (IPV4 if family else b"") + bytes.fromhex("e00001") + b"a"
    assert parse(raw(body, version=0x20, family=family)) == (
        ProxyHeader(command=Command.LOCAL, tlvs=((0xE0, b"a"),)),
        16 + len(body),
    )


def test_an_unknown_source_is_none() -> None:
    assert parse(raw(b"", family=0)) == (ProxyHeader(), 16)


@pytest.mark.parametrize(
    "wire",
    [
        b"GET / HTTP/1.1\r\n",
        b"PROXY TCP4 10.0.0.1 10.0.0.9 54321 443\r\n",
        SIGNATURE[:-1] + b"\r",
        raw(IPV4, version=0x11),
        raw(IPV4, version=0x22),
        raw(IPV4, version=0x31),
        raw(IPV4, family=0x12),
        raw(bytes(36), family=0x22),
        raw(bytes(216), family=0x31),
        raw(IPV4, family=0x10),
        raw(IPV4[:-1]),
        raw(IPV4, family=0x21),
        raw(IPV4 + b"\x02"),
        raw(IPV4 + b"\x02\x00"),
        raw(IPV4 + b"\x02\x00\x01"),
        raw(IPV4 + b"\x02\x00\x01a\x05"),
        raw(IPV4 + b"\x02\xff\xffa"),
        raw(IPV4 + b"\x03\x00\x03abc"),
        raw(IPV4 + b"\x03\x00\x04abcd"),
        raw(b"", length=1009),
        raw(b"", length=0xFFFF),
    ],
)
def test_refused(wire: bytes) -> None:
    with pytest.raises(ProxyError):
        parse(wire)


@pytest.mark.parametrize(
    ("wire", "shown_by"),
    [
        (b"GET /", 1),
        (SIGNATURE[:5] + b"X", 6),
        (raw(IPV4, version=0x11), 13),
        (raw(b"", length=0xFFFF), 16),
        (raw(b"", length=30, family=0x31), 16),
        (raw(b"", length=11), 16),
    ],
)
def test_refused_as_soon_as_it_shows(wire: bytes, shown_by: int) -> None:
    assert parse(wire[: shown_by - 1]) is None
    with pytest.raises(ProxyError):
        parse(wire[:shown_by])


@pytest.mark.parametrize(
    "header",
    [
        ProxyHeader(source=("a.example", 1), destination=("10.0.0.1", 2)),
        ProxyHeader(source=("10.0.0.1", 65536), destination=("10.0.0.1", 2)),
        ProxyHeader(source=("10.0.0.1", 1), destination=("10.0.0.1", -2)),
        ProxyHeader(tlvs=((256, b""),)),
        ProxyHeader(tlvs=((-1, b""),)),
        ProxyHeader(tlvs=((2, bytes(65536)),)),
        ProxyHeader(tlvs=((2, bytes(MAX_HEADER - 16 - 3 + 1)),)),
    ],
)
def test_what_cannot_be_written(header: ProxyHeader) -> None:
    with pytest.raises(ProxyError):
        header.pack()


def test_the_limit_of_a_header_is_a_parameter() -> None:
    header = ProxyHeader(tlvs=((2, bytes(MAX_HEADER - 16 - 3)),))
    assert len(header.pack()) == MAX_HEADER
    assert parse(header.pack()) == (header, MAX_HEADER)
    with pytest.raises(ProxyError):
        parse(header.pack(), max_size=MAX_HEADER - 1)
    with pytest.raises(ProxyError):
        header.pack(max_size=MAX_HEADER - 1)
    large = ProxyHeader(tlvs=((2, bytes(65535 - 3)),))
    assert parse(large.pack(max_size=1 << 17), max_size=1 << 17) == (large, 16 + 65535)
    with pytest.raises(ProxyError):
        ProxyHeader(tlvs=((2, bytes(65535 - 2)),)).pack(max_size=1 << 17)


def with_checksum(before: bytes, behind: bytes) -> bytes:
    zeroed = raw(IPV4 + before + bytes.fromhex("03000400000000") + behind)
    at = 16 + len(IPV4) + len(before) + 3
    return zeroed[:at] + crc32c(zeroed).to_bytes(4, "big") + zeroed[at + 4 :]


@given(st.integers(0, 215))
def test_a_checksum_is_verified(flipped: int) -> None:
    wire = with_checksum(bytes.fromhex("020001") + b"a", bytes.fromhex("e00001") + b"b")
    parsed = parse(wire)
    assert parsed is not None
    assert [kind for kind, _ in parsed[0].tlvs] == [2, 3, 0xE0]
    at, bit = divmod(flipped, 8)
    at = 16 + at % (len(wire) - 16)  # anywhere in the addresses and TLVs
    broken = wire[:at] + bytes([wire[at] ^ 1 << bit]) + wire[at + 1 :]
    with pytest.raises(ProxyError):
        # A flipped type may turn the checksum into another TLV, or another TLV into one.
        if all(kind != TLV_CRC32C for kind, _ in (parse(broken) or parsed)[0].tlvs):
            raise ProxyError("no checksum to be wrong")


def test_one_checksum_at_most() -> None:
    wire = with_checksum(b"", b"")
    again = wire[28:]
    doubled = wire[:14] + (len(wire) - 16 + len(again)).to_bytes(2, "big") + wire[16:] + again
    with pytest.raises(ProxyError):
        parse(doubled)


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720 appendix B.4, which lists the bytes in the order they are sent
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc32c_vectors(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


@given(st.binary(max_size=80), st.integers(0, 16))
def test_garbage_raises_only_proxy_errors(tail: bytes, kept: int) -> None:
    try:
        parsed = parse(raw(IPV4)[:kept] + tail)
    except ProxyError:
        return
    if parsed is not None:
        assert parsed[1] <= kept + len(tail)


HAPROXY = """
global
    log stdout format raw local0 emerg
defaults
    mode tcp
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend f
    bind fd@{listener}
    default_backend b
backend b
    server s 127.0.0.1:{port} send-{version} proxy-v2-options crc32c,unique-id,authority
"""


@pytest.mark.interop
@pytest.mark.needs("haproxy")
@pytest.mark.parametrize("version", ["proxy", "proxy-v2"])
def test_reads_what_haproxy_writes(tmp_path: Path, version: str) -> None:
    """If there is a checksum, this module must find it right."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        config = tmp_path / "haproxy.cfg"
        config.write_text(HAPROXY.format(version=version, listener=listener.fileno(), port=server.getsockname()[1]))
        with subprocess.Popen(
            ["haproxy", "-db", "-f", str(config)], pass_fds=[listener.fileno()], stdout=subprocess.DEVNULL
        ) as haproxy:
            try:
                with socket.create_connection(listener.getsockname(), 10) as client:
                    client.sendall(b"hello")
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(10)
                        wire = b""
                        while (parsed := parse_any(wire) if wire else None) is None:
                            data = connection.recv(4096)
                            assert data
                            wire += data
                    expected = client.getsockname(), listener.getsockname()
            finally:
                haproxy.terminate()
                haproxy.wait(10)
    header, length = parsed
    assert (header.source, header.destination) == expected
    assert (TLV_CRC32C in dict(header.tlvs)) is (version == "proxy-v2")
    assert wire[length:] in (b"hello", b"")


V1 = b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n"


@pytest.mark.parametrize(
    ("line", "source", "destination"),
    [
        (V1, ("192.0.2.1", 56324), ("198.51.100.7", 443)),
        (b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n", ("2001:db8::1", 1), ("2001:db8::2", 65535)),
        (b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 1 2\r\n", ("192.0.2.1", 1), ("2001:db8::2", 2)),
        (b"PROXY UNKNOWN\r\n", None, None),
        (b"PROXY UNKNOWN ffff:f...f ffff:f...f 65535 65535\r\n", None, None),
    ],
)
def test_version_1_is_read_in_any_pieces(line: bytes, source: object, destination: object) -> None:
    for size in range(1, len(line)):
        assert parse_any(line[:size]) is None
    for behind in (b"", b"\x16\x03\x01", b"\r\n"):
        parsed = parse_any(line + behind)
        assert parsed is not None
        assert (parsed[0].source, parsed[0].destination, parsed[1]) == (source, destination, len(line))


@given(endpoints, endpoints, st.binary(max_size=20))
def test_what_is_written_as_version_1_is_what_is_read(
    source: tuple[str, int], destination: tuple[str, int], behind: bytes
) -> None:
    header = ProxyHeader(source=source, destination=destination)
    line = header.pack_v1()
    assert len(line) <= MAX_V1
    assert parse_v1(line + behind) == (header, len(line))


@pytest.mark.parametrize(
    ("source", "destination", "line"),
    [
        (("192.0.2.1", 56324), ("198.51.100.7", 443), V1),
        (("::ffff:192.0.2.1", 56324), ("198.51.100.7", 443), V1),
        (("2001:db8::1", 1), ("2001:db8::2", 65535), b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n"),
        (("192.0.2.1", 1), ("2001:db8::2", 2), b"PROXY TCP6 ::ffff:c000:201 2001:db8::2 1 2\r\n"),
        (("2001:db8::1", 1), ("192.0.2.1", 2), b"PROXY TCP6 2001:db8::1 ::ffff:c000:201 1 2\r\n"),
        (None, None, b"PROXY UNKNOWN\r\n"),
    ],
)
def test_version_1_lines(source: tuple[str, int] | None, destination: tuple[str, int] | None, line: bytes) -> None:
    assert ProxyHeader(source=source, destination=destination).pack_v1() == line


def test_a_version_1_line_of_what_is_no_address_cannot_be_written() -> None:
    for source in (("relay.example", 1), ("192.0.2.1", 65536), ("192.0.2.1", -1)):
        with pytest.raises(ProxyError, match="not addresses and ports"):
            ProxyHeader(source=source, destination=("192.0.2.2", 1)).pack_v1()


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY\tTCP4 192.0.2.1 198.51.100.7 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 1\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 1 2 3\r\n",
        b"PROXY TCP4  192.0.2.1 198.51.100.7 1 2\r\n",
        b"PROXY UDP4 192.0.2.1 198.51.100.7 1 2\r\n",
        b"PROXY TCP4 2001:db8::1 198.51.100.7 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n",
        b"PROXY TCP4 192.0.2.01 198.51.100.7 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 01 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 1 65536\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 +1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 \xb2 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 1 2\n" + b" " * 107,
        b"PROXY " + b"A" * 101,
        b"POST / HTTP/1.1",
    ],
)
def test_what_is_no_version_1_header(line: bytes) -> None:
    with pytest.raises(ProxyError):
        parse_v1(line)


@given(st.binary(max_size=200))
def test_bytes_after_proxy_are_a_header_or_an_error(data: bytes) -> None:
    for start in (b"", b"PROXY ", b"PROXY TCP4 "):
        if start + data:
            try:
                parse_any(start + data)
            except ProxyError:
                pass
