"""The parser, byte by byte: what is a question, and the error reply to anything else."""

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dnsgw.message.question import (
    BadQuery,
    Fault,
    Qtype,
    extended_error,
    opt_record,
    scan,
    wire_name,
)
from tests.support.dns_packets import AD, CD, RD, header, name, opt, option, query, question

NAME = "p8443-10-1-0-5.b.svc.mesh.internal"
LONGEST = ".".join(["a" * 63] * 3 + ["b" * 61])  # 255 bytes on the wire


def refused(data: bytes) -> BadQuery:
    with pytest.raises(BadQuery) as caught:
        scan(data)
    return caught.value


def test_a_plain_question() -> None:
    data = query(NAME)
    read = scan(data)
    assert (read.id, read.flags, read.qtype, read.edns) == (0x1234, RD, Qtype.A, None)
    assert read.question == data[12:]
    assert read.name == name(NAME)
    assert read.key == data[12:]
    assert read.text() == NAME
    assert read.limit == 512


def test_letters_are_lowered_for_looking_up_and_kept_for_the_reply() -> None:
    read = scan(query("P8443-10-1-0-5.B.svc.MESH.internal", Qtype.HTTPS))
    assert read.name == name(NAME)
    assert read.question == question("P8443-10-1-0-5.B.svc.MESH.internal", 65)
    assert read.qtype == 65  # which is the letter A, and stays 65
    assert read.key[-4:] == b"\0\x41\0\x01"


def test_the_root_and_the_longest_name_are_names() -> None:
    assert scan(query("")).labels == ()
    assert scan(query("")).text() == ""
    assert len(name(LONGEST)) == 255
    assert scan(query(LONGEST)).text() == LONGEST


def test_labels_begin_where_they_begin() -> None:
    read = scan(query("ab.cde.f"))
    assert read.labels == (0, 3, 7)


@pytest.mark.parametrize("label", [b"a.b", b".", b"..a"])
def test_a_dot_inside_a_label_has_no_text(label: bytes) -> None:
    assert scan(query(bytes([len(label)]) + label + b"\x03com\0")).text() is None


def test_eight_bit_labels_are_names() -> None:
    assert scan(query(b"\x03\xc3\xa9x\x03com\0")).name == b"\x03\xc3\xa9x\x03com\0"


@pytest.mark.parametrize("flags", [0, RD, CD, AD, RD | CD | AD, 0x0040, 0x0400, 0x0200, 0x0080, 0x0003])
def test_flags_of_a_query_that_mean_nothing_in_it_are_ignored(flags: int) -> None:
    assert scan(query(NAME, flags=flags)).flags == flags


@pytest.mark.parametrize(
    ("record", "limit"),
    [
        (opt(1232), 1232),
        (opt(4096), 1232),
        (opt(1400), 1232),
        (opt(600), 600),
        (opt(512), 512),
        (opt(511), 512),
        (opt(0), 512),
        (opt(65535), 1232),
    ],
)
def test_the_size_of_a_reply_is_negotiated(record: bytes, limit: int) -> None:
    assert scan(query(NAME, edns=record)).limit == limit


def test_edns_is_read() -> None:
    record = opt(1400, do=True, options=option(3) + option(10, b"12345678") + option(65001, b"x"), z=0x4321)
    edns = scan(query(NAME, edns=record)).edns
    assert edns is not None
    assert (edns.size, edns.version, edns.do) == (1400, 0, True)
    assert edns.options == (
        (3, b""),
        (10, b"12345678"),
        (65001, b"x"),
    )  # the empty one too, which dnslib loses at the end


def test_a_zero_length_last_option_is_kept() -> None:
    edns = scan(query(NAME, edns=opt(options=option(3)))).edns
    assert edns is not None
    assert edns.options == ((3, b""),)


def test_other_additional_records_are_skipped() -> None:
    tsig = name("key.example") + struct.pack("!HHIH", 250, 255, 0, 5) + b"12345"
    pointed = b"\xc0\x0c" + struct.pack("!HHIH", 250, 255, 0, 0)
    for extra in (opt() + tsig, tsig + opt(), opt() + pointed):
        data = header(counts=(1, 0, 0, 2)) + question(NAME) + extra
        edns = scan(data).edns
        assert edns is not None
        assert data[edns.start : edns.stop] == opt()


# What is dropped, what is refused, and the content of the refusal.

