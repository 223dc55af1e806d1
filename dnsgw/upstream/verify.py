"""Whether a packet is the answer to a question (RFC 5452 section 9.1, RFC 7873 section 5.3, DNS 0x20).

The caller has already matched the id to find the attempt. Over TCP nobody off the path can forge, so less has to match.
Sans-IO; nothing here raises for what a peer sent.
"""

import struct
from enum import Enum

from dnsgw.message import cookie
from dnsgw.message.question import HEADER, HEADER_SIZE, OPCODE, QR, Qtype, Rcode

_FIXED = struct.Struct("!HHIH")
_OPTION = struct.Struct("!HH")
_BAD_COOKIE = 23  # RFC 7873 section 8
_BARE_ERRORS = frozenset({Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED})
_NO_EDNS_ERRORS = frozenset({Rcode.FORMERR, Rcode.NOTIMP})


class Verdict(Enum):
    """Classification of a packet whose id matches."""

    ANSWER = "answer"
    NO_ANSWER = "no_answer"
    """Not a response, or not to this question."""

    MISSPELLED = "misspelled"
    """The question is in another case than ours."""

    BARE = "bare"
    """An error without a question section: only the id matches."""

    NO_COOKIE = "no_cookie"
    """It lacks the cookie that this server otherwise sends, or has a client cookie that is not ours."""

    BAD_COOKIE = "bad_cookie"
    """BADCOOKIE: the server wants a fresh server cookie, and sent one."""

    NO_EDNS = "no_edns"
    """The server does not understand OPT (RFC 6891 section 7)."""


class Opt:
    """The parts of a response's OPT record that are used here."""

    __slots__ = ("cookie", "upper")

    def __init__(self, upper: int, cookie: bytes) -> None:
        """`upper`: the upper bits of the response code; `cookie`: b"" if there is none."""
        self.upper = upper
        self.cookie = cookie


def find_opt(packet: bytes) -> Opt | None:
    """Return the OPT record of a message; None if there is none, or the message is cut short."""
    try:
        _, _, questions, answers, authorities, extras = HEADER.unpack_from(packet)
        position = HEADER_SIZE
        for _ in range(questions):
            position = _behind_name(packet, position) + 4
        for _ in range(answers + authorities):
            position = _behind_name(packet, position) + 10
            position += int.from_bytes(packet[position - 2 : position], "big")
        for _ in range(extras):
            start = position
            position = _behind_name(packet, position)
            rtype, _, ttl, size = _FIXED.unpack_from(packet, position)
            position += _FIXED.size + size
            if rtype == Qtype.OPT and not packet[start]:
                return Opt(ttl >> 24, _cookie(packet[position - size : position]))
    except (IndexError, struct.error):
        pass
    return None


def _behind_name(packet: bytes, position: int) -> int:
    while length := packet[position]:
        if length >= 0xC0:
            return position + 2
        position += length + 1
    return position + 1


def _cookie(options: bytes) -> bytes:
    position = 0
    while position + _OPTION.size <= len(options):
        code, size = _OPTION.unpack_from(options, position)
        position += _OPTION.size + size
        if code == cookie.OPTION:
            return options[position - size : position]
    return b""


def judge(
    packet: bytes,
    question: bytes,
    *,
    spelled: bool,
    edns: bool,
    client_cookie: bytes,
    expects_cookie: bool,
    stream: bool,
) -> tuple[Verdict, Opt | None]:
    """Classify a packet whose id matches, and return its OPT record.

    Args:
        packet: the whole message.
        question: the question section as sent.
        spelled: the case of the question must match.
        edns: the question was sent with OPT.
        client_cookie: the client cookie that was sent; b"": none.
        expects_cookie: the server is known to send cookies.
        stream: the packet came over a connection.
    """
    if len(packet) < HEADER_SIZE:
        return Verdict.NO_ANSWER, None
    _, flags, questions, _, _, _ = HEADER.unpack_from(packet)
    rcode = flags & 0xF
    if flags & (QR | OPCODE) != QR:
        return Verdict.NO_ANSWER, None
    if not questions:
        if len(packet) != HEADER_SIZE or rcode not in _BARE_ERRORS:
            return Verdict.NO_ANSWER, None
        if not stream:
            return Verdict.BARE, None
        return (Verdict.NO_EDNS if edns and rcode in _NO_EDNS_ERRORS else Verdict.ANSWER), None
    asked = packet[HEADER_SIZE : HEADER_SIZE + len(question)]
    if questions != 1 or asked[-4:] != question[-4:] or asked[:-4].lower() != question[:-4].lower():
        return Verdict.NO_ANSWER, None
    if spelled and asked != question:
        return Verdict.MISSPELLED, None
    opt = find_opt(packet)
    if client_cookie:
        said = opt.cookie if opt is not None else b""
        if said and said[: cookie.CLIENT_SIZE] != client_cookie:
            return Verdict.NO_COOKIE, opt
        if opt is not None and opt.upper << 4 | rcode == _BAD_COOKIE and len(said) > cookie.CLIENT_SIZE:
            return Verdict.BAD_COOKIE, opt
        if expects_cookie and len(said) <= cookie.CLIENT_SIZE:
            return Verdict.NO_COOKIE, opt
    if edns and opt is None and rcode in _NO_EDNS_ERRORS:
        return Verdict.NO_EDNS, None
    return Verdict.ANSWER, opt


def question_of(packet: bytes) -> bytes:
    """Return the question of a response with its name in lower case; b"" for any other packet."""
    if len(packet) < HEADER_SIZE or not packet[2] & 0x80:
        return b""
    stop = packet.find(0, HEADER_SIZE) + 1
    return packet[HEADER_SIZE:stop].lower() + packet[stop : stop + 4]
