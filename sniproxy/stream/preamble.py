"""The preamble: the signed PROXY v2 header with which a relay opens a stream to a gateway.

Who holds the key for one direction between two networks may open streams in that direction, and nobody else: a TURN
permission lets every host behind one NAT in, so this signature is the gate. The header names the network, the record and
the target it is meant for, so that it is of no use anywhere else; it carries a time and a stream id, so that it is of no use
again; and it carries the hash of the ClientHello, so that it is of no use with another.

TLVs, beside the client's address as source and the relay's as destination:

    0x02 AUTHORITY       the name that the client asked for         0xE4 target: ip:port, [v6]:port, service-name:port
    0x05 UNIQUE_ID       stream id, 16 bytes                        0xE5 framing version, 1 byte: 1
    0xE0 from-network    0xE7 to-network                            0xE9 SHA-256 of the ClientHello message; absent: no TLS
    0xE8 addressee: id of the allocation or gateway record          0xEA attempt, 1 byte, counted from 0
    0xE1 key id          0xE2 unix time in ms, 8 bytes              0xE3 HMAC-SHA256, 32 bytes, the last TLV

The HMAC is over the whole header from its first byte, with the 32 bytes of its own value zeroed. Each of these must be there
once (0xE9 may be absent); other TLVs are ignored, but signed.
"""

import enum
import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from discovery.addresses import Address, BadAddress, format_endpoint, parse_endpoint, parse_port
from discovery.names import is_service_name
from sniproxy.stream import proxyproto
from sniproxy.stream.proxyproto import SIGNATURE, Command, Endpoint, ProxyError, ProxyHeader
from sniproxy.stream.reason import Reason

FRAMING_VERSION: Final = 1
STREAM_ID_SIZE: Final = 16
DIGEST_SIZE: Final = 32
KEY_SIZE: Final = 32
TIME_WINDOW_MS: Final = 60_000
"""How far the signer's clock may be from ours."""
REPLAY_WINDOW_MS: Final = 2 * TIME_WINDOW_MS
"""How long a stream id is remembered: a header from the furthest future that passes stays fresh for this long."""
MAX_REPLAYS: Final = 1 << 18
"""Streams remembered: 2,184 new ones a second for two minutes, some 50 MB if it ever gets there."""

_SIGNATURE_SIZE: Final = hashlib.sha256().digest_size


class Tlv(enum.IntEnum):
    """TLV types of the preamble."""

    AUTHORITY = proxyproto.TLV_AUTHORITY
    UNIQUE_ID = proxyproto.TLV_UNIQUE_ID
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


class PreambleError(ValueError):
    """A preamble that is refused, or that cannot be made; `detail` is for the log and holds no key.

    The reasons: protocol_error (not laid out as described above), no_key (key id not known here, or of another pair of
    networks), bad_signature (it or the ClientHello is not what was signed), clock_skew (its time is more than 60 s from
    ours), replay (meant for another network or record, or here before), overloaded (more streams than we can remember).
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class FirstBytes(enum.Enum):
    """What a connection to a gateway begins with."""

    TLS = enum.auto()
    PROXY = enum.auto()
    """A PROXY v2 header; whether capsules or raw TLS come behind it, its framing TLV tells (`is_framed`)."""
    NEED_MORE = enum.auto()
    UNKNOWN = enum.auto()


_TLS_START: Final = b"\x16\x03"


def classify_first_bytes(data: bytes | bytearray) -> FirstBytes:
    """Tell what a connection begins with, by its first twelve bytes at most."""
    if data.startswith(_TLS_START):
        return FirstBytes.TLS
    if data.startswith(SIGNATURE):
        return FirstBytes.PROXY
    if _TLS_START.startswith(data) or SIGNATURE.startswith(data):
        return FirstBytes.NEED_MORE
    return FirstBytes.UNKNOWN


def is_framed(header: ProxyHeader) -> bool:
    """Tell whether capsules come behind this header: it has the framing TLV, whatever that says."""
    return any(kind == Tlv.FRAMING for kind, _ in header.tlvs)


def read_length(data: bytes | bytearray) -> int | None:
    """Return the length of the whole header, None while fewer than its 16 first bytes are there.

    Raises PreambleError (protocol_error) as soon as it cannot be a header or is over 1,024 bytes.
    """
    try:
        return proxyproto.read_length(data)
    except ProxyError as error:
        raise PreambleError(Reason.PROTOCOL_ERROR, str(error)) from error


def parse_key(text: str) -> bytes:
    """Return the key that a key file holds: 64 hexadecimal digits and perhaps a line end. ValueError if it does not."""
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
    """What a relay tells a gateway about a stream."""

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
    """As `encode_target` writes it."""
    hello_digest: bytes | None
    attempt: int = 0
    continues: bool = False
    """Whether the connection takes over a direction of a stream that is open already, instead of opening one."""


def encode_target(where: Address | str, port: int) -> str:
    """Write a target: an address or a service name, and a port. Raises PreambleError (protocol_error) if it is none."""
    text = f"{where}:{port}" if isinstance(where, str) else format_endpoint(where, port)
    if decode_target(text) != (where, port):
        raise _broken("a target is an address or a service name")
    return text


def decode_target(text: str) -> tuple[Address | str, int]:
    """Read a target in its one spelling: an address, or a service name as str, and the port.

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


