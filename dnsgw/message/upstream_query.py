"""Questions for upstream: composed anew, with nothing of the client's that does not change the answer.

They have the name, the type, RD, CD and DO, and the client's subnet if that is forwarded. All else that a client sent (EDNS
size, Z bits, cookies, unknown options) is dropped, so questions with the same answer are one question (RFC 5452 section 5).
AD is always set, so upstream says whether it validated the answer (RFC 6840 section 5.7); `Message.as_reply` passes that on only
to clients that want it.

Sans-IO: randomness comes as an argument.
"""

from dnsgw.message.question import (
    AD,
    CD,
    CLIENT_SUBNET,
    HEADER,
    HEADER_SIZE,
    OPT_FIXED,
    RD,
    Query,
    opt_record,
    option,
)

_PADDING = 12
_BLOCK = 128  # RFC 8467 section 4.1
_HEADS = {
    (flags, edns): HEADER.pack(0, flags | AD, 1, 0, 0, edns)[2:]
    for flags in (0, RD, CD, RD | CD)
    for edns in (False, True)
}
# 0x20 for each lower-case letter. Length bytes of labels are below all letters.
_CASE_BITS = bytes(0x20 if 0x61 <= code <= 0x7A else 0 for code in range(256))


def subnet_of(query: Query) -> bytes:
    """Return the client's subnet as an encoded option if it sent a well-formed one (RFC 7871 section 6), else b""."""
    if query.edns is None:
        return b""
    found = [value for code, value in query.edns.options if code == CLIENT_SUBNET]
    if len(found) != 1 or len(found[0]) < 4:
        return b""
    family, prefix, scope, address = found[0][:2], found[0][2], found[0][3], found[0][4:]
    longest = {b"\0\1": 32, b"\0\2": 128}.get(family, -1)
    if scope or prefix > longest or len(address) != (prefix + 7) // 8:
        return b""
    return option(CLIENT_SUBNET, found[0])


def question_key(query: Query, *, subnet: bytes = b"") -> bytes:
    """Return a key that is the same for questions with the same answer."""
    if query.verbatim:
        return b"v" + query.verbatim
    do = query.edns is not None and query.edns.do
    return query.key + bytes((query.flags >> 8 & 1 | (2 if query.flags & CD else 0) | (4 if do else 0),)) + subnet


def encode(query: Query, question: bytes, *, edns: bool = True, options: bytes = b"", pad: bool = False) -> bytes:
    """Encode the message for upstream, without its id. One that came with more than OPT stays as it was.

    Args:
        query: the client's question.
        question: its question section in the spelling to ask in.
        edns: add OPT.
        options: encoded options for OPT.
        pad: pad it (RFC 7830), for encrypted transports only.
    """
    if query.verbatim:
        return query.verbatim
    do = query.edns is not None and query.edns.do
    head = _HEADS[query.flags & (RD | CD), edns]
    if not edns:
        return head + question
    if pad:
        bare = HEADER_SIZE + len(question) + OPT_FIXED.size + len(options) + 4
        options += option(_PADDING, bytes(-bare % _BLOCK))
    return head + question + opt_record(do=do, options=options)


def respelled(name: bytes, draw: bytes) -> bytes:
    """Return a lower-case name in random case (DNS 0x20). `draw`: as many random bytes as the name has."""
    letters = int.from_bytes(name.translate(_CASE_BITS), "big")
    return (int.from_bytes(name, "big") ^ letters & int.from_bytes(draw, "big")).to_bytes(len(name), "big")


def restored(answer: bytes, spelled: bytes, name: bytes) -> bytes:
    """Replace our random spelling with `name`, in the question and wherever the server repeated the name in full."""
    stop = HEADER_SIZE + len(name)
    rest = answer[stop:]
    return answer[:HEADER_SIZE] + name + (rest.replace(spelled, name) if spelled in rest else rest)
