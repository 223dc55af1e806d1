"""DNS cookies (RFC 7873), which prove a client's address. Servers with the same secret make the same ones (RFC 9018).

Sans-IO: time comes as an argument, in seconds since 1970.
"""

import struct

OPTION = 10
CLIENT_SIZE = 8
MAX_SIZE = 40  # of both halves together
SECRET_SIZE = 16
_VERSION = b"\1\0\0\0"  # and three reserved bytes
_MASK = (1 << 64) - 1


def is_well_formed(value: bytes) -> bool:
    """Whether this can be a cookie: a client cookie, alone or with a server cookie (RFC 7873 section 4)."""
    return len(value) == CLIENT_SIZE or CLIENT_SIZE + 8 <= len(value) <= MAX_SIZE


def answer(value: bytes, host: bytes, secret: bytes, now: float) -> bytes:
    """Return the cookie to send back: the client's, and a new server cookie (RFC 9018 section 4.2)."""
    client = value[:CLIENT_SIZE]
    head = client + _VERSION + struct.pack("!I", int(now) & 0xFFFFFFFF)
    return head + siphash24(secret, head + host)


def siphash24(key: bytes, data: bytes) -> bytes:
    """SipHash-2-4 (Aumasson and Bernstein, 2012). The standard library does not offer it with a chosen key."""
    k0, k1 = struct.unpack("<QQ", key)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]
    padded = data + bytes(-(len(data) + 1) % 8) + bytes((len(data) & 0xFF,))
    for (word,) in struct.iter_unpack("<Q", padded):
        v[3] ^= word
        _rounds(v, 2)
        v[0] ^= word
    v[2] ^= 0xFF
    _rounds(v, 4)
    return struct.pack("<Q", v[0] ^ v[1] ^ v[2] ^ v[3])


def _rounds(v: list[int], count: int) -> None:
    a, b, c, d = v
    for _ in range(count):
        a = a + b & _MASK
        b = (b << 13 | b >> 51) & _MASK ^ a
        a = (a << 32 | a >> 32) & _MASK
        c = c + d & _MASK
        d = (d << 16 | d >> 48) & _MASK ^ c
        a = a + d & _MASK
        d = (d << 21 | d >> 43) & _MASK ^ a
        c = c + b & _MASK
        b = (b << 17 | b >> 47) & _MASK ^ c
        c = (c << 32 | c >> 32) & _MASK
    v[:] = a, b, c, d
