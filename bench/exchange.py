"""What load generator and service say to each other: a real ClientHello, one request, then bytes.

Nobody between them looks behind the ClientHello, so no TLS follows it and no cipher's CPU time is in the figures. The service
answers each request with READY at once: a client that has it has a stream from end to end.

    ECHO        every byte comes back until the client ends
    UPLOAD      the service reads to the end, says how many bytes came (8 bytes) and closes
    DOWNLOAD    after one more byte from the client the service sends until its limit, then closes
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
"""What is asked for, and when to stop sending: after so many milliseconds, or so many bytes unless that is 0."""

COUNT: Final = struct.Struct(">Q")

CHUNK_BYTES: Final = 1024 * 1024
"""One read or write of a bulk stream at either end: large, so that the ends cost little beside what is measured."""

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
    """Return a request as it goes behind the ClientHello."""
    return REQUEST.pack(what, ms, count)


def parse_start(data: bytes | bytearray) -> tuple[bytes, int, int, int] | None:
    """Return what is asked for, its two limits and the offset behind them; None while bytes are missing."""
    if len(data) < _RECORD_HEADER_BYTES:
        return None
    at = _RECORD_HEADER_BYTES + int.from_bytes(data[3:5], "big")
    if len(data) < at + REQUEST.size:
        return None
    what, ms, count = REQUEST.unpack_from(data, at)
    return what, ms, count, at + REQUEST.size
