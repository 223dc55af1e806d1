"""Questions as bytes: a strict parser, and the building blocks of messages.

A question is read with struct and one walk over its labels. No object is made for each record, and nothing here recurses,
follows a pointer, or does work in proportion to the counts that a header claims.

Names are compared as lower-case wire bytes, never as dotted text, in which a dot inside a label would look like two labels
(RFC 2181 section 11). Lower-casing whole wire names is safe: length bytes are at most 63, below all letters.

Sans-IO. The only error is BadQuery.
"""

import secrets
import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum

MIN_UDP_REPLY = 512  # RFC 1035 section 4.2.1; RFC 6891 section 6.2.3: a smaller advertised size means this
MAX_UDP_REPLY = 1232  # fits the smallest IPv6 MTU; unbound's default, and below the 1400 of RFC 9715
MAX_TCP_REPLY = 65535
MAX_WIRE_NAME = 255  # RFC 1035 section 2.3.4
MAX_LABEL = 63
MAX_EXTRA_TEXT = 120  # bytes of text in an extended error: with it, our replies still fit in 512 bytes

HEADER = struct.Struct("!HHHHHH")  # RFC 1035 section 4.1.1
HEADER_SIZE = 12
QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
OPCODE = 0x7800
CLASS_IN = 1
OWNER = b"\xc0\x0c"  # a pointer to the question's name, used as a record's owner (RFC 1035 section 4.1.4)

_FIXED = struct.Struct("!HHIH")  # type, class, TTL, RDLENGTH
OPT_FIXED = struct.Struct(
    "!BHHBBHH"
)  # root, type, size, extended RCODE, version, flags, RDLENGTH (RFC 6891 section 6.1.2)
_OPTION = struct.Struct("!HH")
_PAIR = struct.Struct("!HH")
DO = 0x8000  # RFC 3225

# Options that concern one hop, not the question: cookie (RFC 7873), keepalive (RFC 7828), padding (RFC 7830).
_HOP_BY_HOP = frozenset({10, 11, 12})
CLIENT_SUBNET = 8  # RFC 7871


class Rcode(IntEnum):
    """Response codes (RFC 1035 section 4.1.1, RFC 6891 section 9)."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


class Qtype(IntEnum):
    """Record and question types that this package distinguishes."""

    A = 1
    NS = 2
    MD = 3
    MF = 4
    CNAME = 5
    SOA = 6
    MB = 7
    MG = 8
    MR = 9
    PTR = 12
    HINFO = 13
    MX = 15
    AFSDB = 18
    RT = 21
    AAAA = 28
    SRV = 33
    KX = 36
    DNAME = 39
    OPT = 41
    DS = 43
    RRSIG = 46
    NSEC = 47
    NSEC3 = 50
    SVCB = 64
    HTTPS = 65
    IXFR = 251
    AXFR = 252
    ANY = 255


class ExtendedError(IntEnum):
    """Extended errors (RFC 8914 section 4)."""

    OTHER = 0
    STALE_ANSWER = 3
    FORGED_ANSWER = 4
    NOT_READY = 14
    STALE_NXDOMAIN = 19
    NO_REACHABLE_AUTHORITY = 22
    NETWORK_ERROR = 23


class Fault(StrEnum):
    """Why a packet is not a question that can be answered."""

    SHORT = "short"
    RESPONSE = "response"
    OPCODE = "opcode"
    FORMAT = "format"
    VERSION = "version"
    CLASS = "class"


class BadQuery(ValueError):
    """A packet that is not an ordinary question. `reply` is the error to send back; empty: send nothing."""

    def __init__(self, fault: Fault, reply: bytes = b"") -> None:
        """Hold the reason, and the reply for the sender."""
        super().__init__(fault.value)
        self.fault = fault
        self.reply = reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Edns:
    """The OPT record of a question (RFC 6891)."""

    size: int
    """UDP payload size that the client advertises, in bytes."""

    version: int
    do: bool
    """The client wants DNSSEC records (RFC 3225)."""

    options: tuple[tuple[int, bytes], ...]

    start: int
    """Where the record begins in the message."""

    stop: int
    """Where it ends."""

    @property
    def limit(self) -> int:
        """The largest UDP reply to send, in bytes."""
        return min(max(self.size, MIN_UDP_REPLY), MAX_UDP_REPLY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One question, class IN, of a well-formed query."""

    id: int
    flags: int
    question: bytes
    """The question section as received: name, type, class."""

    name: bytes
    """The name in wire form, in lower case."""

    labels: tuple[int, ...]
    """Where each label begins in `name`, without the root."""

    qtype: int
    edns: Edns | None
    verbatim: bytes = b""
    """If the message has more than a question and OPT, such as a signature (TSIG) or a SOA: the message for upstream without
    its id; else empty."""

    @property
    def key(self) -> bytes:
        """The key of prepared answers: the lower-case name, the type and the class."""
        return self.name + self.question[-4:]

    @property
    def limit(self) -> int:
        """The largest UDP reply to send, in bytes."""
        return self.edns.limit if self.edns else MIN_UDP_REPLY

    def text(self) -> str | None:
        """The name as dotted lower-case text; None if a label contains a dot, so that the text would be another name."""
        labels = [self.name[start + 1 : start + 1 + self.name[start]] for start in self.labels]
        if any(b"." in label for label in labels):
            return None
        return b".".join(labels).decode("latin-1")


