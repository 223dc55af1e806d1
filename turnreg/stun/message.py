"""STUN messages (RFC 8489) with the methods and attributes of TURN (RFC 8656) and TURN over TCP (RFC 6062).

A `Message` is a value: `Message.parse()` makes one from bytes that a peer sent, `pack()` returns its bytes. Input is hostile: every
error in it is a `StunError`, raised by `parse()` for the structure, and by the accessor of an attribute for its value.

MESSAGE-INTEGRITY and FINGERPRINT are not in a message's attributes, since they are about the bytes and not about the request.
`pack()` adds them; `parse()` checks FINGERPRINT and keeps what MESSAGE-INTEGRITY covers for `verify_integrity()`. aioice has
helpers for both and for XOR addresses, but importing them imports asyncio and all of ICE (110 ms), which a sans-IO module must not
do; the tests compare with them instead.
"""

import hashlib
import hmac
import struct
import zlib
from collections.abc import Container
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Self

import msgspec

MAGIC_COOKIE = 0x2112A442
HEADER_BYTES = 20
TRANSACTION_ID_BYTES = 12

MAX_MESSAGE_BYTES = 2048
"""Longest message that we read or write; real ones are below 300 bytes. (An Allocate with every text attribute at its limit would
have 513 + 3 x 763 bytes of text.) Only Send and Data indications are longer, see MAX_INDICATION_BYTES."""

MAX_DATAGRAM_BYTES = 65_507
"""The most that UDP carries over IPv4: 65,535 less 20 bytes of IP and 8 of UDP header."""
MAX_INDICATION_BYTES = 65_535
"""Longest Send or Data indication: what the 16-bit length of a datagram allows; over UDP itself less fits."""

MAX_USERNAME_BYTES = 513
"""RFC 5389 allowed fewer than 513 bytes, RFC 8489, section 14.3, allows fewer than 509; we accept both."""
MAX_TEXT_BYTES = 763
"""REALM, NONCE and SOFTWARE: fewer than 128 characters, at most 763 bytes (RFC 8489, sections 14.9, 14.10, 14.14)."""
MAX_REASON_CHARACTERS = 200
"""How much of a peer's reason phrase is kept. It is only logged; other texts from peers have the same limit (REFUSED too)."""

TRANSPORT_TCP = 6
TRANSPORT_UDP = 17
FAMILY_IPV4 = 1
FAMILY_IPV6 = 2

_HEADER = struct.Struct("!HHI12s")
_ATTRIBUTE = struct.Struct("!HH")
_INTEGRITY_BYTES = 20
_FINGERPRINT_XOR = 0x5354554E


class StunError(ValueError):
    """A peer sent invalid STUN. The text says why and is safe to log."""


class Method(IntEnum):
    """The methods that we know. A message may carry another, as a plain int."""

    BINDING = 0x001
    ALLOCATE = 0x003
    REFRESH = 0x004
    SEND = 0x006
    DATA = 0x007
    CREATE_PERMISSION = 0x008
    CHANNEL_BIND = 0x009
    CONNECT = 0x00A
    CONNECTION_BIND = 0x00B
    CONNECTION_ATTEMPT = 0x00C


class MessageClass(IntEnum):
    """The two class bits, C1 C0 (RFC 8489, section 5)."""

    REQUEST = 0
    INDICATION = 1
    SUCCESS = 2
    ERROR = 3


