"""PROXY protocol, versions 1 and 2: the header in front of a connection that names its client.

As specified by HAProxy (haproxy.org, doc/proxy-protocol.txt, section 2), for TCP over IPv4 and IPv6 only, and strictly: the lengths
of the TLVs must add up to the header exactly, and a checksum, if present, must be right. Layout:

    "PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\\r\\n"                                               version 1, 107 bytes at most
    signature(12) | version and command(1) | family(1) | length(2) | addresses(0, 12 or 36) | TLVs: type(1) length(2) value
"""

import enum
import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
PREFIX_SIZE: Final = 16
"""Bytes up to and including the length field."""
MAX_HEADER: Final = 1024
"""Default limit of a whole header: every TLV in use fits twice, and a peer cannot make us hold the 64 KiB that are possible."""

MAX_V1: Final = 107
"""Largest version 1 header with its CR LF, as the specification counts it."""

_V1_START: Final = b"PROXY "
_V1_VERSIONS: Final = {"TCP4": 4, "TCP6": 6}

TLV_AUTHORITY: Final = 0x02
TLV_CRC32C: Final = 0x03
TLV_UNIQUE_ID: Final = 0x05

Endpoint: TypeAlias = tuple[str, int]
"""Address as text, and port. An IPv4-mapped IPv6 address is written as IPv4."""

_PREFIX: Final = struct.Struct(">12sBBH")
_TLV: Final = struct.Struct(">BH")
_PORTS: Final = struct.Struct(">HH")
_UNSPEC, _TCP4, _TCP6 = 0x00, 0x11, 0x21
_ADDRESS_SIZE: Final = {_UNSPEC: 0, _TCP4: 4, _TCP6: 16}


class Command(enum.IntEnum):
    """Who the connection belongs to."""

    LOCAL = 0
    """The sender itself. The header has no addresses."""
    PROXY = 1
    """A client of the sender, whose addresses the header has."""


class ProxyError(ValueError):
    """Bytes that are not a header as described above, or a header that cannot be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyHeader:
    """One header. `source` and `destination` are both present or both None (LOCAL, or unknown to the sender)."""

    command: Command = Command.PROXY
    source: Endpoint | None = None
    destination: Endpoint | None = None
    tlvs: tuple[tuple[int, bytes], ...] = ()

    def pack(self, *, max_size: int = MAX_HEADER) -> bytes:
        """Return the header in version 2.

        If only one of the addresses is IPv4, it is written as IPv4-mapped. Raises ProxyError if an address or port is invalid, or
        the header would be longer than `max_size` bytes.
        """
        family, addresses = _UNSPEC, b""
        if self.command is Command.PROXY and self.source is not None and self.destination is not None:
            family, addresses = _pack_addresses(self.source, self.destination)
        parts = [addresses]
        for kind, value in self.tlvs:
            if not 0 <= kind <= 0xFF or len(value) > 0xFFFF:
                raise ProxyError(f"TLV {kind:#x} of {len(value)} bytes does not fit its fields")
            parts += (_TLV.pack(kind, len(value)), value)
        body = b"".join(parts)
        if PREFIX_SIZE + len(body) > min(max_size, PREFIX_SIZE + 0xFFFF):
            raise ProxyError(f"a header of {PREFIX_SIZE + len(body)} bytes is over {max_size}")
        return _PREFIX.pack(SIGNATURE, 0x20 | self.command, family, len(body)) + body

    def packed(self, version: int | None) -> bytes:
        """Return the header in this version, or b"" for None. Raises ProxyError as `pack`."""
        if version is None:
            return b""
        return self.pack_v1() if version == 1 else self.pack()

    def pack_v1(self) -> bytes:
        """Return the header in version 1, a line without commands and TLVs.

        If only one of the addresses is IPv4, it is written as IPv4-mapped, because a line has one family. Without addresses the
        line says UNKNOWN. Raises ProxyError if an address or port is invalid.
        """
        if self.source is None or self.destination is None:
            return b"PROXY UNKNOWN\r\n"
        family, packed = _pack_addresses(self.source, self.destination)
        size = _ADDRESS_SIZE[family]
        source, destination = (_spelled(packed[at : at + size]) for at in (0, size))
        word = "TCP4" if family == _TCP4 else "TCP6"
        return f"PROXY {word} {source} {destination} {self.source[1]} {self.destination[1]}\r\n".encode()


def read_length(data: bytes | bytearray | memoryview, *, max_size: int = MAX_HEADER) -> int | None:
    """Return the length of the header that `data` begins with, None while its first 16 bytes are incomplete.

    Raises ProxyError as soon as it cannot be a header, or is longer than `max_size` bytes.
    """
    if bytes(data[:12]) != SIGNATURE[: len(data)]:
        raise ProxyError("no PROXY v2 signature")
    if len(data) > 12 and data[12] not in (0x20, 0x21):
        raise ProxyError(f"PROXY version and command {data[12]:#04x}")
    if len(data) < PREFIX_SIZE:
        return None
    length = PREFIX_SIZE + int.from_bytes(data[14:16], "big")
    if length > max_size:
        raise ProxyError(f"a header of {length} bytes is over {max_size}")
    return length


def parse(data: bytes, *, max_size: int = MAX_HEADER) -> tuple[ProxyHeader, int] | None:
    """Return the version 2 header that `data` begins with and its length, None if more bytes are needed.

    The addresses of a LOCAL header are skipped, as the specification demands. Raises ProxyError as soon as it cannot be a header
    for TCP, or is longer than `max_size` bytes.
    """
    length = read_length(data, max_size=max_size)
    if length is None:
        return None
    family = data[13]
    size = _ADDRESS_SIZE.get(family)
    if size is None:
        raise ProxyError(f"PROXY address family and protocol {family:#04x} are not TCP")
    at = PREFIX_SIZE
    tlvs_at = at + 2 * size + (_PORTS.size if size else 0)
    if tlvs_at > length:
        raise ProxyError(f"a header of {length} bytes is too short for its addresses")
    if len(data) < length:
        return None
    command = Command(data[12] & 0x0F)
    source = destination = None
    if size and command is Command.PROXY:
        source_port, destination_port = _PORTS.unpack_from(data, at + 2 * size)
        source = _text(data[at : at + size]), source_port
        destination = _text(data[at + size : at + 2 * size]), destination_port
    tlvs = tuple(_tlvs(data, tlvs_at, length))
    return ProxyHeader(command=command, source=source, destination=destination, tlvs=tlvs), length


def parse_any(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Return the header of either version that `data` begins with and its length, None if more bytes are needed.

    A header from a sender that does not know its client (UNKNOWN, UNSPEC) has no addresses. Raises ProxyError as soon as it cannot
    be a header for TCP.
    """
    return parse_v1(data) if data[:1] == b"P" else parse(data)


