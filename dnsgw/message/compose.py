"""Replies composed of upstream's messages and our own. Sans-IO. The only error is Malformed."""

from dnsgw.message.question import AA, AD, HEADER, Query, opt_record
from dnsgw.message.upstream_reply import Message, Section


def joined(query: Query, chain: Message, count: int, end: Message) -> bytes:
    """Compose a reply to `query` of the first `count` aliases of `chain`, and of `end`, the reply about the name they lead to.

    The response code is that of the last name (RFC 6604 section 3). A composed reply is neither authoritative nor validated.
    Raises Malformed.
    """
    records = list(chain.aliases(count))
    answers = [end.standalone(place) for place in end.places if place.section == Section.ANSWER]
    authorities = [end.standalone(place) for place in end.places if place.section == Section.AUTHORITY]
    edns = query.edns is not None
    head = HEADER.pack(query.id, end.flags & ~(AA | AD), 1, len(records) + len(answers), len(authorities), edns)
    opt = opt_record(do=query.edns.do, rcode=end.rcode, options=end.extended_errors) if query.edns else b""
    return b"".join((head, query.question, *records, *answers, *authorities, opt))


def retargeted(query: Query, name: bytes) -> Query:
    """Return the same question about another name, given in wire form."""
    labels = []
    position = 0
    while length := name[position]:
        labels.append(position)
        position += length + 1
    question = name + query.question[-4:]
    return Query(
        id=query.id,
        flags=query.flags,
        question=question,
        name=name.lower(),
        labels=tuple(labels),
        qtype=query.qtype,
        edns=query.edns,
    )


def with_option(reply: bytes, extra: bytes) -> bytes:
    """Add an encoded option to the OPT of a reply of ours; unchanged if OPT is not its last record. Raises Malformed."""
    # The message is parsed from the start: our replies are short, and OPT is their last record.
    message = Message(reply)
    opt = message.opt
    if opt is None or opt.stop != len(reply):
        return reply
    size = opt.stop - opt.start + len(extra)
    at = opt.start - 2
    return reply[:at] + size.to_bytes(2, "big") + reply[opt.start :] + extra
