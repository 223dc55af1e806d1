"""Our own replies: prepared once, completed for each question.

A reply has the id and the question exactly as received, so the client's spelling is kept (DNS 0x20), and parts that are made in
advance around them. Sans-IO; nothing here raises for what a peer sent.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from itertools import cycle

from dnsgw.message.question import (
    AA,
    AD,
    CD,
    DO,
    HEADER,
    HEADER_SIZE,
    MIN_UDP_REPLY,
    OPT_FIXED,
    QR,
    RA,
    RD,
    TC,
    Qtype,
    Query,
    Rcode,
    opt_record,
)


class Answer:
    """A prepared reply. Only the id, the question, and the client's RD, CD and EDNS are missing.

    `tails` are the records behind the question in several orders, used in rotation; their owners point at the question.
    """

    __slots__ = ("_heads", "_next_tail", "_opts", "longest", "rcode")

    def __init__(
        self,
        rcode: Rcode = Rcode.NOERROR,
        tails: Sequence[bytes] = (b"",),
        *,
        answers: int = 0,
        authorities: int = 0,
        authoritative: bool = True,
        options: bytes = b"",
    ) -> None:
        """Prepare eight headers, for all combinations of RD, CD and OPT, and two OPT records, without and with DO."""
        self.rcode = rcode
        base = QR | RA | (AA if authoritative else 0) | (rcode & 0xF)
        self._heads = tuple(
            HEADER.pack(
                0, base | (RD if shape & 1 else 0) | (CD if shape & 2 else 0), 1, answers, authorities, shape >> 2
            )[2:]
            for shape in range(8)
        )
        self._opts = (
            opt_record(do=False, rcode=rcode, options=options),
            opt_record(do=True, rcode=rcode, options=options),
        )
        self._next_tail = cycle(tails).__next__
        self.longest = HEADER_SIZE + max(map(len, tails)) + len(self._opts[0])
        """Size of the longest reply in bytes, without its question."""

    def assemble(self, ident: bytes, shape: int, question: bytes, do: bool) -> bytes:
        """Complete the reply. `shape` is the sum of 1 for RD, 2 for CD and 4 for EDNS."""
        if shape & 4:
            return ident + self._heads[shape] + question + self._next_tail() + self._opts[do]
        return ident + self._heads[shape] + question + self._next_tail()

    def reply(self, query: Query, limit: int) -> bytes:
        """Answer a query in at most `limit` bytes, else with TC, the question and OPT only."""
        edns = query.edns
        shape = (1 if query.flags & RD else 0) | (2 if query.flags & CD else 0) | (4 if edns else 0)
        do = edns is not None and edns.do
        whole = self.assemble(query.id.to_bytes(2, "big"), shape, query.question, do)
        return whole if len(whole) <= limit else truncate(whole, query)


# The headers, without id, of ordinary questions: RD, CD and AD may be set, and there may be one additional record.
_SHAPES = {
    HEADER.pack(0, (RD if shape & 1 else 0) | (CD if shape & 2 else 0) | ad, 1, 0, 0, shape >> 2)[2:]: shape
    for shape in range(8)
    for ad in (0, AD)
}


def answer_prepared(data: bytes, prepared: Mapping[bytes, Answer]) -> bytes | None:
    """Answer an ordinary question whose answer is prepared; None: parse it with `scan`.

    The labels are not walked. If the name is well-formed, the first zero byte ends it, and one that is not well-formed is not
    in `prepared`. Anything but an OPT without options is left to `scan`, and so are answers that might exceed a client's limit.
    """
    end = data.find(0, HEADER_SIZE) + 1
    stop = end + 4
    # Only the name is lower-cased, not the type: HTTPS is 65, the letter A.
    answer = prepared.get(data[HEADER_SIZE:end].lower() + data[end:stop])
    if answer is None:
        return None
    shape = _SHAPES.get(data[2:HEADER_SIZE])
    if shape is None:
        return None
    do = False
    if shape < 4:
        if len(data) != stop:
            return None
    else:
        if len(data) != stop + OPT_FIXED.size:
            return None
        root, rtype, _, _, version, flags, rdlength = OPT_FIXED.unpack_from(data, stop)
        if root or rtype != Qtype.OPT or version or rdlength:
            return None
        do = flags >= DO
    if answer.longest + stop - HEADER_SIZE > MIN_UDP_REPLY:
        return None
    return answer.assemble(data[:2], shape, data[HEADER_SIZE:stop], do)


def truncate(reply: bytes, query: Query) -> bytes:
    """Reduce a reply to its header with TC, the question and OPT (RFC 6891 section 7)."""
    ident, flags, _, _, _, _ = HEADER.unpack_from(reply)
    header = HEADER.pack(ident, flags | TC, 1, 0, 0, query.edns is not None)
    opt = opt_record(do=query.edns.do) if query.edns else b""
    return header + query.question + opt


class Presence(Enum):
    """What a reply says about a name."""

    DATA = "data"
    NODATA = "nodata"
    NXDOMAIN = "nxdomain"
    FAILED = "failed"


def presence(reply: bytes) -> Presence:
    """Return what an upstream's reply, already checked by `verify.judge`, says about the name that was asked for."""
    _, flags, _, count, _, _ = HEADER.unpack_from(reply)
    rcode = flags & 0xF
    if count or (flags & TC and rcode == Rcode.NOERROR):
        return Presence.DATA  # also a CNAME whose target does not exist (RFC 6604): the name exists
    if rcode == Rcode.NXDOMAIN:
        return Presence.NXDOMAIN
    return Presence.NODATA if rcode == Rcode.NOERROR else Presence.FAILED


def join_orders(records: Iterable[bytes], most: int) -> list[bytes]:
    """Return all rotations of the records, each limited to `most` of them."""
    rows = tuple(records)
    return [b"".join((rows * 2)[turn : turn + min(most, len(rows))]) for turn in range(len(rows))]