def scan(data: bytes) -> Query:
    """Parse a query. Raises BadQuery, and nothing else, for any other packet."""
    if len(data) < HEADER_SIZE:
        raise BadQuery(Fault.SHORT)
    ident, flags, questions, answers, authorities, extras = HEADER.unpack_from(data)
    if flags & QR:
        raise BadQuery(Fault.RESPONSE)  # answering responses makes two servers loop for ever (CVE-2024-2169)
    stop = HEADER_SIZE
    labels: tuple[int, ...] = ()
    edns = None
    well_formed = asked = spoke_edns = False
    # RFC 9619: exactly one question. Queries have no answers either, and what follows answers is not parsed. Only an IXFR
    # question has an authority record: the SOA that the client knows (RFC 1995 section 3).
    if questions <= 1 and not answers and (not authorities or _is_transfer(data, questions, authorities)):
        if questions:
            labels, stop = _walk(data)
            asked = stop > HEADER_SIZE
        if asked or not questions:
            edns, spoke_edns, well_formed = _additional(data, stop, authorities + extras)
    do = edns is not None and edns.do

    def refuse(fault: Fault, rcode: Rcode) -> BadQuery:
        return BadQuery(fault, _error_reply(data[:stop], flags, rcode, edns=spoke_edns, do=do))

    if flags & OPCODE:
        raise refuse(Fault.OPCODE, Rcode.NOTIMP)
    if not (well_formed and asked):
        raise refuse(Fault.FORMAT, Rcode.FORMERR)
    if edns is not None and edns.version:
        raise refuse(Fault.VERSION, Rcode.BADVERS)
    qtype, qclass = _PAIR.unpack_from(data, stop - 4)
    if qclass != CLASS_IN:
        raise refuse(Fault.CLASS, Rcode.REFUSED)
    question = data[HEADER_SIZE:stop]
    name = question[:-4].lower()
    more = authorities + extras > (edns is not None)
    verbatim = _without_hop_options(data, edns) if more else b""
    return Query(
        id=ident, flags=flags, question=question, name=name, labels=labels, qtype=qtype, edns=edns, verbatim=verbatim
    )


def _is_transfer(data: bytes, questions: int, authorities: int) -> bool:
    _, stop = _walk(data)
    return questions == authorities == 1 and data[stop - 4 : stop - 2] == Qtype.IXFR.to_bytes(2, "big")


def _walk(data: bytes) -> tuple[tuple[int, ...], int]:
    """Return the offsets of the labels in the question's name, and where the question ends; if it is bad: (), HEADER_SIZE."""
    position = HEADER_SIZE
    labels = []
    try:
        while length := data[position]:
            labels.append(position - HEADER_SIZE)
            position += length + 1
            # Nothing precedes this name for a pointer to point at; label types 01 and 10 are obsolete (RFC 6891 section 5).
            if length > MAX_LABEL or position - HEADER_SIZE >= MAX_WIRE_NAME:
                return (), HEADER_SIZE
    except IndexError:
        return (), HEADER_SIZE
    stop = position + 5
    return (tuple(labels), stop) if stop <= len(data) else ((), HEADER_SIZE)


def _additional(data: bytes, position: int, count: int) -> tuple[Edns | None, bool, bool]:
    """Parse the additional section. Returns its OPT, whether there was an OPT at all, and whether all of it is well-formed.

    A record takes at least 11 bytes, so the work is bounded by the length of the message, not by `count`.
    """
    edns = None
    seen = False
    try:
        for _ in range(count):
            start = position
            position = _skip_name(data, position)
            rtype, _, _, size = _FIXED.unpack_from(data, position)
            position += _FIXED.size + size
            if rtype != Qtype.OPT:
                continue
            repeated, seen = seen, True
            # RFC 6891 section 6.1.1: at most one, and its owner is the root.
            if repeated or data[start]:
                return edns, seen, False
            edns = _parse_opt(data, start, position)
    except (IndexError, struct.error):
        return edns, seen, False
    return edns, seen, position == len(data)