def parse_v1(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Return the version 1 header that `data` begins with and its length, None if more bytes are needed (section 2.1).

    Raises ProxyError as soon as it cannot be a header.
    """
    if data[: len(_V1_START)] != _V1_START[: len(data)]:
        raise ProxyError("no PROXY v1 header")
    end = data.find(b"\r\n", 0, MAX_V1)
    if end < 0:
        if len(data) >= MAX_V1:
            raise ProxyError(f"a PROXY v1 header is longer than {MAX_V1} bytes")
        return None
    words = data[:end].decode("latin-1").split(" ")
    if words[1:2] == ["UNKNOWN"]:
        return ProxyHeader(), end + 2  # the rest of the line is to be ignored
    if len(words) != 6 or words[1] not in _V1_VERSIONS:
        raise ProxyError("a PROXY v1 header has TCP4 or TCP6, two addresses and two ports")
    source, destination = (_v1_endpoint(words[at], words[at + 2], _V1_VERSIONS[words[1]]) for at in (2, 3))
    return ProxyHeader(source=source, destination=destination), end + 2


def _v1_endpoint(host: str, port: str, version: int) -> Endpoint:
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise ProxyError("not an IP address in a PROXY v1 header") from error
    plain = port.isascii() and port.isdigit() and len(port) <= 5 and str(int(port)) == port
    if address.version != version or "%" in host or not plain or int(port) > 0xFFFF:
        raise ProxyError("an address or port in a PROXY v1 header is not what it says")
    return str(_address(host)), int(port)


def _tlvs(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    checked = False
    while at < end:
        if end - at < _TLV.size:
            raise ProxyError("the header ends inside a TLV")
        kind, size = _TLV.unpack_from(data, at)
        at += _TLV.size
        if size > end - at:
            raise ProxyError(f"TLV {kind:#x} is longer than the header")
        if kind == TLV_CRC32C:
            if checked or size != 4:
                raise ProxyError("a checksum TLV is four bytes and there is one at most")
            checked = True
            if crc32c(data[:at] + bytes(4) + data[at + 4 : end]) != int.from_bytes(data[at : at + 4], "big"):
                raise ProxyError("wrong checksum")
        yield kind, data[at : at + size]
        at += size


def _pack_addresses(source: Endpoint, destination: Endpoint) -> tuple[int, bytes]:
    try:
        addresses = [_address(source[0]), _address(destination[0])]
        ports = _PORTS.pack(source[1], destination[1])
    except (ValueError, struct.error) as error:
        raise ProxyError(f"not addresses and ports: {source}, {destination}") from error
    if all(address.version == 4 for address in addresses):
        return _TCP4, addresses[0].packed + addresses[1].packed + ports
    packed = [bytes(10) + b"\xff\xff" + a.packed if a.version == 4 else a.packed for a in addresses]
    return _TCP6, packed[0] + packed[1] + ports


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address
    return address


def _spelled(packed: bytes) -> str:
    """Write an address in hexadecimal groups only: version 1 has no IPv6 addresses that end in dotted decimal."""
    if packed[:12] == bytes(10) + b"\xff\xff":
        return f"::ffff:{int.from_bytes(packed[12:14], 'big'):x}:{int.from_bytes(packed[14:], 'big'):x}"
    return str(ipaddress.ip_address(packed))


def _text(packed: bytes) -> str:
    if packed[:12] == bytes(10) + b"\xff\xff":
        packed = packed[12:]
    return str(ipaddress.ip_address(packed))


def _make_table() -> tuple[int, ...]:
    table = []
    for index in range(256):
        value = index
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE: Final = _make_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720 appendix B.4) of `data`."""
    value = 0xFFFF_FFFF
    for byte in data:
        value = value >> 8 ^ _CRC_TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFF_FFFF
