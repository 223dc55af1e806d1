"""Upstream's replies, read once: where records are, which names aliases lead to, and how they become our replies."""

import struct

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnsgw.message.compose import joined
from dnsgw.message.names import Malformed, name_at
from dnsgw.message.question import ExtendedError, extended_error, scan
from dnsgw.message.upstream_reply import MAX_CHAIN, MAX_OWNERS, Message
from dnsgw.upstream.cache import Cache, CacheConfig, key_of
from tests.support.dns_packets import AD, RD, header, name, opt, option, query, question

CHAIN = """id 1
flags QR RD RA AA AD
edns 0
;QUESTION
www.example.test. IN A
;ANSWER
www.example.test. 300 IN CNAME a.example.test.
a.example.test. 200 IN CNAME b.svc.mesh.internal.
b.svc.mesh.internal. 100 IN A 10.1.0.5
;AUTHORITY
example.test. 60 IN NS ns.example.test.
;ADDITIONAL
ns.example.test. 60 IN A 192.0.2.53
"""
ASKED = scan(query("WWW.example.test", edns=opt(do=True)))


def wire(text: str = CHAIN) -> bytes:
    return dns.message.from_text(text).to_wire()


def test_aliases_are_followed_in_any_order_of_the_records() -> None:
    lines = CHAIN.splitlines()
    turned = [*lines[:6], lines[8], lines[7], lines[6], *lines[9:]]
    for text in (CHAIN, "\n".join(turned)):
        assert Message(wire(text)).targets == (name("a.example.test"), name("b.svc.mesh.internal"))


def test_a_ring_of_aliases_ends() -> None:
    text = "id 1\nflags QR\n;QUESTION\na.test. IN A\n;ANSWER\na.test. 1 IN CNAME b.test.\nb.test. 1 IN CNAME a.test.\n"
    assert Message(wire(text)).targets == (name("b.test"), name("a.test"))


def test_a_reply_is_the_clients_and_opt_is_ours() -> None:
    reply = Message(wire()).as_reply(ASKED, extended_error(ExtendedError.OTHER, "x"))
    message = dns.message.from_wire(reply)
    assert reply[12:30] == ASKED.question[:18]
    assert [len(section) for section in (message.answer, message.authority, message.additional)] == [3, 1, 0]
    assert message.flags & dns.flags.AD
    assert message.ednsflags & dns.flags.DO
    plain = dns.message.from_wire(Message(wire()).as_reply(scan(query("www.example.test"))))
    assert plain.edns == -1
    assert not plain.flags & dns.flags.AD
    assert (
        dns.message.from_wire(Message(wire()).as_reply(scan(query("www.example.test", flags=RD | AD)))).flags
        & dns.flags.AD
    )


def test_upstreams_extended_errors_are_handed_on_and_its_other_options_are_not() -> None:
    packet = header(1, 0x8182, (1, 0, 0, 1)) + question("www.example.test")
    packet += opt(options=option(10, b"12345678") + option(15, b"\0\x16why") + option(12, b"\0"))
    reply = dns.message.from_wire(Message(packet).as_reply(ASKED))
    assert [option.otype for option in reply.options] == [15]
    assert reply.rcode() == dns.rcode.SERVFAIL


def test_an_opt_among_other_records_takes_the_additional_section_with_it() -> None:
    record = name("x.test") + bytes.fromhex("0001 0001 00000001 0004 c0000201")
    packet = header(1, 0x8180, (1, 0, 0, 2)) + question("www.example.test") + opt() + record
    reply = dns.message.from_wire(Message(packet).as_reply(ASKED))
    assert reply.additional == []
    assert reply.edns == 0


def test_an_extended_rcode_is_servfail_for_clients_without_edns() -> None:
    packet = header(1, 0x8187, (1, 0, 0, 1)) + question("www.example.test")
    packet += b"\0" + bytes.fromhex("0029 04d0 01000000 0000")
    assert dns.message.from_wire(Message(packet).as_reply(ASKED)).rcode() == 23
    assert dns.message.from_wire(Message(packet).as_reply(scan(query("www.example.test")))).rcode() == 2