def _skip_name(data: bytes, position: int) -> int:
    while length := data[position]:
        if length >= 0xC0:  # the owner of a TSIG may be a pointer; it is not followed
            return position + 2
        if length > MAX_LABEL:
            raise IndexError
        position += length + 1
    return position + 1


def _parse_opt(data: bytes, start: int, stop: int) -> Edns:
    """Parse an OPT record. Raises IndexError or struct.error if its options do not fill it exactly."""
    _, _, size, _, version, flags, _ = OPT_FIXED.unpack_from(data, start)
    whole = data[:stop]
    options = []
    position = start + OPT_FIXED.size
    while position < stop:
        code, length = _OPTION.unpack_from(whole, position)
        position += _OPTION.size + length
        if position > len(whole):
            raise IndexError
        options.append((code, whole[position - length : position]))
    return Edns(size=size, version=version, do=bool(flags & DO), options=tuple(options), start=start, stop=stop)


def opt_record(*, do: bool, rcode: int = Rcode.NOERROR, options: bytes = b"", size: int = MAX_UDP_REPLY) -> bytes:
    """Encode an OPT record; `options` are already encoded."""
    return OPT_FIXED.pack(0, Qtype.OPT, size, rcode >> 4, 0, DO if do else 0, len(options)) + options


def option(code: int, value: bytes) -> bytes:
    """Encode one EDNS option."""
    return _OPTION.pack(code, len(value)) + value


def extended_error(code: ExtendedError, text: str = "") -> bytes:
    """Encode an extended error (RFC 8914 section 2); its text is truncated to 120 bytes."""
    extra = text.encode()[:MAX_EXTRA_TEXT].decode(errors="ignore").encode()
    return option(15, code.to_bytes(2, "big") + extra)


def record(owner: bytes, rtype: int, ttl_s: int, rdata: bytes) -> bytes:
    """Encode a resource record of class IN."""
    return owner + _FIXED.pack(rtype, CLASS_IN, ttl_s, len(rdata)) + rdata


def wire_name(text: str) -> bytes:
    """Encode a dotted name in lower case; the root is "". Raises ValueError for what cannot be a name."""
    labels = [label.encode("ascii") for label in text.lower().removesuffix(".").split(".")] if text.strip(".") else []
    if not all(0 < len(label) <= MAX_LABEL for label in labels):
        raise ValueError(f"{text!r} has an empty label or one above {MAX_LABEL} bytes")
    name = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    if len(name) > MAX_WIRE_NAME:
        raise ValueError(f"{text!r} is longer than {MAX_WIRE_NAME} bytes")
    return name


def _error_reply(received: bytes, flags: int, rcode: Rcode, *, edns: bool, do: bool) -> bytes:
    """Make an error reply. `received` is the readable part of the query: its header, and its question if it has one."""
    header = HEADER.pack(
        0, QR | RA | (flags & (OPCODE | RD | CD)) | (rcode & 0xF), len(received) > HEADER_SIZE, 0, 0, edns
    )
    return received[:2] + header[2:] + received[HEADER_SIZE:] + (opt_record(do=do, rcode=rcode) if edns else b"")


def _without_hop_options(data: bytes, edns: Edns | None) -> bytes:
    """Return the message without its id and without hop-by-hop options, with a UDP size of at most 1232 bytes."""
    if edns is None:
        return data[2:]
    kept = [(code, value) for code, value in edns.options if code not in _HOP_BY_HOP]
    if len(kept) == len(edns.options) and edns.size <= MAX_UDP_REPLY:
        return data[2:]
    options = b"".join(option(code, value) for code, value in kept)
    return data[2 : edns.start] + opt_record(do=edns.do, options=options) + data[edns.stop :]


def retyped(query: Query, qtype: int) -> Query:
    """Return the same question with another type."""
    question = query.question[:-4] + qtype.to_bytes(2, "big") + query.question[-2:]
    return Query(
        id=query.id,
        flags=query.flags,
        question=question,
        name=query.name,
        labels=query.labels,
        qtype=qtype,
        edns=query.edns,
    )


def probe_question() -> Query:
    """Return a question that nobody else asks: its name has two random labels, as in CoreDNS's loop plugin."""
    name = wire_name(f"{secrets.token_hex(8)}.{secrets.token_hex(8)}")
    question = name + _PAIR.pack(Qtype.HINFO, CLASS_IN)
    return Query(id=0, flags=RD, question=question, name=name, labels=(0, 17), qtype=Qtype.HINFO, edns=None)
