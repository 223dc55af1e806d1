"""Replies, byte by byte; dnspython reads them as a client would."""

import dns.flags
import dns.message
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnsgw.message.question import OWNER, ExtendedError, Qtype, Rcode, extended_error, record, scan
from dnsgw.message.reply import Answer, Presence, answer_prepared, presence, truncate
from tests.support.dns_packets import AD, CD, RD, header, opt, option, query, question

NAME = "p8443-10-1-0-5.b.svc.mesh.internal"
TAIL = record(OWNER, Qtype.A, 5, bytes([10, 0, 0, 9]))
FOUND = Answer(tails=(TAIL,), answers=1)
KEY = question(NAME)
PREPARED = {KEY: FOUND}


def test_an_answer_is_the_question_between_prepared_parts() -> None:
    expected = header(flags=0x8580, counts=(1, 1, 0, 0)) + question(NAME) + TAIL
    assert answer_prepared(query(NAME), PREPARED) == expected
    assert FOUND.reply(scan(query(NAME)), 512) == expected
    message = dns.message.from_wire(expected)
    assert [str(rrset) for rrset in message.answer] == [f"{NAME}. 5 IN A 10.0.0.9"]


@pytest.mark.parametrize("flags", [0, RD, CD, AD, RD | CD, RD | AD, CD | AD, RD | CD | AD])
@pytest.mark.parametrize("edns", [b"", opt(), opt(4096, do=True), opt(100, z=0x1234)])
def test_rd_and_cd_are_copied_and_ad_is_not(flags: int, edns: bytes) -> None:
    data = query(NAME, flags=flags, edns=edns, ident=0xFFFE)
    reply = answer_prepared(data, PREPARED)
    assert reply == FOUND.reply(scan(data), 512)
    message = dns.message.from_wire(reply or b"")
    assert message.id == 0xFFFE
    assert message.flags == dns.flags.QR | dns.flags.AA | dns.flags.RA | (flags & (RD | CD))
    assert message.edns == (0 if edns else -1)
    if edns:
        assert message.payload == 1232
        assert message.ednsflags == (0x8000 if edns == opt(4096, do=True) else 0)  # DO is copied, Z is not
        assert not message.options


def spelt(pattern: int) -> str:
    return "".join(letter.upper() if pattern >> index & 1 else letter for index, letter in enumerate(NAME))


@given(st.integers(0, (1 << len(NAME)) - 1), st.booleans())
def test_any_case_of_letters_is_found_and_returned(pattern: int, edns: bool) -> None:
    data = query(spelt(pattern), edns=opt() if edns else b"")
    reply = answer_prepared(data, PREPARED)
    assert reply is not None
    assert reply[12 : 12 + len(KEY)] == data[12 : 12 + len(KEY)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 12,
        query(NAME)[:-1],
        query(NAME)[:-5],
        query(NAME) + b"x",
        query(NAME, 28),
        query(NAME, qclass=3),
        query(NAME, flags=0x8100),
        query(NAME, flags=0x2900),
        query("x" + NAME),
        header(counts=(2, 0, 0, 0)) + question(NAME),
        header(counts=(1, 1, 0, 0)) + question(NAME),
        header(counts=(1, 0, 0, 1)) + question(NAME),
        header(counts=(1, 0, 0, 2)) + question(NAME) + opt(),
        header(counts=(1, 0, 0, 0)) + question(NAME) + opt(),
        query(NAME, edns=opt(version=1)),
        query(NAME, edns=opt(options=option(3))),
        query(NAME, edns=opt()[:-1] + b"\1"),
        query(NAME, edns=b"\1" + opt()[1:]),
        query(NAME, edns=b"\0\0\x10" + opt()[3:]),
        query(b"\x22" + NAME.encode() + b"\0"),
    ],
)
def test_unusual_questions_are_left_to_scan(data: bytes) -> None:
    assert answer_prepared(data, PREPARED) is None


def test_type_97_is_not_type_65_in_lower_case() -> None:
    nodata = Answer(rcode=Rcode.REFUSED)
    prepared = {question(NAME, 65): FOUND, question(NAME, 97): nodata}
    assert answer_prepared(query(NAME, 65), prepared) == FOUND.reply(scan(query(NAME, 65)), 512)
    assert answer_prepared(query(NAME, 97), prepared) == nodata.reply(scan(query(NAME, 97)), 512)


@given(st.binary(max_size=80))
def test_garbage_is_left_to_the_scanner(data: bytes) -> None:
    assert answer_prepared(data, PREPARED) is None


def test_orders_take_turns() -> None:
    answer = Answer(tails=[b"a", b"b", b"c"], answers=1)
    replies = [answer.reply(scan(query(NAME)), 512)[-1:] for _ in range(4)]
    assert replies == [b"a", b"b", b"c", b"a"]


def test_the_extended_rcode_and_errors_stand_in_opt() -> None:
    answer = Answer(Rcode.NXDOMAIN, authoritative=False, options=extended_error(ExtendedError.OTHER, "no such network"))
    message = dns.message.from_wire(answer.reply(scan(query(NAME, edns=opt(do=True))), 512))
    assert message.rcode() == dns.rcode.NXDOMAIN
    assert not message.flags & dns.flags.AA
    assert [(error.code, error.text) for error in message.extended_errors()] == [(0, "no such network")]
    assert answer.reply(scan(query(NAME)), 512) == header(flags=0x8183) + question(NAME)


def test_an_answer_that_could_be_too_long_is_left_to_the_scanner_which_truncates() -> None:
    answer = Answer(tails=(b"\0" * 480,), answers=1)
    data = query(NAME, edns=opt(512, do=True))
    assert answer_prepared(data, {KEY: answer}) is None
    assert answer.reply(scan(data), 512) == header(flags=0x8780, counts=(1, 0, 0, 1)) + question(NAME) + opt(do=True)
    assert len(answer.reply(scan(data), 1232)) == 12 + len(KEY) + 480 + 11


def test_truncation_keeps_the_question_and_the_rcode() -> None:
    read = scan(query("Www.Example"))
    whole = header(flags=0x8183, counts=(1, 7, 8, 9)) + question("Www.Example") + b"\0" * 900
    assert truncate(whole, read) == header(flags=0x8383) + question("Www.Example")


# Upstream's replies.


@pytest.mark.parametrize(
    ("flags", "answers", "said"),
    [
        (0x8180, 1, Presence.DATA),
        (0x8183, 1, Presence.DATA),  # a CNAME to nowhere
        (0x8380, 0, Presence.DATA),  # truncated: there is more
        (0x8180, 0, Presence.NODATA),
        (0x8183, 0, Presence.NXDOMAIN),
        (0x8182, 0, Presence.FAILED),
        (0x8185, 0, Presence.FAILED),
    ],
)
def test_what_a_reply_says_about_a_name(flags: int, answers: int, said: Presence) -> None:
    assert presence(header(flags=flags, counts=(1, answers, 0, 0)) + question("x")) is said