SILENT = [
    (b"", Fault.SHORT),
    (query(NAME)[:11], Fault.SHORT),
    (query(NAME, flags=0x8000), Fault.RESPONSE),
    (query(NAME, flags=0x8180, edns=opt()), Fault.RESPONSE),
    (header(flags=0xFFFF, counts=(0, 0, 0, 0)), Fault.RESPONSE),
]


@pytest.mark.parametrize(("data", "fault"), SILENT)
def test_fragments_and_answers_are_met_with_silence(data: bytes, fault: Fault) -> None:
    bad = refused(data)
    assert (bad.fault, bad.reply) == (fault, b"")


UNREADABLE = {
    "no question": header(counts=(0, 0, 0, 0)),
    "two questions": header(counts=(2, 0, 0, 0)) + question(NAME) * 2,
    "65535 questions": header(counts=(65535, 0, 0, 0)) + question(NAME),
    "an answer": header(counts=(1, 1, 0, 0))
    + question(NAME)
    + b"\xc0\x0c"
    + struct.pack("!HHIH4s", 1, 1, 5, 4, b"1234"),
    "an authority": header(counts=(1, 0, 1, 0)) + question(NAME),
    "a question that is cut": query(NAME)[:-1],
    "a type that is cut": query(NAME)[:-4],
    "a name that is cut": query(NAME)[:20],
    "nothing behind the header": header(),
    "a pointer to itself": header() + question(b"\xc0\x0c"),
    "a pointer in the name": header() + question(b"\x01a\xc0\x0c"),
    "label type 01": header() + question(b"\x41" + b"a" * 65 + b"\0"),
    "label type 10": header() + question(b"\x80" + b"a" * 128 + b"\0"),
    "a name of 256 bytes": query(".".join(["a" * 63] * 3 + ["b" * 62])),
    "a name of 64 labels and 4 kB": query(".".join(["a" * 63] * 64)),
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_question_is_formerr_with_a_header_only(data: bytes) -> None:
    bad = refused(data)
    assert bad.fault is Fault.FORMAT
    assert bad.reply == header(flags=0x8181, counts=(0, 0, 0, 0))


UNREADABLE_BEHIND = {
    "trailing bytes": (query(NAME) + b"x", False),
    "a record that is not there": (header(counts=(1, 0, 0, 1)) + question(NAME), False),
    "a record that is cut": (query(NAME, edns=opt())[:-1], False),
    "65535 records": (header(counts=(1, 0, 0, 65535)) + question(NAME) + opt(), True),
    "two OPT": (header(counts=(1, 0, 0, 2)) + question(NAME) + opt() + opt(), True),
    "an OPT with a name": (query(NAME, edns=opt(owner=name("x"))), True),
    "an OPT with a pointer to a name": (query(NAME, edns=opt(owner=b"\xc0\x0c")), True),
    "options longer than the record": (query(NAME, edns=opt(options=struct.pack("!HH", 3, 1))), True),
    "half an option": (query(NAME, edns=opt(options=b"\0\3\0")), True),
    "a record longer than the message": (
        query(NAME, edns=b"\0" + struct.pack("!HHIH", 41, 1232, 0, 65535) + option(3)),
        True,
    ),
    "an owner with label type 01": (query(NAME, edns=b"\x41" + b"a" * 80), False),
}


@pytest.mark.parametrize(("data", "edns"), UNREADABLE_BEHIND.values(), ids=UNREADABLE_BEHIND)
def test_errors_behind_the_question_are_formerr_with_the_question(data: bytes, edns: bool) -> None:
    bad = refused(data)
    assert bad.fault is Fault.FORMAT
    expected = header(flags=0x8181, counts=(1, 0, 0, int(edns))) + question(NAME) + (opt() if edns else b"")
    assert bad.reply == expected


def test_a_missing_question_with_edns_is_formerr_with_edns() -> None:
    assert refused(header(counts=(0, 0, 0, 1)) + opt()).reply == header(flags=0x8181, counts=(0, 0, 0, 1)) + opt()


@pytest.mark.parametrize("opcode", [1, 2, 3, 4, 5, 6, 15])
def test_other_opcodes_are_not_implemented(opcode: int) -> None:
    flags = opcode << 11
    bad = refused(query(NAME, 6, flags=flags, edns=opt(do=True)))
    assert bad.fault is Fault.OPCODE
    assert bad.reply == header(flags=0x8084 | flags, counts=(1, 0, 0, 1)) + question(NAME, 6) + opt(do=True)
    assert refused(header(flags=flags, counts=(1, 1, 1, 0)) + question(NAME, 6)).reply == header(
        flags=0x8084 | flags, counts=(0, 0, 0, 0)
    )


@pytest.mark.parametrize("version", [1, 2, 255])
def test_later_versions_of_edns_are_badvers(version: int) -> None:
    bad = refused(query(NAME, edns=opt(version=version, do=True, options=option(65001, b"x"))))
    assert bad.fault is Fault.VERSION
    # BADVERS is 16: 1 in the OPT record, 0 in the header; our version is 0; options are not echoed.
    badvers = b"\0" + struct.pack("!HHBBHH", 41, 1232, 1, 0, 0x8000, 0)
    assert bad.reply == header(flags=0x8180, counts=(1, 0, 0, 1)) + question(NAME) + badvers


@pytest.mark.parametrize("qclass", [0, 2, 3, 4, 254, 255, 65535])
def test_other_classes_are_refused(qclass: int) -> None:
    bad = refused(query("version.bind", 16, qclass=qclass, flags=RD | CD, edns=opt()))
    assert bad.fault is Fault.CLASS
    assert bad.reply == header(flags=0x8195, counts=(1, 0, 0, 1)) + question("version.bind", 16, qclass) + opt()


@given(st.binary(max_size=300))
@example(header(counts=(1, 0, 0, 65535)) + question("a") + b"\0\0\x29" * 60)
def test_garbage_is_read_or_refused(data: bytes) -> None:
    try:
        scan(data)
    except BadQuery as bad:
        assert not bad.reply or bad.reply[:2] == data[:2]  # noqa: PT017 - most runs raise
        assert len(bad.reply) <= len(data) + 11  # noqa: PT017 - never worth a forged source


@given(st.binary(max_size=200), st.integers(0, 3), st.integers(0, 3))
def test_garbage_behind_a_good_header_is_read_or_refused(rest: bytes, questions: int, extra: int) -> None:
    try:
        scan(header(counts=(questions, 0, 0, extra)) + rest)
    except BadQuery as bad:
        assert bad.reply[2:4] == b"\x81\x81" or bad.fault is not Fault.FORMAT  # noqa: PT017


@given(st.data())
def test_a_packet_with_changed_bytes_is_read_or_refused(data: st.DataObject) -> None:
    packet = bytearray(query(NAME, edns=opt(options=option(10, b"12345678") + option(3))))
    for _ in range(data.draw(st.integers(1, 4))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    try:
        scan(bytes(packet[: data.draw(st.integers(0, len(packet)))]))
    except BadQuery:
        pass


LABELS = st.lists(st.binary(min_size=1, max_size=63), max_size=8)


@given(LABELS, st.integers(0, 65535))
def test_every_name_of_valid_length_is_read(labels: list[bytes], qtype: int) -> None:
    wire = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    data = query(wire, qtype)
    if len(wire) > 255:
        assert refused(data).fault is Fault.FORMAT
        return
    read = scan(data)
    assert read.name == wire.lower()
    assert len(read.labels) == len(labels)
    assert all(
        read.name[start + 1 :].startswith(label.lower()) for start, label in zip(read.labels, labels, strict=True)
    )


# What upstream gets.


def test_a_query_with_more_than_opt_is_passed_on_but_for_options_of_one_hop() -> None:
    tsig = name("key.example") + struct.pack("!HHIH", 250, 255, 0, 5) + b"12345"
    data = header(counts=(1, 0, 0, 2)) + question(NAME) + opt(options=option(10, b"12345678")) + tsig
    assert scan(data).verbatim == data[2:12] + question(NAME) + opt() + tsig
    data = header(counts=(1, 0, 0, 2)) + question(NAME) + opt(options=option(3)) + tsig
    assert scan(data).verbatim == data[2:]
    assert scan(query(NAME, edns=opt(options=option(3)))).verbatim == scan(query(NAME)).verbatim == b""


# Pieces.


def test_names_are_encoded_in_lower_case() -> None:
    assert wire_name("Svc.Mesh.internal.") == name("svc.mesh.internal")
    assert wire_name("") == wire_name(".") == b"\0"
    assert len(wire_name(LONGEST)) == 255


@pytest.mark.parametrize("text", ["a..b", ".a", "a" * 64, "é", LONGEST + "b", "a.."])
def test_invalid_names_are_not_encoded(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        wire_name(text)


def test_an_extended_error_is_cut_between_characters() -> None:
    encoded = extended_error(22, "é" * 100)  # type: ignore[arg-type]
    assert encoded[:6] == struct.pack("!HHH", 15, len(encoded) - 4, 22)
    assert encoded[6:].decode() == "é" * 60
    assert opt_record(do=False, options=encoded)[-len(encoded) :] == encoded