class Attribute(IntEnum):
    """The attribute types that we read or write. A receiver must reject a request with an unknown type below 0x8000."""

    MAPPED_ADDRESS = 0x0001
    USERNAME = 0x0006
    MESSAGE_INTEGRITY = 0x0008
    ERROR_CODE = 0x0009
    UNKNOWN_ATTRIBUTES = 0x000A
    CHANNEL_NUMBER = 0x000C
    LIFETIME = 0x000D
    XOR_PEER_ADDRESS = 0x0012
    DATA = 0x0013
    REALM = 0x0014
    NONCE = 0x0015
    XOR_RELAYED_ADDRESS = 0x0016
    REQUESTED_ADDRESS_FAMILY = 0x0017
    EVEN_PORT = 0x0018
    REQUESTED_TRANSPORT = 0x0019
    DONT_FRAGMENT = 0x001A
    MESSAGE_INTEGRITY_SHA256 = 0x001C
    XOR_MAPPED_ADDRESS = 0x0020
    RESERVATION_TOKEN = 0x0022
    CONNECTION_ID = 0x002A
    ADDITIONAL_ADDRESS_FAMILY = 0x8000
    SOFTWARE = 0x8022
    ALTERNATE_SERVER = 0x8023
    FINGERPRINT = 0x8028


_METHODS: dict[int, int] = {method.value: method for method in Method}
_TEXT_LIMITS = {
    Attribute.USERNAME: MAX_USERNAME_BYTES,
    Attribute.REALM: MAX_TEXT_BYTES,
    Attribute.NONCE: MAX_TEXT_BYTES,
    Attribute.SOFTWARE: MAX_TEXT_BYTES,
}


