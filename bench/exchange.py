"""The protocol between load generator and service: a real ClientHello, one request, then bytes.

Nothing between them parses beyond the ClientHello, so no TLS follows it, and the figures include no CPU time for ciphers. The
service answers each request immediately with READY: a client that receives it has a stream from end to end.

    ECHO        every byte is sent back until the client ends
    UPLOAD      the service reads to the end, reports the number of bytes (8 bytes) and closes
    DOWNLOAD    after one more byte from the client the service sends up to its limit, then closes
"""

import ssl
import struct
from typing import Final

READY: Final = b"r"
GO: Final = b"g"
ECHO: Final = b"E"
UPLOAD: Final = b"U"
DOWNLOAD: Final = b"D"

REQUEST: Final = struct.Struct(">cQQ")
"""The kind of request, and when to stop sending: a number of milliseconds, and a number of bytes (0: no limit)."""

COUNT: Final = struct.Struct(">Q")

CHUNK_BYTES: Final = 1024 * 1024
"""Size of a read or write of a bulk stream at either end: large, so that the ends cost little."""

_RECORD_HEADER_BYTES: Final = 5


def client_hello(name: str) -> bytes:
    """Return the ClientHello that this machine's OpenSSL sends to a server of this name."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass  # it waits for a ServerHello that will never come
    return outgoing.read()


def request(what: bytes, *, ms: int = 0, count: int = 0) -> bytes:
    """Return a request, which is sent after the ClientHello."""
    return REQUEST.pack(what, ms, count)


def parse_start(data: bytes | bytearray) -> tuple[bytes, int, int, int] | None:
    """Return the kind of request, its two limits and the offset after them, or None while bytes are missing."""
    if len(data) < _RECORD_HEADER_BYTES:
        return None
    at = _RECORD_HEADER_BYTES + int.from_bytes(data[3:5], "big")
    if len(data) < at + REQUEST.size:
        return None
    what, ms, count = REQUEST.unpack_from(data, at)
    return what, ms, count, at + REQUEST.size
