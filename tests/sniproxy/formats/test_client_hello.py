"""The ClientHello parser: every corner case at byte level, any split, any mutation, and real clients."""

import hashlib
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.formats.client_hello import (
    MAX_RECORD,
    MAX_RECORD_HEADERS,
    Hello,
    HelloError,
    HelloReader,
    HelloReason,
    parse_client_hello,
)
from sniproxy.formats.tls_alert import AlertDescription
from tests.support.corner_cases import (
    BAD_NAMES,
    FROM_THE_HEADER,
    NAME,
    NAMELESS,
    OTHER_PROTOCOLS,
    PLAIN,
    ROUTED,
    SNI,
    grow,
    singly,
)
from tests.support.hellos import (
    BROKEN,
    CHANGE_CIPHER_SPEC,
    EARLY_DATA,
    X25519MLKEM768,
    alpn,
    client_hello,
    ech,
    key_share,
    message,
    record,
    records,
    records_cut,
    server_name,
    supported_versions,
)

NOT_TLS, BAD_HELLO, NO_SNI, BAD_NAME = HelloReason


def read(*pieces: bytes, max_hello_bytes: int = 65536) -> Hello | None:
    """Feed the pieces, and check that `raw` has them unchanged."""
    reader = HelloReader(max_hello_bytes)
    hello = None
    for piece in pieces:
        assert hello is None or piece == b""
        hello = reader.feed(piece)
    assert reader.raw == b"".join(pieces)
    return hello


# --- what is routed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", ROUTED.values(), ids=ROUTED.keys())
def test_routed(pieces: list[bytes]) -> None:
    hello = read(*pieces)
    assert hello is not None
    assert (hello.server_name, hello.raw_name) == (NAME.decode(), NAME)


def test_fragments_of_the_name_join_without_record_headers() -> None:
    """The case in which other parsers found a name that no client sent (CVE-2026-32305 and similar)."""
    hello = read(records_cut(message(server_name(b"foof")), [message(server_name(b"foof")).index(b"foof") + 3]))
    assert hello is not None
    assert hello.raw_name == b"foof"


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        (b"_8443._10-0-0-5._NETB.svc.Mesh.Internal", "_8443._10-0-0-5._netb.svc.mesh.internal"),
        (b"p8443-x00000000000000000000000000000001.b.svc", "p8443-x00000000000000000000000000000001.b.svc"),
        (b"orders.shop.example.", "orders.shop.example"),
        (b"ORDERS", "orders"),
        (b"a" * 63 + b"." + b"b" * 63 + b"." + b"c" * 63 + b"." + b"d" * 61, None),
        (b"a" * 63 + b"." + b"b" * 63 + b"." + b"c" * 63 + b"." + b"d" * 61 + b".", None),
        (b"10.0.0.5.example", "10.0.0.5.example"),
        (b"a.x0", "a.x0"),
    ],
)
def test_names_that_route(sent: bytes, name: str | None) -> None:
    hello = read(client_hello(sent))
    assert hello is not None
    assert hello.server_name == (name or sent.decode().removesuffix("."))
    assert hello.raw_name == sent


def test_what_comes_behind_the_hello_is_kept_and_not_looked_at() -> None:
    for behind in (CHANGE_CIPHER_SPEC + EARLY_DATA, b"anything", record(b""), records(PLAIN)):
        for wire in (records(PLAIN) + behind, records(PLAIN, 1) + behind):
            reader = HelloReader()
            hello = reader.feed(wire)
            assert hello is not None
            assert reader.raw == wire
            assert reader.feed(b"more") is hello
            assert reader.raw == wire + b"more"


def test_all_fields_of_a_hello() -> None:
    whole = message(
        SNI, supported_versions(0x2A2A, 0x0304, 0x0303), alpn(b"h2", b"http/1.1"), ech(), session_id=bytes(32)
    )
    assert read(records(whole, 100)) == Hello(
        server_name="orders.shop.example",
        raw_name=NAME,
        digest=hashlib.sha256(whole).digest(),
        alpn=(b"h2", b"http/1.1"),
        versions=(0x0304, 0x0303),
        ech=True,
        size=len(whole),
    )
    assert read(records(PLAIN)) == Hello(
        server_name="orders.shop.example",
        raw_name=NAME,
        digest=hashlib.sha256(PLAIN).digest(),
        alpn=(),
        versions=(0x0303,),
        ech=False,
        size=len(PLAIN),
    )
    assert parse_client_hello(PLAIN) == read(records(PLAIN))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", OTHER_PROTOCOLS.values(), ids=OTHER_PROTOCOLS.keys())