def sign(preamble: Preamble, key: bytes) -> bytes:
    """Return the header, signed. Raises PreambleError (protocol_error) if a field cannot be written or all are too long."""
    _check(preamble)
    tlvs = [
        (Tlv.AUTHORITY, preamble.authority.encode()),
        (Tlv.UNIQUE_ID, preamble.stream_id),
        (Tlv.FROM_NETWORK, preamble.from_network.encode()),
        (Tlv.TO_NETWORK, preamble.to_network.encode()),
        (Tlv.ADDRESSEE, preamble.addressee.encode()),
        (Tlv.KEY_ID, preamble.key_id.encode()),
        (Tlv.TIME, preamble.time_ms.to_bytes(8, "big")),
        (Tlv.TARGET, preamble.target.encode()),
        (Tlv.FRAMING, bytes([FRAMING_VERSION])),
        (Tlv.ATTEMPT, bytes([preamble.attempt])),
        (Tlv.SIGNATURE, bytes(_SIGNATURE_SIZE)),
    ]
    if preamble.continues:
        tlvs.insert(-1, (Tlv.CONTINUES, b"\1"))
    if preamble.hello_digest is not None:
        tlvs.insert(-2, (Tlv.HELLO_DIGEST, preamble.hello_digest))
    header = ProxyHeader(source=preamble.client, destination=preamble.local, tlvs=tuple(tlvs))
    try:
        unsigned = header.pack()
    except ProxyError as error:
        raise PreambleError(Reason.PROTOCOL_ERROR, str(error)) from error
    return unsigned[:-_SIGNATURE_SIZE] + _signature(unsigned, key)


def check_hello(preamble: Preamble, server_name: str, digest: bytes) -> None:
    """Check that this ClientHello is the one that the preamble was signed for.

    Raises PreambleError (bad_signature).
    """
    if preamble.hello_digest is None or not hmac.compare_digest(preamble.hello_digest, digest):
        raise PreambleError(Reason.BAD_SIGNATURE, "the ClientHello is not the one that was signed for")
    if preamble.authority != server_name:
        raise PreambleError(Reason.BAD_SIGNATURE, "the ClientHello has another name than was signed")


class ReplayCache:
    """Remembers what was seen for two minutes, up to a fixed number.

    When it is full it refuses what is new rather than forget what is old: only holders of a key can fill it, and forgetting
    would let a captured header in again at the very moment of a flood.
    """

    __slots__ = ("_seen", "max_entries", "window_ms")

    def __init__(self, max_entries: int = MAX_REPLAYS, window_ms: int = REPLAY_WINDOW_MS) -> None:
        self.max_entries = max_entries
        self.window_ms = window_ms
        self._seen: OrderedDict[bytes, int] = OrderedDict()  # in order of arrival

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, seen: bytes, now_ms: int) -> None:
        """Remember `seen`. Raises PreambleError: replay if it is remembered already, overloaded if the cache is full."""
        while self._seen and next(iter(self._seen.values())) + self.window_ms < now_ms:
            self._seen.popitem(last=False)
        if seen in self._seen:
            raise PreambleError(Reason.REPLAY, "this stream and attempt were here before")
        if len(self._seen) >= self.max_entries:
            raise PreambleError(Reason.OVERLOADED, f"{self.max_entries} streams within {self.window_ms} ms")
        self._seen[seen] = now_ms