BINDINGS = """id 1
flags QR RD RA
;QUESTION
www.example.test. IN HTTPS
;ANSWER
www.example.test. 60 IN HTTPS 1 A.svc.mesh.INTERNAL. ipv4hint=10.1.0.5
www.example.test. 60 IN HTTPS 2 a.svc.mesh.internal. alpn=h3
www.example.test. 60 IN HTTPS 3 b.svc.mesh.internal. port=1
www.example.test. 60 IN HTTPS 4 . ipv4hint=10.1.0.5
;AUTHORITY
example.test. 60 IN HTTPS 1 other.test.
;ADDITIONAL
A.svc.mesh.internal. 60 IN A 10.1.0.5
a.svc.mesh.internal. 60 IN AAAA fd00::5
b.svc.mesh.internal. 60 IN TXT x
"""


def test_targets_of_bindings_are_found() -> None:
    message = Message(wire(BINDINGS))
    assert set(message.bindings) == {name("a.svc.mesh.internal"), name("b.svc.mesh.internal")}
    aliases = BINDINGS.replace("HTTPS 3 b.svc.mesh.internal. port=1", "HTTPS 0 b.svc.mesh.internal.")
    assert Message(wire(aliases)).bindings == (name("a.svc.mesh.internal"),)
    assert Message(wire()).bindings == ()
    for end in (b"", b"\0", b"\0\1", b"\0\1\3abc", b"\0\1\xc0"):
        packet = header(1, 0x8180, (1, 1, 0, 0)) + question("www.example.test", 65)
        with pytest.raises(Malformed):
            Message(packet + b"\xc0\x0c\0\x41\0\1\0\0\0\1" + len(end).to_bytes(2, "big") + end)


# What does not belong to the question.

LIES = """id 1
flags QR RD RA
edns 0
;QUESTION
www.example.test. IN A
;ANSWER
WWW.example.test. 300 IN CNAME a.example.test.
bank.test. 300 IN A 192.0.2.66
www.example.test. 300 IN TXT "x"
a.example.test. 300 IN A 192.0.2.1
a.example.test. 300 IN A 192.0.2.2
a.example.test. 300 IN AAAA 2001:db8::66
b.a.example.test. 300 IN A 192.0.2.66
example.test. 300 IN A 192.0.2.66
bank.test. 300 IN CNAME a.example.test.
a.example.test. 300 IN RRSIG A 8 3 300 20300101000000 20200101000000 1 example.test. AAAA
bank.test. 300 IN RRSIG A 8 3 300 20300101000000 20200101000000 1 bank.test. AAAA
;AUTHORITY
example.test. 60 IN NS ns.example.test.
www.example.test. 60 IN NS ns.example.test.
test. 60 IN NS ns.test.
. 60 IN NS ns.test.
le.test. 60 IN NS ns.bank.test.
bank.test. 60 IN NS ns.bank.test.
c.www.example.test. 60 IN NS ns.bank.test.
www.example.test. 60 IN A 192.0.2.66
example.test. 60 IN SOA ns.example.test. admin.example.test. 1 2 3 4 5
bank.test. 60 IN SOA ns.bank.test. admin.bank.test. 1 2 3 4 5
example.test. 60 IN DS 1 8 1 0000000000000000000000000000000000000000
z.example.test. 60 IN NSEC zz.example.test. A
;ADDITIONAL
ns.example.test. 60 IN A 192.0.2.66
bank.test. 60 IN A 192.0.2.66
"""


def test_records_that_do_not_belong_to_the_question_are_dropped() -> None:
    reply = dns.message.from_wire(Message(wire(LIES)).as_reply(ASKED))
    assert sorted(line.lower() for item in reply.answer for line in str(item).splitlines()) == [
        "a.example.test. 300 in a 192.0.2.1",
        "a.example.test. 300 in a 192.0.2.2",
        "a.example.test. 300 in rrsig a 8 3 300 20300101000000 20200101000000 1 example.test. aaaa",
        "www.example.test. 300 in cname a.example.test.",
    ]
    owners = sorted((item.name.to_text().lower(), dns.rdatatype.to_text(item.rdtype)) for item in reply.authority)
    assert owners == [
        (".", "NS"),
        ("example.test.", "DS"),
        ("example.test.", "NS"),
        ("example.test.", "SOA"),
        ("test.", "NS"),
        ("www.example.test.", "NS"),
        ("z.example.test.", "NSEC"),
    ]
    assert reply.additional == []
    assert "192.0.2.66" not in str(reply)


