"""The preamble: the signed PROXY v2 header with which a relay opens a stream to a gateway (PROTOCOL.md, sections 2 and 3).

Only holders of the key for a direction between two networks can open streams in that direction. A TURN permission admits every
host behind one NAT, so this signature is the access control. The header names the network, the record and the target that it is
for, so it is useless anywhere else. It has a time and a stream id, so it is useless a second time. And it has the hash of the
ClientHello, so it is useless with another one.

TLVs, in addition to the client's address as source and the relay's as destination:

    0x02 AUTHORITY       the name that the client asked for         0xE4 target: ip:port, [v6]:port, service-name:port
    0x05 UNIQUE_ID       stream id, 16 bytes                        0xE5 framing version, 1 byte: 1
    0xE0 from-network    0xE7 to-network                            0xE9 SHA-256 of the ClientHello message; absent: no TLS
    0xE8 addressee: id of the allocation or gateway record          0xEA attempt, 1 byte, counted from 0
    0xE1 key id          0xE2 unix time in ms, 8 bytes              0xE3 HMAC-SHA256, 32 bytes, the last TLV
    0xEC epoch of the gateway process, 16 bytes (sniproxy.tunnel.epoch); absent: the relay is from before epochs

The HMAC covers the whole header from its first byte, with the 32 bytes of its own value zeroed. Each of these TLVs must be present
once (0xE9 and 0xEC may be absent). Other TLVs are ignored, but signed.

0xEB, at most once and with the value 1, marks a connection that continues a stream which is already open (its second connection).

0xED, at most once, is sent with an address name: the services that the relay's network imports from the gateway's, as patterns
separated by spaces. The gateway knows which service has the address, and refuses an address of any other service. Older gateways
ignore it.

0xEE, at most once: what the relay understands, as bits of the first byte. 0x01: HEARTBEAT (sniproxy.tunnel.heartbeat). It is
sent only if the gateway's record says that the gateway understands it too.

A warm connection, kept ready for a stream that OPEN will bring, begins with a LOCAL header, which has no client: 0xE0, 0xE1, 0xE2,
0xE5, 0xE7, 0xE8, 0xEC, 0xE3 as above, and a UNIQUE_ID of 16 random bytes, so that it is useless a second time too.
"""

import enum
import hashlib
import hmac
import re
from dataclasses import dataclass, field, replace
from typing import Final

from discovery.model.addresses import Address, BadAddress, format_endpoint, parse_endpoint, parse_port
from discovery.model.names import is_service_name
from sniproxy.formats import proxy_protocol
from sniproxy.formats.proxy_protocol import SIGNATURE, Command, Endpoint, ProxyError, ProxyHeader
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.epoch import EPOCH_SIZE

FRAMING_VERSION: Final = 1
STREAM_ID_SIZE: Final = 16
DIGEST_SIZE: Final = 32
KEY_SIZE: Final = 32

SIGNATURE_SIZE: Final = hashlib.sha256().digest_size


class Tlv(enum.IntEnum):
    """TLV types of the preamble."""

    AUTHORITY = proxy_protocol.TLV_AUTHORITY
    UNIQUE_ID = proxy_protocol.TLV_UNIQUE_ID
    FROM_NETWORK = 0xE0
    KEY_ID = 0xE1
    TIME = 0xE2
    SIGNATURE = 0xE3
    TARGET = 0xE4
    FRAMING = 0xE5
    TO_NETWORK = 0xE7
    ADDRESSEE = 0xE8
    HELLO_DIGEST = 0xE9
    ATTEMPT = 0xEA
    CONTINUES = 0xEB
    EPOCH = 0xEC


TLV_IMPORTS: Final = 0xED
TLV_FEATURES: Final = 0xEE
FEATURE_HEARTBEAT: Final = 0x01
UNDERSCORES: Final = "underscores/1"
"""In a record's `proto`: names of services, and so the patterns in IMPORTS, may have underscores inside a label."""
MAX_IMPORTS: Final = 300
"""In bytes: what is left of the 1,024 of a header if all other fields of version 0.1 have their greatest length."""
MAX_IMPORTS_SENT: Final = MAX_IMPORTS - 4
"""The same if FEATURES goes along."""


