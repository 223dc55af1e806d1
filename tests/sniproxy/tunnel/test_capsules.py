"""Capsules: framing, limits, and the same result however the bytes are split."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.tunnel.capsules import (
    HEADER_SIZE,
    MAX_CONTROL,
    MAX_PAYLOAD,
    MAX_UNKNOWN,
    CapsuleError,
    CapsuleReader,
    CapsuleType,
    Control,
    Event,
    Header,
    Payload,
    header,
)

DATA, FINAL_DATA, READY = CapsuleType.DATA, CapsuleType.FINAL_DATA, CapsuleType.READY

# What a stream of events says, whatever its cuts: (type, payload or value so far, bytes of it still to come)
Said = list[tuple[int, bytes, int]]


def said(events: Iterable[Event]) -> Said:
    """Join the payload pieces of each data capsule."""
    joined: Said = []
    for event in events:
        match event:
            case Header(kind, length):
                joined.append((kind, b"", length))
            case Payload(data):
                kind, before, left = joined[-1]  # type: ignore[assignment]
                assert 0 < len(data) <= left
                joined[-1] = (kind, before + bytes(data), left - len(data))
            case Control(kind, value):
                joined.append((kind, value, 0))
    return joined


def varint(value: int, size: int) -> bytes:
    """Write `value` as a varint of exactly `size` bytes (RFC 9000 section 16)."""
    prefix = {1: 0, 2: 1, 4: 2, 8: 3}[size]
    return (prefix << (8 * size - 2) | value).to_bytes(size, "big")


def varints(value: int) -> st.SearchStrategy[bytes]:
    """Every form of `value`."""
    return st.sampled_from([varint(value, size) for size in (1, 2, 4, 8) if value < 1 << (8 * size - 2)])


@st.composite
def capsules(draw: st.DrawFn) -> tuple[bytes, Said]:
    """One capsule in any legal form, and what it says (nothing if its type is unknown)."""
    unknown = st.integers(0, (1 << 62) - 1).filter(lambda number: number not in list(CapsuleType))
    number = draw(st.sampled_from(CapsuleType) | unknown)
    value = draw(st.binary(max_size=300))
    wire = draw(varints(number)) + draw(varints(len(value))) + value
    return wire, [(number, value, 0)] if number in list(CapsuleType) else []


def cut(wire: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(wire)]
    return [wire[a:b] for a, b in pairwise(edges)]


@given(st.lists(capsules(), max_size=8), st.data())
def test_any_split_says_the_same(parts: list[tuple[bytes, Said]], data: st.DataObject) -> None:
    wire = b"".join(part for part, _ in parts)
    expected = [one for _, says in parts for one in says]
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=20))
    for pieces in (cut(wire, cuts), [wire], [bytes([byte]) for byte in wire]):
        reader = CapsuleReader()
        assert said(event for piece in pieces for event in reader.feed(piece)) == expected
        assert reader.at_boundary
        assert reader.payload_left == 0


@given(st.lists(capsules(), max_size=8))
def test_reading_no_more_than_needed_never_takes_payload(parts: list[tuple[bytes, Said]]) -> None:
    wire = b"".join(part for part, _ in parts)
    reader, at, events = CapsuleReader(), 0, []
    while at < len(wire):
        if reader.payload_left:
            count = reader.payload_left
            events.append(Payload(memoryview(wire)[at : at + count]))
            reader.skip_payload(count)
        else:
            count = reader.header_bytes_needed or 1  # inside a control capsule
            new = reader.feed(wire[at : at + count])
            assert not any(isinstance(event, Payload) for event in new)
            events += new  # type: ignore[arg-type]
        at += count
    assert at == len(wire)
    assert said(events) == [one for _, says in parts for one in says]


@given(st.lists(st.tuples(st.sampled_from([DATA, FINAL_DATA]), st.binary(max_size=50)), max_size=8))
def test_our_own_capsules_are_read_header_by_header(parts: list[tuple[CapsuleType, bytes]]) -> None:
    reader = CapsuleReader()
    for kind, value in parts:
        assert reader.header_bytes_wanted == HEADER_SIZE
        assert reader.feed(header(kind, len(value))) == [Header(kind, len(value))]
        assert reader.payload_left == len(value)
        assert reader.header_bytes_wanted == (0 if value else HEADER_SIZE)
        reader.skip_payload(len(value))
        assert reader.at_boundary


def test_a_read_of_what_is_wanted_may_take_payload_of_a_foreign_writer() -> None:
    wire = varint(DATA, 4) + varint(20, 1) + bytes(range(20))
    reader = CapsuleReader()
    wanted = reader.header_bytes_wanted
    assert reader.feed(wire[:wanted]) == [Header(DATA, 20), Payload(memoryview(bytes(range(3))))]
    assert reader.payload_left == 17
    reader.skip_payload(17)
    assert reader.at_boundary


@pytest.mark.parametrize(
    ("held", "needed", "wanted"),
    [
        (b"", 2, 8),
        (varint(1, 1), 1, 7),
        (varint(DATA, 4)[:1], 4, 7),
        (varint(DATA, 4), 1, 4),
        (varint(DATA, 4) + varint(9, 4)[:1], 3, 3),
        (varint(DATA, 4) + varint(9, 4)[:3], 1, 1),
        (varint(DATA, 8)[:1], 8, 8),
        (varint(DATA, 8), 1, 1),
        (varint(DATA, 8) + varint(9, 8)[:1], 7, 7),
        (varint(DATA, 8) + varint(9, 8)[:7], 1, 1),
    ],
)
def test_bytes_needed_and_wanted(held: bytes, needed: int, wanted: int) -> None:
    reader = CapsuleReader()
    assert reader.feed(held) == []
    assert not reader.at_boundary or not held
    assert (reader.header_bytes_needed, reader.header_bytes_wanted) == (needed, wanted)


def test_no_bytes_are_needed_inside_a_capsule() -> None:
    reader = CapsuleReader()
    reader.feed(header(DATA, 5) + b"ab")
    assert (reader.header_bytes_needed, reader.header_bytes_wanted, reader.payload_left) == (0, 0, 3)
    reader.feed(b"cde" + header(READY, 2))
    assert (reader.header_bytes_needed, reader.header_bytes_wanted, reader.payload_left) == (0, 0, 0)
    assert not reader.at_boundary


@pytest.mark.parametrize("count", [-1, 4])
def test_more_cannot_be_skipped_than_is_left(count: int) -> None:
    reader = CapsuleReader()
    reader.feed(header(DATA, 5) + b"ab")
    with pytest.raises(ValueError, match="3 are left"):
        reader.skip_payload(count)
    reader.skip_payload(3)
    assert reader.at_boundary


def test_a_header_is_eight_bytes_with_the_code_points_of_connect_tcp() -> None:
    assert header(DATA, 5) == bytes.fromhex("a028d7f080000005")
    assert header(FINAL_DATA, MAX_PAYLOAD) == bytes.fromhex("a028d7f1bfffffff")
    for number, length in ((DATA, 1 << 30), (1 << 30, 0), (DATA, -1)):
        with pytest.raises(ValueError, match="does not fit"):
            header(number, length)


def test_payload_is_a_view_not_a_copy() -> None:
    wire = header(DATA, 100_000) + bytes(100_000)
    [_, piece] = CapsuleReader().feed(wire)
    assert isinstance(piece, Payload)
    assert piece.data.obj is wire


def test_the_largest_payload_is_streamed() -> None:
    reader = CapsuleReader()
    assert reader.feed(header(DATA, MAX_PAYLOAD)) == [Header(DATA, MAX_PAYLOAD)]
    reader.skip_payload(MAX_PAYLOAD - 1)
    assert said([Header(DATA, 1), *reader.feed(b"x" + header(READY, 0))]) == [(DATA, b"x", 0), (READY, b"", 0)]


@pytest.mark.parametrize(
    "wire",
    [
        varint(DATA, 4) + varint(MAX_PAYLOAD + 1, 8),
        varint(FINAL_DATA, 8) + varint((1 << 62) - 1, 8),
        *(header(kind, MAX_CONTROL + 1) for kind in CapsuleType if kind not in (DATA, FINAL_DATA)),
        varint(0x17, 1) + varint(MAX_UNKNOWN + 1, 4),
        varint((1 << 62) - 1, 8) + varint((1 << 62) - 1, 8),
    ],
)
def test_too_much_is_refused_from_the_header(wire: bytes) -> None:
    reader = CapsuleReader()
    with pytest.raises(CapsuleError) as refused:
        reader.feed(wire)
    assert refused.value.reason == "protocol_error"
    with pytest.raises(CapsuleError):  # and nothing behind it is looked at
        reader.feed(header(READY, 0))


@pytest.mark.parametrize("kind", [kind for kind in CapsuleType if kind not in (DATA, FINAL_DATA)])
def test_control_and_unknown_capsules_up_to_their_limit(kind: CapsuleType) -> None:
    unknown = header(0x3FFFFFFF, MAX_UNKNOWN) + bytes(MAX_UNKNOWN)
    wire = unknown + header(kind, MAX_CONTROL) + b"c" * MAX_CONTROL + unknown
    assert CapsuleReader().feed(wire) == [Control(kind, b"c" * MAX_CONTROL)]


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_garbage_raises_only_capsule_errors(pieces: list[bytes]) -> None:
    reader = CapsuleReader()
    for piece in pieces:
        try:
            events = reader.feed(piece)
        except CapsuleError:
            break
        assert all(isinstance(event, Header | Payload | Control) for event in events)
    assert len(reader._held) < 16
    assert len(reader._control) <= MAX_CONTROL