def test_it_is_not_kept_either() -> None:
    asked = scan(query("www.example.test", edns=opt(do=True)))
    key = key_of(asked)
    assert key is not None
    cache = Cache(CacheConfig())
    entry = cache.put(key, Message(wire(LIES)), 0.0)
    assert entry is not None
    kept = dns.message.from_wire(entry.reply(asked, 1.0))
    assert "192.0.2.66" not in str(kept)
    assert "192.0.2.1" in str(kept)


def test_the_name_asked_for_has_the_askers_spelling_in_every_record() -> None:
    records = "www.example.test. 60 IN A 192.0.2.1\nwww.example.test. 60 IN A 192.0.2.2\n"
    data = wire(f"id 1\nflags QR RD RA\n;QUESTION\nwww.example.test. IN A\n;ANSWER\n{records}")
    stop = data.index(b"\xc0\x0c")
    spelled = data[12:stop][:-4].upper()
    written_out = data[:stop] + data[stop:].replace(b"\xc0\x0c", spelled)
    asked = scan(query("wWw.eXample.test"))
    reply = Message(written_out).as_reply(asked)
    assert {str(rrset.name) for rrset in dns.message.from_wire(reply).answer} == {"wWw.eXample.test."}
    assert len(dns.message.from_wire(reply).answer[0]) == 2


def test_records_that_belong_are_left_unchanged() -> None:
    for text in (CHAIN, BINDINGS):
        data = wire(text.split(";AUTHORITY")[0])
        assert Message(data).data is data


@pytest.mark.parametrize(
    "answer",
    ["bank.test. 1 IN A 192.0.2.66", "www.example.test. 1 IN AAAA 2001:db8::66"],
)
def test_an_answer_of_nothing_but_something_else_is_none(answer: str) -> None:
    soa = ";AUTHORITY\nexample.test. 60 IN SOA ns.example.test. admin.example.test. 1 2 3 4 5\n"
    for more in ("", soa):
        with pytest.raises(Malformed):
            Message(wire(f"id 1\nflags QR\n;QUESTION\nwww.example.test. IN A\n;ANSWER\n{answer}\n{more}"))


def test_other_classes_are_not_asked_for() -> None:
    good = b"\xc0\x0c" + bytes.fromhex("0001 0001 00000001 0004 c0000201")
    for rclass in (0, 3, 4, 254, 255):
        other = good[:4] + rclass.to_bytes(2, "big") + good[6:-1] + b"\x42"
        packet = header(1, 0x8180, (1, 2, 0, 0)) + question("www.example.test") + other + good
        reply = dns.message.from_wire(Message(packet).as_reply(ASKED))
        assert [str(item) for item in reply.answer] == ["WWW.example.test. 1 IN A 192.0.2.1"]


@pytest.mark.parametrize(("questions", "asked"), [(0, b""), (1, b"\xc0\x0c\0\1\0\1")])
def test_answers_to_no_question_are_none(questions: int, asked: bytes) -> None:
    answer = b"\0" + bytes.fromhex("0001 0001 00000001 0004 c0000201")
    zone = b"\0" + bytes.fromhex("0002 0001 00000001 0001 00")
    with pytest.raises(Malformed):
        Message(header(1, 0x8180, (questions, 1, 1, 0)) + asked + answer + zone)


def test_any_is_any_type_of_the_name() -> None:
    text = LIES.replace("www.example.test. IN A\n;ANSWER", "a.example.test. IN ANY\n;ANSWER")
    reply = dns.message.from_wire(Message(wire(text)).as_reply(scan(query("a.example.test", 255))))
    assert {str(item.name) for item in reply.answer} == {"a.example.test."}
    assert {dns.rdatatype.to_text(item.rdtype) for item in reply.answer} == {"A", "AAAA", "RRSIG"}


