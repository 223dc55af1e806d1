"""Questions for upstream."""

import os

import pytest

from dnsgw.message.question import Query, scan
from dnsgw.message.upstream_query import encode, question_key, respelled, restored, subnet_of
from tests.support.dns_packets import AD, CD, RD, header, name, opt, option, query, question

SUBNET = option(8, b"\0\1\x18\0\x0a\1\2")


def asked(text: str = "www.example.test", *, flags: int = RD, edns: bytes = b"") -> Query:
    return scan(query(text, flags=flags, edns=edns))


def test_questions_with_the_same_answer_have_the_same_key() -> None:
    edns = [b"", opt(512), opt(4096, z=0x7FFF), opt(options=SUBNET), opt(options=option(65001, b"x") + option(3))]
    assert len({question_key(asked(edns=each)) for each in edns}) == 1
    assert len({encode(asked(edns=each), question("www.example.test")) for each in edns}) == 1
    assert question_key(asked("WWW.example.test", flags=RD | AD)) == question_key(asked())


def test_what_changes_the_answer_does() -> None:
    shapes = [asked(flags=flags, edns=opt(do=do)) for flags in (0, RD, CD, RD | CD) for do in (False, True)]
    assert len({question_key(shape) for shape in shapes}) == 8
    assert len({encode(shape, shape.question) for shape in shapes}) == 8
    assert question_key(asked(), subnet=SUBNET) != question_key(asked())


@pytest.mark.parametrize(
    ("value", "passes"),
    [
        (b"\0\1\x18\0\x0a\1\2", True),
        (b"\0\2\x38\0" + bytes(7), True),
        (b"\0\1\0\0", True),
        (b"\0\1\x18\x10\x0a\1\2", False),
        (b"\0\1\x18\0\x0a\1", False),
        (b"\0\1\x21\0" + bytes(5), False),
        (b"\0\3\x08\0\1", False),
        (b"\0\1", False),
        (b"", False),
    ],
)
def test_a_subnet_is_passed_on_if_it_is_one(value: bytes, passes: bool) -> None:
    assert subnet_of(asked(edns=opt(options=option(8, value)))) == (option(8, value) if passes else b"")
    assert subnet_of(asked(edns=opt(options=option(8, value) * 2))) == b""


@pytest.mark.parametrize("length", [1, 50, 63])
def test_padding_fills_up_to_128_bytes(length: int) -> None:
    sent = encode(asked("a" * length + ".test"), question("a" * length + ".test"), options=SUBNET, pad=True)
    assert (len(sent) + 2) % 128 == 0
    read = scan(b"\0\0" + sent)
    assert read.edns is not None
    assert [code for code, _ in read.edns.options] == [8, 12]


def test_without_edns() -> None:
    assert encode(asked(edns=opt(do=True)), question("x.test"), edns=False) == header(0, RD | AD)[2:] + question(
        "x.test"
    )


def test_letters_get_a_random_case_and_nothing_else_changes() -> None:
    lower = (
        b"\x0aabcdefghij\x3f" + bytes(range(0x20, 0x41)) + bytes(range(0x5B, 0x61)) + bytes(range(0x7B, 0x93)) + b"\0"
    )
    seen = {respelled(lower, os.urandom(len(lower))) for _ in range(50)}
    assert len(seen) > 40
    assert {each.lower() for each in seen} == {lower}
    assert respelled(lower, bytes(len(lower))) == lower
    assert respelled(lower, b"\xff" * len(lower)) == lower.upper()


def test_our_spelling_does_not_stay_in_an_answer() -> None:
    lower, spelled = name("www.example.test"), name("wWw.eXample.tesT")
    head = header(flags=0x8180, counts=(1, 1, 0, 0))
    record = b"\0\1\0\1" + bytes(4) + b"\0\4abcd"
    whole = head + spelled + b"\0\1\0\1" + spelled + record
    assert restored(whole, spelled, lower) == head + lower + b"\0\1\0\1" + lower + record
    short = head + spelled + b"\0\1\0\1" + b"\xc0\x0c" + record
    assert restored(short, spelled, lower) == head + lower + b"\0\1\0\1" + b"\xc0\x0c" + record