class Message(msgspec.Struct, frozen=True):
    """One STUN message. The `with_…` methods return a copy with one more attribute and can be chained.

    If an attribute occurs more than once, the first one is used (RFC 8489, section 14), except in `xor_addresses()`.

    It is a Struct because building one takes a fifth of the time of a frozen dataclass, and an answer builds five.
    """

    method: int
    message_class: MessageClass
    transaction_id: bytes
    """12 bytes; a client takes them from `secrets`."""
    attributes: tuple[tuple[int, bytes], ...] = ()
    """Type and value in wire order, without MESSAGE-INTEGRITY and FINGERPRINT."""
    has_fingerprint: bool = False
    """The parsed bytes had a correct FINGERPRINT, so the answer should have one too."""
    _covered: bytes | None = None
    """The bytes that MESSAGE-INTEGRITY covers, with the length field that it was computed with."""
    _integrity: bytes = b""

    # -- reading

    @classmethod
    def parse(cls, data: bytes, limit: int = MAX_MESSAGE_BYTES) -> Self:
        """Parse one whole message of at most `limit` bytes. Raises StunError.

        Attributes after MESSAGE-INTEGRITY, other than FINGERPRINT, are ignored, since they are not authenticated (RFC 8489,
        section 14.5). A FINGERPRINT must be the last attribute and match.
        """
        if len(data) < HEADER_BYTES:
            raise StunError(f"a message of {len(data)} bytes is shorter than the header")
        if frame_length(data, limit) != len(data):
            raise StunError("the length in the header is not the length of the message")
        message_type, _, _, transaction_id = _HEADER.unpack_from(data)
        attributes: list[tuple[int, bytes]] = []
        covered: bytes | None = None
        integrity = b""
        has_fingerprint = False
        at = HEADER_BYTES
        while at < len(data):
            if has_fingerprint:
                raise StunError("FINGERPRINT is not the last attribute")
            kind, length = _ATTRIBUTE.unpack_from(data, at)  # within bounds: all lengths are multiples of four
            start, end = at + 4, at + 4 + length
            if end > len(data):
                raise StunError(f"attribute {kind:#06x} runs over the end of the message")
            if kind == Attribute.FINGERPRINT:
                if data[start:end] != _fingerprint(data[:at]):
                    raise StunError("FINGERPRINT does not match")
                has_fingerprint = True
            elif covered is not None:
                pass
            elif kind == Attribute.MESSAGE_INTEGRITY:
                if length != _INTEGRITY_BYTES:
                    raise StunError(f"MESSAGE-INTEGRITY has {length} bytes, not {_INTEGRITY_BYTES}")
                integrity = data[start:end]
                covered = _with_length(data[:at], end - HEADER_BYTES)
            else:
                attributes.append((kind, data[start:end]))
            at = end + -length % 4
        method, message_class = _split_type(message_type)
        return cls(method, message_class, transaction_id, tuple(attributes), has_fingerprint, covered, integrity)

    @property
    def has_integrity(self) -> bool:
        """Whether the parsed bytes had a MESSAGE-INTEGRITY."""
        return self._covered is not None

    def verify_integrity(self, key: bytes) -> bool:
        """Tell whether there is a MESSAGE-INTEGRITY made with `key`. Compares in constant time."""
        if self._covered is None:
            return False
        return hmac.compare_digest(_integrity(self._covered, key), self._integrity)

    def get(self, attribute: int) -> bytes | None:
        """Return the value of the first attribute of that type, None if absent."""
        for kind, value in self.attributes:
            if kind == attribute:
                return value
        return None

    def text(self, attribute: Attribute) -> str | None:
        """Return the value as text, None if absent. It comes from the peer: escape it before logging. Raises StunError."""
        value = self.get(attribute)
        if value is None:
            return None
        if len(value) > _TEXT_LIMITS.get(attribute, MAX_TEXT_BYTES):
            raise StunError(f"{attribute.name} of {len(value)} bytes is too long")
        try:
            return value.decode()
        except UnicodeDecodeError as exc:
            raise StunError(f"{attribute.name} is not UTF-8") from exc

    def number(self, attribute: int) -> int | None:
        """Return the value of a 32-bit attribute (LIFETIME in seconds), None if absent. Raises StunError."""
        value = self.get(attribute)
        if value is None:
            return None
        if len(value) != 4:
            raise StunError(f"attribute {attribute:#06x} has {len(value)} bytes, not 4")
        return int.from_bytes(value, "big")

    def first_byte(self, attribute: int) -> int | None:
        """Return the value of an attribute with one byte and three reserved ones, None if absent. Raises StunError.

        REQUESTED-TRANSPORT and REQUESTED-ADDRESS-FAMILY have this format.
        """
        value = self.number(attribute)
        return None if value is None else value >> 24

    def xor_address(self, attribute: int) -> tuple[str, int] | None:
        """Return address and port of a XOR-…-ADDRESS attribute, None if absent. Raises StunError."""
        value = self.get(attribute)
        return None if value is None else _unpack_xor_address(value, self.transaction_id)

    def xor_addresses(self, attribute: int) -> tuple[tuple[str, int], ...]:
        """Return all of them, in order: CreatePermission may have several (RFC 8656, section 10.1). Raises StunError."""
        return tuple(
            _unpack_xor_address(value, self.transaction_id) for kind, value in self.attributes if kind == attribute
        )

    @property
    def error(self) -> tuple[int, str] | None:
        """Code and reason of ERROR-CODE, None if absent. Raises StunError.

        The reason is safe to log: coturn's trailing NULs are removed, it is cut to MAX_REASON_CHARACTERS, and characters that are
        not printable are escaped.
        """
        value = self.get(Attribute.ERROR_CODE)
        if value is None:
            return None
        if len(value) < 4 or not 3 <= value[2] & 7 <= 6 or value[3] > 99:
            raise StunError("ERROR-CODE is malformed")
        reason = value[4:].rstrip(b"\0").decode(errors="backslashreplace")[:MAX_REASON_CHARACTERS]
        printable = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in reason)
        return (value[2] & 7) * 100 + value[3], printable

    def not_understood(self, known: Container[int]) -> tuple[int, ...]:
        """Return the attribute types, each once, that must be understood (below 0x8000) and are not in `known`, for a 420."""
        return tuple(dict.fromkeys(kind for kind, _ in self.attributes if kind < 0x8000 and kind not in known))

    # -- writing

    def with_bytes(self, attribute: int, value: bytes) -> Self:
        """Add an attribute whose value is `value`."""
        return type(self)(
            self.method,
            self.message_class,
            self.transaction_id,
            (*self.attributes, (int(attribute), value)),
            self.has_fingerprint,
            self._covered,
            self._integrity,
        )

    def with_text(self, attribute: int, value: str) -> Self:
        """Add a text attribute: USERNAME, REALM, NONCE, SOFTWARE."""
        return self.with_bytes(attribute, value.encode())

    def with_number(self, attribute: int, value: int) -> Self:
        """Add a 32-bit attribute, such as LIFETIME in seconds."""
        return self.with_bytes(attribute, value.to_bytes(4, "big"))

    def with_first_byte(self, attribute: int, value: int) -> Self:
        """Add an attribute of one byte and three reserved ones: REQUESTED-TRANSPORT, REQUESTED-ADDRESS-FAMILY."""
        return self.with_bytes(attribute, bytes((value, 0, 0, 0)))

    def with_xor_address(self, attribute: int, address: tuple[str, int]) -> Self:
        """Add a XOR-…-ADDRESS attribute. The address is an IP literal; ValueError if it is not."""
        return self.with_bytes(attribute, _pack_xor_address(address, self.transaction_id))

    def success(self) -> Self:
        """Return the empty success answer to this request."""
        return type(self)(self.method, MessageClass.SUCCESS, self.transaction_id)

    def refused(self, code: int, reason: str) -> Self:
        """Return the error answer to this request. `code` is 300 to 699."""
        answer = type(self)(self.method, MessageClass.ERROR, self.transaction_id)
        return answer.with_bytes(Attribute.ERROR_CODE, bytes((0, 0, code // 100, code % 100)) + reason.encode())

    def pack(self, *, integrity_key: bytes | None = None, fingerprint: bool = False) -> bytes:
        """Return the bytes, signed if there is a key, with a FINGERPRINT if requested. Raises StunError if too long."""
        parts: list[bytes] = []
        for kind, value in self.attributes:
            parts += (_ATTRIBUTE.pack(kind, len(value)), value, bytes(-len(value) % 4))
        body = b"".join(parts)
        size = len(body) + (24 if integrity_key is not None else 0) + (8 if fingerprint else 0)
        limit = MAX_INDICATION_BYTES if self.message_class == MessageClass.INDICATION else MAX_MESSAGE_BYTES
        if HEADER_BYTES + size > limit:
            raise StunError(f"a message of {HEADER_BYTES + size} bytes is longer than {limit}")
        data = _HEADER.pack(_join_type(self.method, self.message_class), len(body), MAGIC_COOKIE, self.transaction_id)
        data += body
        if integrity_key is not None:
            data = _with_length(data, len(data) - HEADER_BYTES + 24)
            data += _ATTRIBUTE.pack(Attribute.MESSAGE_INTEGRITY, _INTEGRITY_BYTES) + _integrity(data, integrity_key)
        if fingerprint:
            value = _fingerprint(data)
            data = _with_length(data, len(data) - HEADER_BYTES + 8)
            data += _ATTRIBUTE.pack(Attribute.FINGERPRINT, len(value)) + value
        return data


def data_indication(peer: tuple[str, int], data: bytes, transaction_id: bytes, *, fingerprint: bool = False) -> bytes:
    """Return the Data indication with a peer's datagram for a client (RFC 8656, section 11.3).

    It is packed without a Message, for speed: every datagram needs one. Raises StunError if it would be too long.
    """
    address = _pack_xor_address(peer, transaction_id)
    body = b"".join(
        (
            _ATTRIBUTE.pack(Attribute.XOR_PEER_ADDRESS, len(address)),
            address,
            _ATTRIBUTE.pack(Attribute.DATA, len(data)),
            data,
            bytes(-len(data) % 4),
        )
    )
    if HEADER_BYTES + len(body) + 8 > MAX_INDICATION_BYTES:
        raise StunError(f"a datagram of {len(data)} bytes does not fit into an indication")
    kind = _join_type(Method.DATA, MessageClass.INDICATION)
    packed = _HEADER.pack(kind, len(body), MAGIC_COOKIE, transaction_id) + body
    if fingerprint:
        value = _fingerprint(packed)
        packed = _with_length(packed, len(packed) - HEADER_BYTES + 8)
        packed += _ATTRIBUTE.pack(Attribute.FINGERPRINT, len(value)) + value
    return packed


def frame_length(prefix: bytes, limit: int = MAX_MESSAGE_BYTES) -> int | None:
    """Return the length in bytes, header included, of the message that starts with `prefix`, None if `prefix` is too short.

    Raises StunError as soon as the bytes cannot be the start of a STUN message of at most `limit` bytes: call it before buffering
    more. The first four bytes give the length; the cookie is checked once there are eight.
    """
    if prefix and prefix[0] & 0xC0:
        raise StunError("not STUN: the first two bits are not zero")
    if len(prefix) < 4:
        return None
    length = int.from_bytes(prefix[2:4], "big")
    if length % 4:
        raise StunError("not STUN: the length is not a multiple of four")
    if HEADER_BYTES + length > limit:
        raise StunError(f"a message of {HEADER_BYTES + length} bytes is longer than {limit}")
    if len(prefix) >= 8 and int.from_bytes(prefix[4:8], "big") != MAGIC_COOKIE:
        raise StunError("not STUN: no magic cookie")
    return HEADER_BYTES + length


def _split_type(message_type: int) -> tuple[int, MessageClass]:
    """Separate method and class, whose bits are interleaved (RFC 8489, figure 3)."""
    method = (message_type & 0x000F) | (message_type & 0x00E0) >> 1 | (message_type & 0x3E00) >> 2
    message_class = MessageClass((message_type & 0x0010) >> 4 | (message_type & 0x0100) >> 7)
    return _METHODS.get(method, method), message_class


def _join_type(method: int, message_class: MessageClass) -> int:
    bits = (method & 0x000F) | (method & 0x0070) << 1 | (method & 0x0F80) << 2
    return bits | (message_class & 1) << 4 | (message_class & 2) << 7


def _with_length(data: bytes, length: int) -> bytes:
    return data[:2] + length.to_bytes(2, "big") + data[4:]


def _integrity(covered: bytes, key: bytes) -> bytes:
    return hmac.digest(key, covered, hashlib.sha1)


def _fingerprint(data: bytes) -> bytes:
    """Return the CRC-32 of everything before the attribute; the length field includes the attribute (RFC 8489, section 14.7)."""
    return (zlib.crc32(_with_length(data, len(data) - HEADER_BYTES + 8)) ^ _FINGERPRINT_XOR).to_bytes(4, "big")


def _pack_xor_address(address: tuple[str, int], transaction_id: bytes) -> bytes:
    packed = _packed(address[0])
    family = FAMILY_IPV4 if len(packed) == 4 else FAMILY_IPV6
    return struct.pack("!BBH", 0, family, address[1] ^ MAGIC_COOKIE >> 16) + _xor(packed, transaction_id)


@lru_cache(maxsize=1024)
def _packed(host: str) -> bytes:
    """Return the address as bytes. Cached: parsing an address costs more than the rest of an indication, and peers are few."""
    return ip_address(host).packed


def _unpack_xor_address(value: bytes, transaction_id: bytes) -> tuple[str, int]:
    host: IPv4Address | IPv6Address
    if len(value) == 8 and value[1] == FAMILY_IPV4:
        host = IPv4Address(_xor(value[4:], transaction_id))
    elif len(value) == 20 and value[1] == FAMILY_IPV6:
        host = IPv6Address(_xor(value[4:], transaction_id))
    else:
        raise StunError("an address attribute is malformed")
    return str(host), int.from_bytes(value[2:4], "big") ^ MAGIC_COOKIE >> 16


def _xor(address: bytes, transaction_id: bytes) -> bytes:
    pad = (MAGIC_COOKIE.to_bytes(4, "big") + transaction_id)[: len(address)]
    return (int.from_bytes(address, "big") ^ int.from_bytes(pad, "big")).to_bytes(len(address), "big")
