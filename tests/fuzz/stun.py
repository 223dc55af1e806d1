"""Fuzz the TURN server's handling of untrusted input: STUN, ChannelData, streams of both, and its decisions about them.

    python tests/fuzz/stun.py -max_total_time=60        needs atheris (pip install '.[fuzz]')

For any input, the only error is StunError; a parsed message is the same after it is packed and parsed again; and a stream gives the
same messages, however it is split.
"""

import contextlib
import itertools
import sys

import atheris

with atheris.instrument_imports(include=["turnreg"]):
    from turnreg.server.allocation import AllocationTable, Drop, FiveTuple, Limits
    from turnreg.server.framing import MessageReader, parse_channel_data
    from turnreg.server.outcome import Close, Ignore, Reply
    from turnreg.server.transaction import Transactions
    from turnreg.stun.auth import Authenticator
    from turnreg.stun.message import MAX_INDICATION_BYTES, TRANSPORT_UDP, Attribute, Message, MessageClass, StunError

NUMBERS = itertools.count()
TABLE = AllocationTable(Limits(), lambda size: next(NUMBERS).to_bytes(size, "big"))
SERVER = Transactions(
    authenticator=Authenticator(realm="fuzz", nonce_secret=bytes(32), users={"u": "p"}, secrets=["s"]),
    table=TABLE,
    families=(1, 2),
    allowed_peers=None,
    software="crossnet",
    draw=lambda size: next(NUMBERS).to_bytes(size, "big"),
    udp_allocations=True,
    active_connect=True,
)
CLIENT = FiveTuple(("192.0.2.1", 1), ("192.0.2.2", 3478), TRANSPORT_UDP)


def parsed(data: bytes) -> None:
    try:
        message = Message.parse(data, MAX_INDICATION_BYTES)
    except StunError:
        return
    for kind in Attribute:
        for read in (message.text, message.number, message.first_byte, message.xor_address, message.xor_addresses):
            with contextlib.suppress(StunError):
                read(kind)
    with contextlib.suppress(StunError):
        _ = message.error
    if len(data) < 2000:
        again = Message.parse(message.pack(integrity_key=b"k", fingerprint=True))
        assert again.transaction_id == message.transaction_id
        assert again.attributes == message.attributes
        assert again.verify_integrity(b"k")
    outcome = SERVER.respond(CLIENT, message, now=1.0, unix_now=1.8e9)
    assert isinstance(outcome, Reply | Close | Drop | Ignore)  # no input has a valid password
    if isinstance(outcome, Reply | Close):
        reply = outcome.reply if isinstance(outcome, Close) else outcome
        answer = Message.parse(reply.answer)
        assert answer.transaction_id == message.transaction_id
        assert answer.message_class in (MessageClass.SUCCESS, MessageClass.ERROR)
        assert len(reply.answer) < 300 + 2 * len(data)


def streamed(data: bytes, cut: int, *, datagrams: bool) -> list[object]:
    reader = MessageReader()
    reader.datagrams = datagrams
    found: list[object] = []
    try:
        for piece in (data[:cut], data[cut:]):
            reader.feed(piece)
            while (message := reader.take()) is not None:
                found.append(message)
    except StunError:
        found.append("the end")
    return found


def one(data: bytes) -> None:
    parsed(data)
    with contextlib.suppress(StunError):
        parse_channel_data(data)
    for datagrams in (False, True):
        whole = streamed(data, len(data), datagrams=datagrams)
        assert streamed(data, len(data) // 2, datagrams=datagrams) == whole
        assert streamed(data, min(3, len(data)), datagrams=datagrams) == whole


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