def test_not_tls(wire: bytes) -> None:
    first = 2 if wire[0] == 22 else 1  # refused as soon as the bytes show it
    for pieces in ([wire], singly(wire[:first])):
        with pytest.raises(HelloError) as refused:
            read(*pieces)
        assert refused.value.reason is NOT_TLS
        assert refused.value.alert is None


@pytest.mark.parametrize("wire", FROM_THE_HEADER.values(), ids=FROM_THE_HEADER.keys())
def test_refused_from_the_header(wire: bytes) -> None:
    for pieces in ([wire[:-1], wire[-1:]], singly(wire)):
        reader = HelloReader()
        for piece in pieces[:-1]:
            assert reader.feed(piece) is None
        with pytest.raises(HelloError) as refused:
            reader.feed(pieces[-1])
        assert refused.value.reason is BAD_HELLO
        assert refused.value.alert is AlertDescription.DECODE_ERROR
        with pytest.raises(HelloError):  # and that is final
            reader.feed(records(PLAIN))


@pytest.mark.parametrize("whole", BROKEN.values(), ids=BROKEN.keys())
def test_broken_structure(whole: bytes) -> None:
    for pieces in ([records(whole)], singly(records(whole)), [records(whole, 1)]):
        with pytest.raises(HelloError) as refused:
            read(*pieces)
        assert refused.value.reason is BAD_HELLO
        assert refused.value.alert is AlertDescription.DECODE_ERROR


@pytest.mark.parametrize("whole", NAMELESS.values(), ids=NAMELESS.keys())
def test_no_name(whole: bytes) -> None:
    with pytest.raises(HelloError) as refused:
        read(records(whole))
    assert refused.value.reason is NO_SNI
    assert refused.value.alert is AlertDescription.UNRECOGNIZED_NAME


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name: bytes) -> None:
    with pytest.raises(HelloError) as refused:
        read(client_hello(name))
    assert refused.value.reason is BAD_NAME
    assert refused.value.alert is AlertDescription.UNRECOGNIZED_NAME
    assert str(refused.value).isprintable()


def test_the_limit_is_a_parameter() -> None:
    assert read(records(grow(1004, SNI)), max_hello_bytes=1000)
    with pytest.raises(HelloError, match="1001 bytes, the limit is 1000"):
        read(records(grow(1005, SNI)), max_hello_bytes=1000)


@pytest.mark.parametrize("wire", [b"", b"\x16", records(PLAIN)[:-1], records(PLAIN, 1)[:-1], record(PLAIN[:9])])
def test_an_unfinished_hello_is_nothing_yet(wire: bytes) -> None:
    assert read(wire) is None
    assert read(*singly(wire)) is None


# --- any hello, any cut, any mutation -------------------------------------------------------------------------------

names = st.from_regex(r"(?:[a-zA-Z0-9_-]{1,12}\.){1,5}[a-zA-Z]{2,8}\.?", fullmatch=True).map(str.encode)
others = st.tuples(st.integers(100, 0xFFFF).filter(lambda kind: kind != 0xFE0D), st.binary(max_size=60))