class PreambleError(ValueError):
    """A preamble that is refused, or that cannot be made. `detail` is for the log and contains no key.

    The reasons: protocol_error (not laid out as described above), no_key (key id unknown here, or for another pair of networks),
    bad_signature (the header or the ClientHello is not what was signed), clock_skew (its time is more than 60 s from ours),
    replay (meant for another network or record, or seen before), stale_epoch (signed for another process), overloaded (more
    streams than we can remember).
    """

    def __init__(self, reason: Reason, detail: str, *, told: tuple[Reason, str] | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.told = told or (reason, detail)
        """The reason and detail for the relay, which may differ from those for the log."""


class FirstBytes(enum.Enum):
    """The kind of the first bytes of a connection to a gateway."""

    TLS = enum.auto()
    PROXY = enum.auto()
    """A PROXY v2 header."""
    NEED_MORE = enum.auto()
    UNKNOWN = enum.auto()


_TLS_START: Final = b"\x16\x03"


def classify_first_bytes(data: bytes | bytearray) -> FirstBytes:
    """Return the kind of the first bytes of a connection; twelve bytes are always enough."""
    if data.startswith(_TLS_START):
        return FirstBytes.TLS
    if data.startswith(SIGNATURE):
        return FirstBytes.PROXY
    if _TLS_START.startswith(data) or SIGNATURE.startswith(data):
        return FirstBytes.NEED_MORE
    return FirstBytes.UNKNOWN


def read_length(data: bytes | bytearray) -> int | None:
    """Return the length of the whole header, None while its first 16 bytes are incomplete.

    Raises PreambleError (protocol_error) as soon as it cannot be a header, or is over 1,024 bytes.
    """
    try:
        return proxy_protocol.read_length(data)
    except ProxyError as error:
        raise PreambleError(Reason.PROTOCOL_ERROR, str(error)) from error


def parse_key(text: str) -> bytes:
    """Return the key in the text of a key file: 64 hexadecimal digits and an optional line end. ValueError if it is none."""
    digits = text.removesuffix("\n").removesuffix("\r")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digits):
        raise ValueError(f"expected {2 * KEY_SIZE} hexadecimal digits and nothing else")
    return bytes.fromhex(digits)


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """A shared secret for streams from one network to another, in this direction only."""

    id: str
    secret: bytes = field(repr=False)
    from_network: str
    to_network: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preamble:
    """The content of a preamble that opens a stream."""

    client: Endpoint
    local: Endpoint
    """The relay's address that the client connected to."""
    authority: str
    stream_id: bytes
    from_network: str
    to_network: str
    addressee: str
    """The id of the allocation or gateway record by which the gateway was reached."""
    key_id: str
    time_ms: int
    target: str
    """As written by `encode_target`."""
    hello_digest: bytes | None
    attempt: int = 0
    continues: bool = False
    """Whether the connection takes over a direction of an open stream instead of opening a stream."""
    epoch: bytes | None = None
    """The epoch of the gateway process that it is for. None: the relay is from before epochs."""
    imports: str | None = None
    """Patterns of the services whose addresses may be reached, separated by spaces. None: all services."""
    heartbeats: bool = False
    """Whether both sides understand HEARTBEAT."""

    @property
    def once(self) -> bytes:
        """The bytes that must not come a second time."""
        return self.stream_id + bytes([self.attempt]) + self.addressee.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmPreamble:
    """The content of a preamble that begins a warm connection."""

    nonce: bytes
    """16 random bytes, used once."""
    from_network: str
    to_network: str
    addressee: str
    """The id of the allocation or gateway record by which the gateway was reached."""
    key_id: str
    time_ms: int
    epoch: bytes | None = None
    """As for a stream."""

    @property
    def once(self) -> bytes:
        """The bytes that must not come a second time."""
        return b"warm" + self.nonce + self.addressee.encode()


def encode_target(where: Address | str, port: int) -> str:
    """Return the text of a target: an address or a service name, and a port. Raises PreambleError (protocol_error)."""
    text = f"{where}:{port}" if isinstance(where, str) else format_endpoint(where, port)
    if decode_target(text) != (where, port):
        raise _broken("a target is an address or a service name")
    return text


def decode_target(text: str) -> tuple[Address | str, int]:
    """Parse a target in canonical form: an address, or a service name as str, and the port.

    Raises PreambleError (protocol_error).
    """
    name, _, port = text.rpartition(":")
    try:
        if is_service_name(name):
            return name, parse_port(port)
        address, number = parse_endpoint(text)
    except BadAddress as error:
        raise _broken(f"target: {error}") from error
    if address.version == 6 and address.ipv4_mapped is not None:
        raise _broken("target: an IPv4-mapped address")
    if format_endpoint(address, number) != text:
        raise _broken(f"target: {text[:64]!r} is not how {format_endpoint(address, number)} is written")
    return address, number


