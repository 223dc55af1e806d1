"""ClientHellos built from parts: any that a client could send, and many that none should send.

client_hello("orders.shop.example")                        a whole connection start, one record
records(message(server_name(b"a.example")), 1)             the same in records of one byte
"""

import ssl
import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise

Extension = tuple[int, bytes]

SERVER_NAME = 0
ALPN = 16
SUPPORTED_VERSIONS = 43
KEY_SHARE = 51
ECH = 0xFE0D
GREASE = 0x0A0A
X25519MLKEM768 = 4588
PADDING = 21

CHANGE_CIPHER_SPEC = bytes.fromhex("140303000101")
EARLY_DATA = bytes.fromhex("1703030020") + bytes(range(32))


def vector(data: bytes, prefix: int) -> bytes:
    """Put a length of `prefix` bytes before `data`."""
    return len(data).to_bytes(prefix, "big") + data


def server_name(*names: bytes, kind: int = 0) -> Extension:
    """Make a server_name extension with these names, all of one type."""
    return SERVER_NAME, vector(b"".join(bytes([kind]) + vector(name, 2) for name in names), 2)


def alpn(*protocols: bytes) -> Extension:
    """Make an ALPN extension."""
    return ALPN, vector(b"".join(vector(protocol, 1) for protocol in protocols), 2)


def supported_versions(*versions: int) -> Extension:
    """Make a supported_versions extension."""
    return SUPPORTED_VERSIONS, vector(b"".join(version.to_bytes(2, "big") for version in versions), 1)


def key_share(group: int, size: int) -> Extension:
    """Make a key_share extension with one share of `size` bytes."""
    return KEY_SHARE, vector(struct.pack(">HH", group, size) + bytes(size), 2)


def ech(*, size: int = 186) -> Extension:
    """Make an encrypted_client_hello extension of the outer form (a GREASE one looks the same)."""
    return ECH, bytes([0, 0, 1, 0, 1, 7]) + vector(bytes(32), 2) + vector(bytes(size), 2)


def padding(size: int) -> Extension:
    """Make a padding extension with `size` bytes."""
    return PADDING, bytes(size)


def message(
    *extensions: Extension,
    version: int = 0x0303,
    session_id: bytes = bytes(32),
    ciphers: bytes = bytes.fromhex("13011302c02f"),
    compressions: bytes = b"\0",
    block: bytes | None = None,
    behind: bytes = b"",
    kind: int = 1,
    length: int | None = None,
) -> bytes:
    """Make a handshake message.

    Args:
        extensions: none: the message ends without an extensions block.
        version: what the client's version field says.
        session_id: and the other fields of the hello, as they are.
        ciphers: cipher suites, two bytes each.
        compressions: compression methods.
        block: the extensions block with its length, in place of the true one.
        behind: bytes behind the extensions, inside the message.
        kind: handshake type.
        length: what the length field says, in place of the truth.
    """
    if block is None:
        joined = b"".join(number.to_bytes(2, "big") + vector(value, 2) for number, value in extensions)
        block = vector(joined, 2) if extensions else b""
    body = (
        version.to_bytes(2, "big")
        + bytes(range(32))
        + vector(session_id, 1)
        + vector(ciphers, 2)
        + vector(compressions, 1)
        + block
        + behind
    )
    return bytes([kind]) + (len(body) if length is None else length).to_bytes(3, "big") + body


def record(payload: bytes, *, kind: int = 22, version: int = 0x0301, length: int | None = None) -> bytes:
    """Make one TLS record. `length` replaces the right value of its length field."""
    return struct.pack(">BHH", kind, version, len(payload) if length is None else length) + payload


def records(payload: bytes, size: int = 16384, *, version: int = 0x0301) -> bytes:
    """Make records of `size` bytes each, the last one shorter."""
    return b"".join(record(payload[at : at + size], version=version) for at in range(0, len(payload), size))


