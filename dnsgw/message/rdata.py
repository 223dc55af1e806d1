"""Data of the rarer records, made with dnslib when a table of answers is made, never for a packet.

dnslib is untyped and raises UnicodeError, ValueError, struct.error, DNSError and DNSLabelError, which is no DNSError: all
of that stays here. What leaves is RDATA whose names are written out, so that it can stand anywhere in a message.
Sans-IO. The one error is BadRdata.
"""

import struct
from typing import Any

from dnslib import SOA, SRV, DNSBuffer, DNSError
from dnslib.label import DNSLabelError

# RFC 6303 section 3: what a locally served zone says of itself, except for its names and its last number.
_RESPONSIBLE = "nobody.invalid"
_REFRESH_S, _RETRY_S, _EXPIRE_S = 3600, 1200, 604800


class BadRdata(ValueError):
    """A record cannot be made of this."""


def soa(domain: str, serial: int, negative_ttl_s: int) -> bytes:
    """Make the SOA of a zone that has neither transfers nor name servers of its own; MINIMUM is `negative_ttl_s`."""
    times = (serial & 0xFFFFFFFF, _REFRESH_S, _RETRY_S, _EXPIRE_S, negative_ttl_s)
    return _packed(SOA, domain, _RESPONSIBLE, times)


def srv(target: str, port: int) -> bytes:
    """Make an SRV record without priority or weight (RFC 2782)."""
    return _packed(SRV, 0, 0, port, target)


def hinfo(cpu: str, os: str = "") -> bytes:
    """Make an HINFO record: two strings (RFC 1035 section 3.3.2)."""
    texts = [text.encode() for text in (cpu, os)]
    if any(len(text) > 255 for text in texts):
        raise BadRdata("a string of HINFO is longer than 255 bytes")
    return b"".join(bytes((len(text),)) + text for text in texts)


def _packed(kind: Any, *values: object) -> bytes:
    buffer = DNSBuffer()
    try:
        kind(*values).pack(buffer)
    except (DNSError, DNSLabelError, ValueError, struct.error) as error:
        raise BadRdata(f"{kind.__name__} of {values}: {error}") from error
    return bytes(buffer.data)