def sign(preamble: Preamble | WarmPreamble, key: bytes) -> bytes:
    """Return the signed header. Raises PreambleError (protocol_error) if a field is invalid or the header is too long."""
    _check(preamble)
    tlvs: list[tuple[int, bytes]] = []
    if isinstance(preamble, WarmPreamble):
        header, unique = ProxyHeader(command=Command.LOCAL), preamble.nonce
    else:
        header, unique = ProxyHeader(source=preamble.client, destination=preamble.local), preamble.stream_id
        tlvs = [
            (Tlv.AUTHORITY, preamble.authority.encode()),
            (Tlv.TARGET, preamble.target.encode()),
            (Tlv.ATTEMPT, bytes([preamble.attempt])),
        ]
        if preamble.hello_digest is not None:
            tlvs.append((Tlv.HELLO_DIGEST, preamble.hello_digest))
        if preamble.continues:
            tlvs.append((Tlv.CONTINUES, b"\1"))
        if preamble.imports is not None:
            tlvs.append((TLV_IMPORTS, preamble.imports.encode()))
        if preamble.heartbeats:
            tlvs.append((TLV_FEATURES, bytes([FEATURE_HEARTBEAT])))
    if preamble.epoch is not None:
        tlvs.append((Tlv.EPOCH, preamble.epoch))
    tlvs += [
        (Tlv.UNIQUE_ID, unique),
        (Tlv.FROM_NETWORK, preamble.from_network.encode()),
        (Tlv.TO_NETWORK, preamble.to_network.encode()),
        (Tlv.ADDRESSEE, preamble.addressee.encode()),
        (Tlv.KEY_ID, preamble.key_id.encode()),
        (Tlv.TIME, preamble.time_ms.to_bytes(8, "big")),
        (Tlv.FRAMING, bytes([FRAMING_VERSION])),
        (Tlv.SIGNATURE, bytes(SIGNATURE_SIZE)),
    ]
    try:
        unsigned = replace(header, tlvs=tuple(tlvs)).pack()
    except ProxyError as error:
        raise PreambleError(Reason.PROTOCOL_ERROR, str(error)) from error
    return unsigned[:-SIGNATURE_SIZE] + signature(unsigned, key)


def signature(header: bytes, key: bytes) -> bytes:
    """Return the signature that a header must have, ignoring the one in it."""
    return hmac.digest(key, header[:-SIGNATURE_SIZE] + bytes(SIGNATURE_SIZE), "sha256")


def parse(header: bytes) -> Preamble | WarmPreamble:
    """Parse a complete header without verifying it. Raises PreambleError (protocol_error)."""
    try:
        parsed = proxy_protocol.parse(header)
    except ProxyError as error:
        raise PreambleError(Reason.PROTOCOL_ERROR, str(error)) from error
    if parsed is None or parsed[1] != len(header):
        raise _broken("not exactly one header")
    proxy = parsed[0]
    warm = proxy.command is Command.LOCAL
    values = _values(proxy, required=_WARM if warm else _STREAM, known=_WARM | {Tlv.EPOCH} if warm else _OURS)
    preamble: Preamble | WarmPreamble
    if warm:
        preamble = WarmPreamble(
            nonce=values[Tlv.UNIQUE_ID],
            from_network=_text(values[Tlv.FROM_NETWORK]),
            to_network=_text(values[Tlv.TO_NETWORK]),
            addressee=_text(values[Tlv.ADDRESSEE]),
            key_id=_text(values[Tlv.KEY_ID]),
            time_ms=int.from_bytes(values[Tlv.TIME], "big"),
            epoch=values.get(Tlv.EPOCH),
        )
    elif proxy.source is None or proxy.destination is None:
        raise _broken("no client address")
    else:
        preamble = Preamble(
            client=proxy.source,
            local=proxy.destination,
            authority=_text(values[Tlv.AUTHORITY]),
            stream_id=values[Tlv.UNIQUE_ID],
            from_network=_text(values[Tlv.FROM_NETWORK]),
            to_network=_text(values[Tlv.TO_NETWORK]),
            addressee=_text(values[Tlv.ADDRESSEE]),
            key_id=_text(values[Tlv.KEY_ID]),
            time_ms=int.from_bytes(values[Tlv.TIME], "big"),
            target=_text(values[Tlv.TARGET]),
            hello_digest=values.get(Tlv.HELLO_DIGEST),
            attempt=values[Tlv.ATTEMPT][0],
            continues=Tlv.CONTINUES in values,
            epoch=values.get(Tlv.EPOCH),
            imports=None if (imports := _optional(proxy, TLV_IMPORTS)) is None else _text(imports),
            heartbeats=bool((_optional(proxy, TLV_FEATURES) or b"\0")[0] & FEATURE_HEARTBEAT),
        )
    _check(preamble)
    return preamble