@st.composite
def valid_messages(draw: st.DrawFn) -> bytes:
    """Any message that this reader must accept."""
    optional = [alpn(b"h2"), ech(), supported_versions(0x0304), key_share(X25519MLKEM768, 1216)]
    extensions = [
        server_name(draw(names)),
        *draw(st.lists(st.sampled_from(optional), unique=True)),
        *draw(st.lists(others, max_size=5, unique_by=lambda extension: extension[0])),
    ]
    return message(
        *draw(st.permutations(extensions)),
        session_id=draw(st.binary(max_size=32)),
        ciphers=b"\x13\x01" * draw(st.integers(1, 40)),
    )


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(at % (len(data) + 1) for at in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


cuts = st.lists(st.integers(0, 5000), max_size=12)


@given(valid_messages(), cuts, cuts)
def test_any_split_gives_the_same(whole: bytes, in_records: list[int], in_segments: list[int]) -> None:
    expected = parse_client_hello(whole)
    assert expected.digest == hashlib.sha256(whole).digest()
    wire = records_cut(whole, [at % len(whole) for at in in_records])
    assert read(*cut(wire, in_segments)) == expected
    assert read(*singly(wire)) == expected


@given(valid_messages(), cuts)
def test_a_reader_that_waits_for_what_is_missing_sees_the_same(whole: bytes, in_records: list[int]) -> None:
    wire = records_cut(whole, [at % len(whole) for at in in_records])
    reader, at, hello = HelloReader(), 0, None
    while hello is None:
        size = reader.missing
        assert 1 <= size <= MAX_RECORD
        assert all(read(wire[:end]) is None for end in {at, at + size - 1}), "fewer would not have done"
        hello = reader.feed(wire[at : at + size])
        at += size
    assert at == len(wire)
    assert hello == parse_client_hello(whole)


@pytest.mark.parametrize(
    ("wire", "sizes"),
    [
        (records(PLAIN), [1, 4, 4, len(PLAIN) - 4]),
        (records(PLAIN[:2]) + records(PLAIN[2:]), [1, 4, 2, 5, 2, len(PLAIN) - 4]),
    ],
)
def test_how_often_a_slow_hello_is_fed(wire: bytes, sizes: list[int]) -> None:
    reader, at = HelloReader(), 0
    for size in sizes:
        assert reader.missing == size
        reader.feed(wire[at : at + size])
        at += size
    assert at == len(wire)


def outcome(*pieces: bytes) -> Hello | tuple[HelloReason, str] | None:
    reader = HelloReader()
    hello = None
    try:
        for piece in pieces:
            hello = reader.feed(piece)
    except HelloError as error:
        return error.reason, error.detail
    return hello


Edit = tuple[int, bytes, int]
edits_of_hellos = st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=4), st.integers(0, 4)), max_size=4)


def edited(wire: bytes, edits: list[Edit]) -> bytes:
    """Insert and delete bytes at the given places."""
    for place, inserted, deleted in edits:
        at = place % max(len(wire), 1)
        wire = wire[:at] + inserted + wire[at + deleted :]
    return wire


@given(valid_messages(), edits_of_hellos)
def test_a_mutated_hello_raises_only_hello_errors(whole: bytes, edits: list[Edit]) -> None:
    """However the bytes are split, the result is the same, and a name in the result is in the bytes."""
    wire = edited(records(whole), edits)
    result = outcome(wire)
    if not isinstance(result, tuple) or result[0] is not NOT_TLS:  # that detail shows the first bytes there are
        assert outcome(*singly(wire)) == result
    if isinstance(result, Hello):
        assert result.raw_name in wire


@given(st.binary(max_size=600), st.integers(0, 60))
def test_any_message_parses_or_raises_a_hello_error(tail: bytes, kept: int) -> None:
    body = (PLAIN[4 : 4 + kept] + tail)[:65536]
    with suppress(HelloError):
        parse_client_hello(b"\x01" + len(body).to_bytes(3, "big") + body)


# --- cost -----------------------------------------------------------------------------------------------------------


def executed_lines(call: Callable[[], object]) -> int:
    """Count the lines of sniproxy.formats.client_hello that `call` executes: work, without a clock."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> object:
        nonlocal count
        if frame.f_code.co_filename.endswith("hello.py"):
            count += event == "line"
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("fed_singly", [False, True], ids=["one segment", "byte by byte"])
def test_work_is_linear_in_records_and_segments(fed_singly: bool) -> None:
    def lines(size: int) -> int:
        wire = records(grow(size, last=SNI), 1)
        reader = HelloReader()
        pieces = singly(wire) if fed_singly else [wire]
        return executed_lines(lambda: [reader.feed(piece) for piece in pieces])

    assert lines(8_000) < 4.2 * lines(2_000)


def test_bytes_held_are_bounded() -> None:
    """The most memory: as many records as allowed, then the largest ones."""
    most = MAX_RECORD_HEADERS // 5
    whole = grow(65_536 + 4, last=SNI)
    assert read(records(grow(most, last=SNI), 1)) is not None
    wire = records_cut(whole, [*range(most - 4), *range(most - 4, len(whole), 16_384)])
    assert read(wire) is not None
    assert len(wire) < MAX_RECORD_HEADERS + len(whole)
    wire = records(whole, 1)
    reader = HelloReader()
    assert reader.feed(wire[: 6 * most + 4]) is None
    with pytest.raises(HelloError, match="record headers") as refused:
        reader.feed(wire[6 * most + 4 : 6 * most + 5])
    assert refused.value.reason is BAD_HELLO
    assert len(reader.raw) < MAX_RECORD_HEADERS + len(whole)