def records_cut(payload: bytes, cuts: Iterable[int]) -> bytes:
    """Make records that end at these offsets. Offsets that would make an empty record are ignored."""
    edges = sorted({0, len(payload), *(cut for cut in cuts if 0 < cut < len(payload))})
    return b"".join(record(payload[a:b]) for a, b in pairwise(edges))


def client_hello(name: str | bytes = "orders.shop.example", *extensions: Extension) -> bytes:
    """Make the start of an ordinary connection: a hello as browsers send it, in as few records as possible."""
    raw = name.encode() if isinstance(name, str) else name
    return records(message(server_name(raw), supported_versions(0x0304, 0x0303), alpn(b"h2", b"http/1.1"), *extensions))


def python_hello(name: str | None, *, protocols: Sequence[str] = ()) -> bytes:
    """Return what Python's ssl, which is OpenSSL, sends for this name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(protocols)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


_NAME = b"orders.shop.example"
_SNI = server_name(_NAME)

BROKEN = {
    "session id of 33": message(_SNI, session_id=bytes(33)),
    "no ciphers": message(_SNI, ciphers=b""),
    "odd ciphers": message(_SNI, ciphers=b"\x13\x01\x13"),
    "no compressions": message(_SNI, compressions=b""),
    "no null compression": message(_SNI, compressions=b"\x01"),
    "client version 2": message(_SNI, version=0x0200),
    "client version 4": message(_SNI, version=0x0400),
    "message ends in the random": b"\x01\x00\x00\x10" + bytes([3, 3]) + bytes(14),
    "message of nothing": b"\x01\x00\x00\x00",
    "extensions longer than the message": message(block=vector(bytes(8), 2)[:-1]),
    "extensions shorter than the message": message(_SNI, behind=b"\0"),
    "half an extensions length": message(block=b"\0"),
    "extension past the end": message(block=vector(b"\x00\x63\x00\x05abcd", 2)),
    "extension without length": message(block=vector(b"\x00\x63\x00", 2)),
    "three bytes behind an extension": message(block=vector(b"\x00\x63\x00\x00\x00\x63\x00", 2)),
    "two server_name extensions": message(_SNI, _SNI),
    "two server_name extensions, other between": message(_SNI, padding(3), server_name(b"b.example")),
    "another extension twice": message(padding(1), _SNI, padding(1)),
    "GREASE twice": message((GREASE, b""), _SNI, (GREASE, b"")),
    "two names": message(server_name(_NAME, b"b.example")),
    "the same name twice": message(server_name(_NAME, _NAME)),
    "unknown name type": message(server_name(_NAME, kind=1)),
    "unknown name type first": message((0, vector(b"\1" + vector(b"x", 2) + b"\0" + vector(_NAME, 2), 2))),
    "unknown name type second": message((0, vector(b"\0" + vector(_NAME, 2) + b"\1" + vector(b"x", 2), 2))),
    "server_name as a server sends it": message((0, b"")),
    "empty list of names": message((0, vector(b"", 2))),
    "list of names too long": message((0, b"\0\xff" + b"\0" + vector(_NAME, 2))),
    "list of names too short": message((0, vector(b"\0" + vector(_NAME, 2), 2) + b"\0")),
    "name longer than its list": message((0, vector(b"\0\xff\xff" + _NAME, 2))),
    "name shorter than its list": message((0, vector(b"\0" + vector(_NAME, 2) + b"x", 2))),
    "list ends in the name's length": message((0, vector(b"\0\0", 2))),
    "alpn empty": message(_SNI, (16, b"")),
    "alpn without protocols": message(_SNI, alpn()),
    "alpn with an empty protocol": message(_SNI, alpn(b"")),
    "alpn past the end": message(_SNI, (16, vector(b"\x05h2", 2))),
    "alpn with bytes behind": message(_SNI, (16, vector(b"\x02h2", 2) + b"\0")),
    "no supported versions": message(_SNI, supported_versions()),
    "odd supported versions": message(_SNI, (43, vector(b"\3\4\3", 1))),
}
"""Malformed messages, by what is wrong. A relay answers each with decode_error."""
