"""STUN messages out of a stream, however it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnreg.server.framing import MessageReader
from turnreg.stun import MAX_MESSAGE_BYTES, Attribute, Message, MessageClass, Method, StunError

MESSAGES = [
    Message(Method.BINDING, MessageClass.REQUEST, bytes(12)),
    Message(Method.ALLOCATE, MessageClass.REQUEST, b"a" * 12).with_text(Attribute.USERNAME, "u"),
    Message(Method.SEND, MessageClass.INDICATION, b"b" * 12).with_bytes(Attribute.DATA, bytes(500)),
]
STREAM = b"".join(message.pack() for message in MESSAGES)


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
def test_what_is_no_stun_is_refused_before_more_is_waited_for(start: bytes) -> None:
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
