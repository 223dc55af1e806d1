"""RDATA of less common records, made with dnslib when an answer is prepared, not for each packet.

dnslib is untyped and raises UnicodeError, ValueError, struct.error, DNSError and DNSLabelError, which is not a DNSError. All
that stays in this module. The results are RDATA without compressed names, valid anywhere in a message.
Sans-IO. The only error is BadRdata.
"""

import struct
from typing import Any

from dnslib import SOA, SRV, DNSBuffer, DNSError
from dnslib.label import DNSLabelError

# RFC 6303 section 3: the SOA of a locally served zone, except for its names and MINIMUM.
_RESPONSIBLE = "nobody.invalid"
_REFRESH_S, _RETRY_S, _EXPIRE_S = 3600, 1200, 604800


class BadRdata(ValueError):
    """No record can be made of these values."""


def soa(domain: str, serial: int, negative_ttl_s: int) -> bytes:
    """Make the SOA of a zone without transfers and without name servers of its own; MINIMUM is `negative_ttl_s`."""
    times = (serial & 0xFFFFFFFF, _REFRESH_S, _RETRY_S, _EXPIRE_S, negative_ttl_s)
    return _packed(SOA, domain, _RESPONSIBLE, times)


def srv(target: str, port: int, priority: int = 0) -> bytes:
    """Make an SRV record with weight 0 (RFC 2782). Clients try the lowest priority first."""
    return _packed(SRV, priority, 0, port, target)


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
