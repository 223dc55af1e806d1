"""Reading STUN messages from a stream that arrives in any pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnreg.server.framing import ChannelData, MessageReader, pack_channel_data, parse_channel_data
from turnreg.stun.message import MAX_MESSAGE_BYTES, Attribute, Message, MessageClass, Method, StunError

MESSAGES = [
    Message(Method.BINDING, MessageClass.REQUEST, bytes(12)),
    Message(Method.ALLOCATE, MessageClass.REQUEST, b"a" * 12).with_text(Attribute.USERNAME, "u"),
    Message(Method.SEND, MessageClass.INDICATION, b"b" * 12).with_bytes(Attribute.DATA, bytes(500)),
]
STREAM = b"".join(message.pack() for message in MESSAGES)


def _long(message: Message) -> bytes:
    """Pack an indication of any length; only the server's own Data indications are packed so long."""
    parts = [
        kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value + bytes(-len(value) % 4)
        for kind, value in message.attributes
    ]
    packed = Message(message.method, message.message_class, message.transaction_id).pack()
    body = b"".join(parts)
    return packed[:2] + len(body).to_bytes(2, "big") + packed[4:] + body


@given(st.lists(st.integers(1, len(STREAM)), max_size=20), st.binary(max_size=7))
def test_any_cut_gives_the_same_messages(cuts: list[int], payload: bytes) -> None:
    reader = MessageReader()
    found = []
    at = 0
    for cut in [*sorted(cuts), len(STREAM)]:
        reader.feed(STREAM[at:cut])
        at = max(at, cut)
        while (message := reader.take()) is not None:
            found.append(message)
    assert found == MESSAGES
    reader.feed(payload)
    assert reader.take_rest() == payload
    assert reader.take_rest() == b""


def test_what_follows_a_message_is_left_alone() -> None:
    reader = MessageReader()
    reader.feed(STREAM + b"GET / HTTP/1.1\r\n")
    for message in MESSAGES:
        assert reader.take() == message
    assert reader.take_rest() == b"GET / HTTP/1.1\r\n"


@pytest.mark.parametrize(
    "start", [b"G", b"\x16\x03\x01\x02\x00\x01\x00\x01", bytes.fromhex("0001ffff"), bytes.fromhex("0003000021120000")]
)
def test_bytes_that_are_not_stun_are_refused_at_once(start: bytes) -> None:
    reader = MessageReader()
    reader.feed(start)
    with pytest.raises(StunError):
        reader.take()


def test_the_longest_message_is_taken() -> None:
    reader = MessageReader()
    message = MESSAGES[0].with_bytes(Attribute.DATA, bytes(MAX_MESSAGE_BYTES - 24))
    reader.feed(message.pack()[:-1])
    assert reader.take() is None
    reader.feed(message.pack()[-1:])
    assert reader.take() == message


DATAGRAMS: list[Message | ChannelData] = [
    ChannelData(0x4000, b""),
    MESSAGES[0],
    ChannelData(0x4FFF, b"abc"),
    ChannelData(0x7FFF, bytes(5000)),
    MESSAGES[2].with_bytes(Attribute.DATA, bytes(3000)),
    ChannelData(0x4001, b"last"),
]
DATAGRAM_STREAM = b"".join(
    pack_channel_data(*item, padded=True) if isinstance(item, ChannelData) else _long(item) for item in DATAGRAMS
)


@given(st.lists(st.integers(1, len(DATAGRAM_STREAM)), max_size=20))
def test_any_cut_gives_the_same_datagrams(cuts: list[int]) -> None:
    reader = MessageReader()
    reader.datagrams = True
    found = []
    at = 0
    for cut in [*sorted(cuts), len(DATAGRAM_STREAM)]:
        reader.feed(DATAGRAM_STREAM[at:cut])
        at = max(at, cut)
        while (message := reader.take()) is not None:
            found.append(message)
    assert found == DATAGRAMS
    assert reader.take_rest() == b""


def test_a_stream_without_datagrams_takes_none() -> None:
    reader = MessageReader()
    reader.feed(pack_channel_data(0x4000, b"abc", padded=True))
    with pytest.raises(StunError):
        reader.take()


@pytest.mark.parametrize("packet", [b"", b"\x40", b"\x40\0\0", b"\x40\0\0\5abcd", b"\x80\0\0\0", b"\x3f\xff\0\0"])
def test_invalid_channel_data(packet: bytes) -> None:
    with pytest.raises(StunError):
        parse_channel_data(packet)


def test_a_datagram_may_have_padding() -> None:
    assert parse_channel_data(b"\x40\x01\0\3abc\0") == ChannelData(0x4001, b"abc")


def test_channel_data_longer_than_any_datagram_is_refused_at_once() -> None:
    reader = MessageReader()
    reader.datagrams = True
    reader.feed(b"\x40\0\xff\xff")
    with pytest.raises(StunError):
        reader.take()