def test_records_of_one_set_live_equally_long() -> None:
    """RFC 2181 section 5.2: the shortest of their lives is all of theirs; another set's is its own."""

    def answer(rtype: int, ttl_s: int, data: bytes) -> bytes:
        return b"\xc0\x0c" + struct.pack("!HHIH", rtype, 1, ttl_s, len(data)) + data

    records = [answer(1, ttl_s, bytes([10, 0, 0, ttl_s])) for ttl_s in (30, 5, 60)] + [
        answer(46, 90, b"\0\1" + bytes(20))
    ]
    reply = Message(header(flags=0x8180, counts=(1, 4, 0, 0)) + question("www.example.test") + b"".join(records))
    assert [place.ttl_s for place in reply.places] == [5, 5, 5, 90]
    read = dns.message.from_wire(reply.as_reply(scan(query("www.example.test"))), ignore_trailing=True)
    assert {rrset.ttl for rrset in read.answer if rrset.rdtype == dns.rdatatype.A} == {5}


def test_a_dname_is_kept_with_the_cname_made_of_it() -> None:
    text = """id 1
flags QR
;QUESTION
a.old.test. IN A
;ANSWER
old.test. 9 IN DNAME new.test.
old.test. 9 IN RRSIG DNAME 8 3 300 20300101000000 20200101000000 1 old.test. AAAA
a.old.test. 9 IN CNAME a.new.test.
a.new.test. 9 IN A 192.0.2.1
"""
    asked = scan(query("a.old.test"))
    assert len(dns.message.from_wire(Message(wire(text)).as_reply(asked)).answer) == 4
    more = (
        text
        + "bank.test. 9 IN DNAME new.test.\nold.test. 9 IN RRSIG A 8 3 300 20300101000000 20200101000000 1 o. AAAA\n"
    )
    kept = dns.message.from_wire(Message(wire(more)).as_reply(asked)).answer
    assert [str(item.name) for item in kept] == ["old.test.", "old.test.", "a.old.test.", "a.new.test."]


def test_a_chain_without_an_end_is_none() -> None:
    def chain(count: int) -> bytes:
        links = "".join(f"n{n}.test. 1 IN CNAME n{n + 1}.test.\n" for n in range(count))
        return wire(f"id 1\nflags QR\n;QUESTION\nn0.test. IN A\n;ANSWER\n{links}n{count}.test. 1 IN A 192.0.2.1\n")

    message = Message(chain(MAX_CHAIN))
    assert len(message.targets) == MAX_CHAIN
    assert message.has_data(1)
    with pytest.raises(Malformed):
        Message(chain(MAX_CHAIN + 1))


def test_a_message_full_of_long_names_takes_no_long_work() -> None:
    """65,535 bytes whose every record has a name of 127 labels, of its own or not, are looked at in part only."""
    asked = b"\1a" * 127 + b"\0"
    head = question(asked)
    for owner in (lambda n: b"\1b" + b"\xc0\x0e", lambda n: b"\xc0" + bytes((14 + 2 * (n % 100),))):
        record = [owner(n) + bytes.fromhex("0005 0001 00000001 0002 c00c") for n in range(4000)]  # type: ignore[no-untyped-call]
        packet = header(1, 0x8180, (1, len(record), 0, 0)) + head + b"".join(record)
        names: list[int] = []

        def counted(data: bytes, position: int, stop: int | None = None, *, names: list[int] = names) -> bytes:
            names.append(position)
            return name_at(data, position, stop)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dnsgw.message.upstream_reply.name_at", counted)
            with pytest.raises(Malformed):
                Message(packet)
        assert len(names) <= 2 * MAX_OWNERS


@given(st.sampled_from([CHAIN, BINDINGS, LIES]), st.integers(0, 900), st.binary(max_size=12), st.integers(0, 12))
def test_a_spoilt_reply_is_read_or_malformed(text: str, at: int, spoilt: bytes, skip: int) -> None:
    data = wire(text)
    data = data[:at] + spoilt + data[at + skip :]
    try:
        message = Message(data)
        message.as_reply(ASKED)
        joined(ASKED, message, len(message.targets), message)
    except Malformed:
        pass
