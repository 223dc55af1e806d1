"""Which packets are accepted as answers."""

import random
from typing import Any

import pytest

from dnsgw.upstream.verify import Verdict, find_opt, judge, question_of
from tests.support.dns_packets import header, name, opt, option, question

QUESTION = question("wWw.Example.test")
OURS, THEIRS = b"ourcooki", b"theirs.cookie..."
RECORD = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\1"


def reply(asked: bytes = QUESTION, edns: bytes = b"", *, flags: int = 0x8180, answers: int = 1) -> bytes:
    counts = (1, answers, 0, int(bool(edns)))
    return header(7, flags, counts) + asked + RECORD * answers + edns


def verdict(packet: bytes, **how: Any) -> Verdict:
    asked = {"spelled": True, "edns": True, "client_cookie": OURS, "expects_cookie": False, "stream": False, **how}
    return judge(packet, QUESTION, **asked)[0]


def cookie(value: bytes, **shape: Any) -> bytes:
    return opt(options=option(3, b"x") + option(10, value), **shape)


BADCOOKIE = (
    b"\0" + b"\0\x29\x04\xd0\x01\0\0\0" + len(option(10, OURS + THEIRS)).to_bytes(2, "big") + option(10, OURS + THEIRS)
)


@pytest.mark.parametrize(
    ("packet", "how", "expected"),
    [
        (reply(), {}, Verdict.ANSWER),
        (reply(flags=0x0180), {}, Verdict.NO_ANSWER),
        (reply(flags=0xA980), {}, Verdict.NO_ANSWER),
        (reply(question("www.example.tess")), {}, Verdict.NO_ANSWER),
        (reply(question("wWw.Example.test", 28)), {}, Verdict.NO_ANSWER),
        (reply()[:11], {}, Verdict.NO_ANSWER),
        (reply()[:12], {}, Verdict.NO_ANSWER),
        (reply()[:30], {}, Verdict.NO_ANSWER),
        (reply(question("example.test")), {}, Verdict.NO_ANSWER),
        (reply(QUESTION[:-2] + b"\0\3"), {}, Verdict.NO_ANSWER),
        (reply(name("wWw.Example.test")), {}, Verdict.NO_ANSWER),
        (header(7, 0x8181, (0, 1, 0, 0)) + RECORD, {}, Verdict.NO_ANSWER),
        (header(7, 0x8180, (0, 0, 0, 0)), {}, Verdict.NO_ANSWER),
        (header(7, 0x8180, (2, 0, 0, 0)) + QUESTION * 2, {}, Verdict.NO_ANSWER),
        (reply(question("www.example.test")), {}, Verdict.MISSPELLED),
        (reply(question("www.example.test")), {"stream": True}, Verdict.MISSPELLED),
        (reply(question("www.example.test")), {"spelled": False}, Verdict.ANSWER),
        (header(7, 0x8182, (0, 0, 0, 0)), {}, Verdict.BARE),
        (header(7, 0x8182, (0, 0, 0, 0)), {"stream": True}, Verdict.ANSWER),
        (header(7, 0x8181, (0, 0, 0, 0)), {"stream": True}, Verdict.NO_EDNS),
        (header(7, 0x8183, (0, 0, 0, 0)), {}, Verdict.NO_ANSWER),
        (reply(flags=0x8181, answers=0), {}, Verdict.NO_EDNS),
        (reply(flags=0x8181, answers=0), {"edns": False, "client_cookie": b""}, Verdict.ANSWER),
        (reply(edns=opt(), flags=0x8181, answers=0), {}, Verdict.ANSWER),
        (reply(edns=cookie(OURS + THEIRS)), {"expects_cookie": True}, Verdict.ANSWER),
        (reply(edns=cookie(OURS)), {"expects_cookie": True}, Verdict.NO_COOKIE),
        (reply(edns=opt()), {"expects_cookie": True}, Verdict.NO_COOKIE),
        (reply(), {"expects_cookie": True}, Verdict.NO_COOKIE),
        (reply(edns=cookie(b"otherone" + THEIRS)), {}, Verdict.NO_COOKIE),
        (reply(edns=cookie(b"otherone" + THEIRS)), {"client_cookie": b""}, Verdict.ANSWER),
        (reply(edns=BADCOOKIE, flags=0x8187, answers=0), {"expects_cookie": True}, Verdict.BAD_COOKIE),
    ],
)
def test_verdicts(packet: bytes, how: dict[str, Any], expected: Verdict) -> None:
    assert verdict(packet, **how) is expected


def test_opt_is_found_anywhere_and_nothing_raises() -> None:
    more = b"\0\0\x10\0\1\0\0\0\0\0\1x"
    packet = header(7, 0x8180, (1, 1, 0, 3)) + QUESTION + RECORD + more + cookie(OURS + THEIRS) + more
    found = find_opt(packet)
    assert found is not None
    assert found.cookie == OURS + THEIRS
    for stop in range(len(packet)):
        find_opt(packet[:stop])
        verdict(packet[:stop])
    draw = random.Random(1)
    for _ in range(2000):
        changed = bytearray(packet)
        for _ in range(4):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        verdict(bytes(changed))
        question_of(bytes(changed))


def test_the_question_of_a_reply() -> None:
    assert question_of(reply()) == name("www.example.test") + b"\0\1\0\1"
    assert question_of(reply(flags=0)) == question_of(b"x") == b""
