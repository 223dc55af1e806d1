"""Corner cases of ClientHellos as bytes: those that a relay routes, and those that it refuses, with the kind of refusal.

The tables are checked against the parser (test_client_hello.py) and over real sockets (test_relay_corner_cases.py).
"""

from tests.support import hellos
from tests.support.hellos import (
    EARLY_DATA,
    GREASE,
    X25519MLKEM768,
    client_hello,
    ech,
    key_share,
    message,
    padding,
    record,
    records,
    records_cut,
    server_name,
    supported_versions,
)

NAME = b"orders.shop.example"
SNI = server_name(NAME)
PLAIN = message(SNI)
AT_NAME = PLAIN.index(NAME)


def singly(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def grow(size: int, *extensions: hellos.Extension, last: hellos.Extension | None = None) -> bytes:
    """Return a message of exactly `size` bytes, with padding between the extensions and `last`."""
    after = [last] if last else []
    return message(*extensions, padding(size - len(message(*extensions, padding(0), *after))), *after)


ROUTED = {
    "one segment": [records(PLAIN)],
    "1 byte, then the rest": [records(PLAIN)[:1], records(PLAIN)[1:]],
    "12 single bytes, then the rest": [*singly(records(PLAIN)[:12]), records(PLAIN)[12:]],
    "byte by byte": singly(records(PLAIN)),
    "cut inside the name": [records(PLAIN)[: 5 + AT_NAME + 3], records(PLAIN)[5 + AT_NAME + 3 :]],
    "records cut in the handshake header": [records_cut(PLAIN, [1])],
    "records cut after the handshake header": [records_cut(PLAIN, [4])],
    "records cut before the name": [records_cut(PLAIN, [AT_NAME])],
    "records cut inside the name": [records_cut(PLAIN, [AT_NAME + 3])],
    "records cut inside the name, one byte": [records_cut(PLAIN, [AT_NAME + 3, AT_NAME + 4])],
    "records cut after the name": [records_cut(PLAIN, [AT_NAME + len(NAME)])],
    "records of one byte": [records(PLAIN, 1)],
    "records of one byte, byte by byte": singly(records(PLAIN, 1)),
    "records of 512 bytes": [records(grow(1246, SNI), 512)],
    "post-quantum share before the name": [records(message(key_share(X25519MLKEM768, 1216), SNI))],
    "1.9 kB": [records(grow(1900, key_share(X25519MLKEM768, 1216), last=SNI))],
    "15.7 kB in one record": [records(grow(15_700, last=SNI))],
    "a record of 16,384 bytes": [records(grow(16_384, last=SNI))],
    "a record of 16,640 bytes": [record(grow(16_640, last=SNI))],
    "18 kB in two records": [records(grow(18_000, last=SNI), 9_000)],
    "23 kB, name past 14 kB": [records(message(padding(14_500), SNI, (99, bytes(8_000))))],
    "of the maximum size": [records(grow(65_536 + 4, last=SNI))],
    "13,107 records of one byte": [records(grow(13_107, last=SNI), 1)],
    **{f"record version {version:#06x}": [records(PLAIN, version=version)] for version in range(0x0300, 0x0305)},
    "client version 3.0": [records(message(SNI, version=0x0300))],
    "no session id": [records(message(SNI, session_id=b""))],
    "other compression methods besides null": [records(message(SNI, compressions=b"\x01\x00"))],
    "GREASE everywhere": [
        records(
            message(
                (GREASE, b""),
                SNI,
                supported_versions(0x3A3A, 0x0304),
                key_share(0x5A5A, 1),
                (0xFAFA, b"\0"),
                ciphers=bytes.fromhex("0a0a1301"),
            )
        )
    ],
    "unknown extensions": [records(message((0xABCD, bytes(100)), SNI, (0xFFFF, b"")))],
}
"""Each is a list of the pieces in which it arrives. All ask for NAME."""

OTHER_PROTOCOLS = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "Postgres SSLRequest": bytes.fromhex("0000000804d2162f"),
    "SSLv2 hello": bytes.fromhex("802e0103010015000000100000"),
    "alert record": bytes.fromhex("15030100020100"),
    "application data": EARLY_DATA,
    "version 2": bytes.fromhex("1602000005"),
    "version 4": bytes.fromhex("1604010005"),
    "PROXY v1": b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + client_hello(),
    "PROXY v2": bytes.fromhex("0d0a0d0a000d0a515549540a"),
}
"""Not TLS: the relay closes the connection without an alert."""

# Each is the shortest prefix that shows the error: one byte less is incomplete. Nothing more is read or reserved.
FROM_THE_HEADER = {
    "record length 0xFFFF": record(b"", length=0xFFFF),
    "record length 16,641": record(b"", length=16_641),
    "empty record first": record(b""),
    "empty record inside": records_cut(PLAIN, [9])[: 5 + 9] + record(b""),
    "handshake length 0xFFFFFF": record(b"\x01\xff\xff\xff", length=200),
    "handshake length 65,537": record(b"\x01\x01\x00\x01", length=200),
    "handshake length 65,537, records of one byte": records(b"\x01\x01\x00\x01", 1),
    "a server hello": record(b"\x02", length=200),
    "a hello request": record(b"\x00", length=200),
    "other record inside": record(PLAIN[:9]) + bytes([20]),
    "other version inside": record(PLAIN[:9]) + bytes([22, 2]),
    "the record continues after the hello": record(PLAIN, length=len(PLAIN) + 1),
}
"""Refused with the alert decode_error."""

NAMELESS = {
    "no extensions block": message(),
    "empty extensions block": message(block=b"\0\0"),
    "other extensions": message(supported_versions(0x0304), ech(), (GREASE, b"")),
}
"""Refused with the alert unrecognized_name, for the reason no_sni."""

BAD_NAMES = [
    b"",
    b".",
    b"..",
    b".x",
    b"a..b",
    b"a.example..",
    b"a" * 64 + b".example",
    b"a" * 256,
    (b"a" * 62 + b".") * 4 + b"aa",
    b"orders.shop.example\x00.evil",
    b"orders.shop.example\r\n",
    b"orders\x1b[2J.example",
    b'orders".example',
    b"orders/.example",
    b"orders.example:8443",
    b"orders%00.example",
    b"orders .example",
    b"*.example",
    b"\xff.example",
    "bücher.example".encode(),
    "bücher.example".encode("latin-1"),
    b"orders\x7f.example",
    "k\u212a.example".encode(),  # the Kelvin sign, which some lower-case to k
    b"10.0.0.5",
    b"10.0.0.5.",
    b"010.0.0.5",
    b"10.5",
    b"0x7f.1",
    b"0x7f.0x1",
    b"a.0x",
    b"2130706433",
    b"::1",
    b"[::1]",
    b"fd00::5",
    b"::ffff:10.0.0.5",
]
"""Refused with the alert unrecognized_name, for the reason bad_name."""