class PreambleVerifier:
    """Verifies the preambles that arrive at one gateway of `network`.

    `keys` may be replaced at any time; `replays` may be shared by verifiers.
    """

    __slots__ = ("keys", "network", "replays")

    def __init__(self, keys: Mapping[str, SigningKey], network: str, replays: ReplayCache | None = None) -> None:
        self.keys = keys
        self.network = network
        self.replays = ReplayCache() if replays is None else replays

    def verify(self, header: bytes, *, addressee: str, now_ms: int) -> Preamble:
        """Return what a complete header says, once all of it is proven.

        Args:
            header: exactly the bytes of the header, `read_length` of them.
            addressee: the id of the allocation or gateway record by which it came.
            now_ms: unix time in milliseconds.

        Raises:
            PreambleError: with the reason of the first check that failed: layout, key, signature, time, network and
                addressee, replay.
        """
        preamble = _parse(header)
        direction = preamble.from_network, preamble.to_network
        key = self.keys.get(preamble.key_id)
        if key is None or (key.from_network, key.to_network) != direction:
            # The same words for both: who has not proven anything learns nothing about our keys.
            raise PreambleError(
                Reason.NO_KEY, f"no key {preamble.key_id!r} here for streams from {direction[0]!r} to {direction[1]!r}"
            )
        if not hmac.compare_digest(_signature(header, key.secret), header[-_SIGNATURE_SIZE:]):
            raise PreambleError(Reason.BAD_SIGNATURE, f"not signed with key {key.id!r}")
        skew_ms = preamble.time_ms - now_ms
        if abs(skew_ms) > TIME_WINDOW_MS:
            raise PreambleError(Reason.CLOCK_SKEW, f"signed {skew_ms} ms from now")
        if preamble.to_network != self.network:
            raise PreambleError(Reason.REPLAY, f"meant for network {preamble.to_network!r}")
        if preamble.addressee != addressee:
            raise PreambleError(Reason.REPLAY, f"meant for {preamble.addressee!r}, came by {addressee!r}")
        self.replays.add(preamble.stream_id + bytes([preamble.attempt]) + addressee.encode(), now_ms)
        return preamble


def _signature(header: bytes, key: bytes) -> bytes:
    return hmac.digest(key, header[:-_SIGNATURE_SIZE] + bytes(_SIGNATURE_SIZE), "sha256")


def _parse(header: bytes) -> Preamble:
    """Return what a header says, unproven. Raises PreambleError (protocol_error)."""
    try:
        parsed = proxyproto.parse(header)
    except ProxyError as error:
        raise PreambleError(Reason.PROTOCOL_ERROR, str(error)) from error
    if parsed is None or parsed[1] != len(header):
        raise _broken("not exactly one header")
    proxy = parsed[0]
    if proxy.command is not Command.PROXY or proxy.source is None or proxy.destination is None:
        raise _broken("no client address")
    values: dict[int, bytes] = {}
    for kind, value in proxy.tlvs:
        if kind in _OURS:
            if kind in values:
                raise _broken(f"two TLVs {kind:#04x}")
            values[kind] = value
    missing = _REQUIRED - values.keys()
    if missing:
        raise _broken(f"no TLV {min(missing):#04x}")
    for kind, size in _SIZES.items():
        if kind in values and len(values[kind]) != size:
            raise _broken(f"TLV {kind:#04x} of {len(values[kind])} bytes")
    if proxy.tlvs[-1][0] != Tlv.SIGNATURE:
        raise _broken("the signature is not the last TLV")
    if values.get(Tlv.CONTINUES, b"\1") != b"\1":
        raise _broken("TLV 0xeb is not 1")
    if values[Tlv.FRAMING] != bytes([FRAMING_VERSION]):
        raise _broken(f"framing version {values[Tlv.FRAMING].hex()}")
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
    )
    _check(preamble)
    return preamble


_OURS: Final = frozenset(Tlv)
_REQUIRED: Final = _OURS - {Tlv.HELLO_DIGEST, Tlv.CONTINUES}
_SIZES: Final = {
    Tlv.UNIQUE_ID: STREAM_ID_SIZE,
    Tlv.TIME: 8,
    Tlv.SIGNATURE: _SIGNATURE_SIZE,
    Tlv.FRAMING: 1,
    Tlv.HELLO_DIGEST: DIGEST_SIZE,
    Tlv.ATTEMPT: 1,
    Tlv.CONTINUES: 1,
}
_WORD: Final = re.compile(r"[!-~]{1,255}")
"""Ids and names: visible ASCII without spaces. What they name is compared, not interpreted."""


def _text(value: bytes) -> str:
    return value.decode("latin-1")


def _check(preamble: Preamble) -> None:
    """Check what both sides check. Raises PreambleError (protocol_error)."""
    for name in ("authority", "from_network", "to_network", "addressee", "key_id"):
        if not _WORD.fullmatch(getattr(preamble, name)):
            raise _broken(f"{name} is not 1 to 255 visible ASCII characters")
    decode_target(preamble.target)
    if len(preamble.stream_id) != STREAM_ID_SIZE or not 0 <= preamble.attempt <= 0xFF:
        raise _broken("a stream id is 16 bytes, an attempt one")
    if not 0 <= preamble.time_ms < 1 << 64:
        raise _broken("a time is 8 bytes")
    if preamble.hello_digest is not None and len(preamble.hello_digest) != DIGEST_SIZE:
        raise _broken("a digest is 32 bytes")


def _broken(detail: str) -> PreambleError:
    return PreambleError(Reason.PROTOCOL_ERROR, detail)