def _optional(proxy: ProxyHeader, kind: int) -> bytes | None:
    """Return the value of a TLV that may be present once. Raises PreambleError if it is there twice."""
    found = [value for of, value in proxy.tlvs if of == kind]
    if len(found) > 1:
        raise _broken(f"two TLVs {kind:#04x}")
    return found[0] if found else None


def _values(proxy: ProxyHeader, *, required: frozenset[Tlv], known: frozenset[Tlv]) -> dict[int, bytes]:
    """Return the values of our TLVs.

    Raises PreambleError if one is missing, present twice, of a wrong size, or not allowed in this kind of header.
    """
    values: dict[int, bytes] = {}
    for kind, value in proxy.tlvs:
        if kind in _OURS:
            if kind in values:
                raise _broken(f"two TLVs {kind:#04x}")
            values[kind] = value
    missing = required - values.keys()
    if missing:
        raise _broken(f"no TLV {min(missing):#04x}")
    if values.keys() - known:
        raise _broken(f"TLV {min(values.keys() - known):#04x} in a header without a client")
    for kind, size in _SIZES.items():
        if kind in values and len(values[kind]) != size:
            raise _broken(f"TLV {kind:#04x} of {len(values[kind])} bytes")
    if proxy.tlvs[-1][0] != Tlv.SIGNATURE:
        raise _broken("the signature is not the last TLV")
    if values.get(Tlv.CONTINUES, b"\1") != b"\1":
        raise _broken("TLV 0xeb is not 1")
    if values[Tlv.FRAMING] != bytes([FRAMING_VERSION]):
        raise _broken(f"framing version {values[Tlv.FRAMING].hex()}")
    return values


_OURS: Final = frozenset(Tlv)
_STREAM: Final = _OURS - {Tlv.HELLO_DIGEST, Tlv.CONTINUES, Tlv.EPOCH}
_WARM: Final = _STREAM - {Tlv.AUTHORITY, Tlv.TARGET, Tlv.ATTEMPT}
_SIZES: Final = {
    Tlv.UNIQUE_ID: STREAM_ID_SIZE,
    Tlv.TIME: 8,
    Tlv.SIGNATURE: SIGNATURE_SIZE,
    Tlv.FRAMING: 1,
    Tlv.HELLO_DIGEST: DIGEST_SIZE,
    Tlv.ATTEMPT: 1,
    Tlv.CONTINUES: 1,
    Tlv.EPOCH: EPOCH_SIZE,
}
_PATTERNS: Final = re.compile(rf"[a-z0-9*._ -]{{0,{MAX_IMPORTS}}}")
_WORD: Final = re.compile(r"[!-~]{1,255}")
"""Ids and names: visible ASCII without spaces. They are compared, not interpreted."""


def _text(value: bytes) -> str:
    return value.decode("latin-1")


def _check(preamble: Preamble | WarmPreamble) -> None:
    """Validate the fields; used by both sides. Raises PreambleError (protocol_error)."""
    for name in ("from_network", "to_network", "addressee", "key_id"):
        _check_word(name, getattr(preamble, name))
    if not 0 <= preamble.time_ms < 1 << 64:
        raise _broken("a time is 8 bytes")
    if preamble.epoch is not None and len(preamble.epoch) != EPOCH_SIZE:
        raise _broken("an epoch is 16 bytes")
    if isinstance(preamble, WarmPreamble):
        if len(preamble.nonce) != STREAM_ID_SIZE:
            raise _broken("a nonce is 16 bytes")
        return
    _check_word("authority", preamble.authority)
    decode_target(preamble.target)
    if len(preamble.stream_id) != STREAM_ID_SIZE or not 0 <= preamble.attempt <= 0xFF:
        raise _broken("a stream id is 16 bytes, an attempt one")
    if preamble.imports is not None and not _PATTERNS.fullmatch(preamble.imports):
        raise _broken(f"imports are not up to {MAX_IMPORTS} characters of patterns")
    if preamble.hello_digest is not None and len(preamble.hello_digest) != DIGEST_SIZE:
        raise _broken("a digest is 32 bytes")


def _check_word(name: str, word: str) -> None:
    if not _WORD.fullmatch(word):
        raise _broken(f"{name} is not 1 to 255 visible ASCII characters")


def _broken(detail: str) -> PreambleError:
    return PreambleError(Reason.PROTOCOL_ERROR, detail)
