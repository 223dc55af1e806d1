"""The STUN codec: the vectors of RFC 5769, aioice as a second opinion, and hostile input."""

from collections.abc import Callable

import aioice.stun
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from turnreg.stun.auth import long_term_key
from turnreg.stun.message import (
    FAMILY_IPV6,
    MAGIC_COOKIE,
    MAX_MESSAGE_BYTES,
    TRANSPORT_TCP,
    Attribute,
    Message,
    MessageClass,
    Method,
    StunError,
    frame_length,
)

TID = bytes(range(12))
SHORT_TERM_KEY = b"VOkJxbRl1RmTxUk/WvJxBt"

# RFC 5769, sections 2.1 to 2.4
SAMPLE_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae"
    "80220010 5354554e207465737420636c69656e74"
    "00240004 6e0001ff"
    "80290008 932ff9b151263b36"
    "00060009 6576746a3a68367659202020"
    "00080014 9aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2"
    "80280004 e57a3bcf"
)
SAMPLE_IPV4_RESPONSE = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae"
    "8022000b 7465737420766563746f7220"
    "00200008 0001a147e112a643"
    "00080014 2b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004 c07d4c96"
)
SAMPLE_IPV6_RESPONSE = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae"
    "8022000b 7465737420766563746f7220"
    "00200014 0002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014 a382954e4be67bf11784c97c8292c275bfe3ed41"
    "80280004 c8fb0b4c"
)
LONG_TERM_REQUEST = bytes.fromhex(
    "000100602112a44278ad3433c6ad72c029da412e"
    "00060012 e3839ee38388e383aae38383e382afe382b90000"
    "0015001c 662f2f3439396b39353464364f4c33346f4c394653547679363473 41"
    "0014000b 6578616d706c652e6f726700"
    "00080014 f67024656dd64a3e02b8e0712e85c9a28ca89666"
)


def header(method_and_class: int, length: int) -> bytes:
    return method_and_class.to_bytes(2, "big") + length.to_bytes(2, "big") + MAGIC_COOKIE.to_bytes(4, "big") + TID


def request(method: int = Method.BINDING) -> Message:
    return Message(method, MessageClass.REQUEST, TID)


class TestVectors:
    @pytest.mark.parametrize(
        ("data", "message_class"),
        [
            (SAMPLE_REQUEST, MessageClass.REQUEST),
            (SAMPLE_IPV4_RESPONSE, MessageClass.SUCCESS),
            (SAMPLE_IPV6_RESPONSE, MessageClass.SUCCESS),
        ],
        ids=["request", "ipv4", "ipv6"],
    )
    def test_short_term(self, data: bytes, message_class: MessageClass) -> None:
        message = Message.parse(data)
        assert message.method is Method.BINDING
        assert message.message_class is message_class
        assert message.transaction_id.hex() == "b7e7a701bc34d686fa87dfae"
        assert message.has_integrity
        assert message.has_fingerprint
        assert message.verify_integrity(SHORT_TERM_KEY)
        assert not message.verify_integrity(SHORT_TERM_KEY + b"x")

    def test_attributes_of_the_request(self) -> None:
        message = Message.parse(SAMPLE_REQUEST)
        assert message.text(Attribute.SOFTWARE) == "STUN test client"
        assert message.text(Attribute.USERNAME) == "evtj:h6vY"
        assert message.not_understood({Attribute.USERNAME}) == (0x0024,)  # PRIORITY, which is ICE's

    @pytest.mark.parametrize(
        ("data", "host"),
        [(SAMPLE_IPV4_RESPONSE, "192.0.2.1"), (SAMPLE_IPV6_RESPONSE, "2001:db8:1234:5678:11:2233:4455:6677")],
    )
    def test_mapped_address(self, data: bytes, host: str) -> None:
        message = Message.parse(data)
        assert message.xor_address(Attribute.XOR_MAPPED_ADDRESS) == (host, 32853)
        again = Message(message.method, message.message_class, message.transaction_id)
        again = again.with_xor_address(Attribute.XOR_MAPPED_ADDRESS, (host, 32853))
        assert again.get(Attribute.XOR_MAPPED_ADDRESS) == message.get(Attribute.XOR_MAPPED_ADDRESS)

    def test_long_term(self) -> None:
        message = Message.parse(LONG_TERM_REQUEST)
        username, realm = message.text(Attribute.USERNAME), message.text(Attribute.REALM)
        assert username == "マトリックス"
        assert realm == "example.org"
        assert message.text(Attribute.NONCE) == "f//499k954d6OL34oL9FSTvy64sA"
        # The password after SASLprep: the soft hyphen gone, the other two letters compatibility forms.
        assert message.verify_integrity(long_term_key(username, realm, "TheMatrIX"))
        assert not message.verify_integrity(long_term_key(username, realm, "TheMatrix"))

    def test_we_write_what_the_vector_holds(self) -> None:
        vector = Message.parse(LONG_TERM_REQUEST)
        assert vector.pack(integrity_key=long_term_key("マトリックス", "example.org", "TheMatrIX")) == LONG_TERM_REQUEST

    @pytest.mark.parametrize(
        "data",
        [SAMPLE_REQUEST, SAMPLE_IPV4_RESPONSE, SAMPLE_IPV6_RESPONSE, LONG_TERM_REQUEST],
        ids=["request", "ipv4", "ipv6", "long-term"],
    )
    def test_one_wrong_bit_is_found(self, data: bytes) -> None:
        key = (
            SHORT_TERM_KEY
            if data is not LONG_TERM_REQUEST
            else long_term_key("マトリックス", "example.org", "TheMatrIX")
        )
        signed = len(data) if data is LONG_TERM_REQUEST else len(data) - 8  # FINGERPRINT, made unknown, is ignored
        for at in range(8, signed):
            for bit in (1, 128):
                bad = data[:at] + bytes((data[at] ^ bit,)) + data[at + 1 :]
                try:
                    assert not Message.parse(bad).verify_integrity(key), at
                except StunError:
                    pass


class TestAioice:
    """What aioice reads and writes, we do."""

    @given(
        st.sampled_from([m for m in aioice.stun.Method if m != 2]), st.binary(min_size=1, max_size=64), st.booleans()
    )
    def test_it_reads_ours(self, method: int, key: bytes, signed: bool) -> None:
        message = (
            request(method)
            .with_text(Attribute.USERNAME, "jürgen")
            .with_number(Attribute.LIFETIME, 600)
            .with_first_byte(Attribute.REQUESTED_TRANSPORT, TRANSPORT_TCP)
            .with_xor_address(Attribute.XOR_PEER_ADDRESS, ("2001:db8::5", 443))
        )
        theirs = aioice.stun.parse_message(message.pack(integrity_key=key if signed else None, fingerprint=True))
        assert theirs.check_message_integrity(key) is signed
        assert theirs.attributes["USERNAME"] == "jürgen"
        assert theirs.attributes["LIFETIME"] == 600
        assert theirs.attributes["REQUESTED-TRANSPORT"] == 6 << 24
        assert theirs.attributes["XOR-PEER-ADDRESS"] == ("2001:db8::5", 443)

    def test_we_read_its(self) -> None:
        theirs = aioice.stun.Message(aioice.stun.Method.ALLOCATE, aioice.stun.Class.ERROR, TID)
        theirs.attributes["ERROR-CODE"] = (438, "Stale Nonce")
        theirs.attributes["XOR-MAPPED-ADDRESS"] = ("10.0.0.7", 1)
        theirs.add_message_integrity(b"key")
        message = Message.parse(bytes(theirs))
        assert message.method is Method.ALLOCATE
        assert message.message_class is MessageClass.ERROR
        assert message.error == (438, "Stale Nonce")
        assert message.xor_address(Attribute.XOR_MAPPED_ADDRESS) == ("10.0.0.7", 1)
        assert message.verify_integrity(b"key")
        assert message.has_fingerprint


class TestStructure:
    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (b"", "shorter"),
            (b"\0" * 19, "shorter"),
            (header(0x0001, 0)[:-1], "shorter"),
            (header(0x4001, 0), "first two bits"),  # ChannelData, HTTP
            (header(0x0001, 3) + b"abc", "multiple of four"),
            (header(0x0001, 4), "not the length"),
            (header(0x0001, 0) + b"abcd", "not the length"),
            (b"\x00\x01\x00\x00\x21\x12\xa4\x43" + TID, "cookie"),
            (header(0x0001, MAX_MESSAGE_BYTES), "longer than"),
            (header(0x0001, 4) + bytes.fromhex("80220001"), "over the end"),
            (header(0x0001, 8) + bytes.fromhex("8022ffff 00000000"), "over the end"),
            (header(0x0001, 8) + bytes.fromhex("00080004 00000000"), "MESSAGE-INTEGRITY has 4 bytes"),
            (header(0x0001, 8) + bytes.fromhex("80280004 00000000"), "FINGERPRINT does not match"),
            (header(0x0001, 4) + bytes.fromhex("80280000"), "FINGERPRINT does not match"),
            (SAMPLE_REQUEST[:2] + b"\0\x5c" + SAMPLE_REQUEST[4:] + bytes(4), "not the last"),
        ],
    )
    def test_refused(self, data: bytes, why: str) -> None:
        with pytest.raises(StunError, match=why):
            Message.parse(data)

    def test_fingerprint_must_be_last(self) -> None:
        data = bytearray(request().pack(fingerprint=True) + bytes.fromhex("80220000"))
        data[3] += 4
        with pytest.raises(StunError, match="not the last"):
            Message.parse(bytes(data))

    def test_attributes_after_message_integrity_are_ignored(self) -> None:
        signed = request().with_text(Attribute.USERNAME, "u").pack(integrity_key=b"k")
        behind = bytes.fromhex("000d0004 00000e10 001c0004 01020304")  # LIFETIME, MESSAGE-INTEGRITY-SHA256
        data = signed[:2] + (len(signed) - 20 + len(behind)).to_bytes(2, "big") + signed[4:] + behind
        message = Message.parse(data)
        assert message.verify_integrity(b"k")
        assert message.number(Attribute.LIFETIME) is None
        assert message.not_understood({Attribute.USERNAME}) == ()

    def test_the_first_of_two_counts(self) -> None:
        message = request().with_number(Attribute.LIFETIME, 1).with_number(Attribute.LIFETIME, 2)
        assert Message.parse(message.pack()).number(Attribute.LIFETIME) == 1

    @pytest.mark.parametrize("method", [*Method, 0x00F, 0xFFF])
    @pytest.mark.parametrize("message_class", list(MessageClass))
    def test_method_and_class_bits_are_interleaved(self, method: int, message_class: MessageClass) -> None:
        message = Message.parse(Message(method, message_class, TID).pack())
        assert message.method == method
        assert isinstance(message.method, Method) is (method in list(Method))
        assert message.message_class is message_class

    @pytest.mark.parametrize(
        ("method", "message_class", "expected"),
        [
            (Method.CONNECT, MessageClass.REQUEST, 0x000A),
            (Method.CONNECTION_BIND, MessageClass.SUCCESS, 0x010B),
            (Method.CONNECTION_ATTEMPT, MessageClass.INDICATION, 0x001C),
            (Method.ALLOCATE, MessageClass.ERROR, 0x0113),
        ],
    )
    def test_types_on_the_wire(self, method: Method, message_class: MessageClass, expected: int) -> None:
        assert Message(method, message_class, TID).pack()[:2] == expected.to_bytes(2, "big")

    def test_too_long_to_write(self) -> None:
        with pytest.raises(StunError, match="longer than 2048"):
            request().with_bytes(Attribute.DATA, bytes(2025)).pack()
        assert len(request().with_bytes(Attribute.DATA, bytes(2024)).pack()) == 2048
        with pytest.raises(StunError, match="longer than 2048"):
            request().with_bytes(Attribute.DATA, bytes(2024)).pack(fingerprint=True)


class TestValues:
    def test_error_reason_is_safe_to_log(self) -> None:
        coturn = bytes((0, 0, 4, 86)) + b"Allocation Quota Reached\0\0\0"
        message = Message(Method.ALLOCATE, MessageClass.ERROR, TID).with_bytes(Attribute.ERROR_CODE, coturn)
        assert message.error == (486, "Allocation Quota Reached")
        nasty = bytes((0, 0, 4, 0)) + b'a\n{"event": "forged"}\x1b[2J\xff' + b"x" * 700
        message = Message(Method.ALLOCATE, MessageClass.ERROR, TID).with_bytes(Attribute.ERROR_CODE, nasty)
        assert message.error is not None
        code, reason = message.error
        assert code == 400
        assert reason.isprintable()
        assert reason.startswith('a\\n{"event": "forged"}\\x1b[2J\\xffxxx')
        assert len(reason) < 220

    def test_refused_and_success(self) -> None:
        asked = request(Method.REFRESH)
        answer = Message.parse(asked.refused(437, "Allocation Mismatch").pack())
        assert (answer.method, answer.transaction_id) == (Method.REFRESH, TID)
        assert answer.message_class is MessageClass.ERROR
        assert answer.error == (437, "Allocation Mismatch")
        assert Message.parse(asked.success().pack()).message_class is MessageClass.SUCCESS
        assert asked.error is None

    @pytest.mark.parametrize("value", [b"", b"\0\0\4", b"\0\0\2\0", b"\0\0\7\0", b"\0\0\4\x64"])
    def test_bad_error_code(self, value: bytes) -> None:
        with pytest.raises(StunError, match="ERROR-CODE"):
            _ = request().with_bytes(Attribute.ERROR_CODE, value).error

    @pytest.mark.parametrize(
        "value", [b"", b"\0\1", b"\0\1\0\0\0\0\0", b"\0\2\0\0\1\2\3\4", b"\0\3\0\0\1\2\3\4", b"\0\1" + bytes(18)]
    )
    def test_bad_address(self, value: bytes) -> None:
        message = request().with_bytes(Attribute.XOR_PEER_ADDRESS, value)
        with pytest.raises(StunError, match="address"):
            message.xor_address(Attribute.XOR_PEER_ADDRESS)
        with pytest.raises(StunError, match="address"):
            message.xor_addresses(Attribute.XOR_PEER_ADDRESS)

    @pytest.mark.parametrize("value", [b"", b"\0\0\0", b"\0\0\0\0\0"])
    def test_bad_number(self, value: bytes) -> None:
        message = request().with_bytes(Attribute.LIFETIME, value).with_bytes(Attribute.REQUESTED_ADDRESS_FAMILY, value)
        with pytest.raises(StunError, match="not 4"):
            message.number(Attribute.LIFETIME)
        with pytest.raises(StunError, match="not 4"):
            message.first_byte(Attribute.REQUESTED_ADDRESS_FAMILY)

    @pytest.mark.parametrize(
        ("attribute", "value", "why"),
        [
            (Attribute.USERNAME, b"u" * 514, "too long"),
            (Attribute.NONCE, b"n" * 764, "too long"),
            (Attribute.REALM, b"\xff\xfe", "not UTF-8"),
        ],
    )
    def test_bad_text(self, attribute: Attribute, value: bytes, why: str) -> None:
        with pytest.raises(StunError, match=why):
            request().with_bytes(attribute, value).text(attribute)

    def test_absent(self) -> None:
        message = request()
        assert message.text(Attribute.REALM) is None
        assert message.number(Attribute.LIFETIME) is None
        assert message.first_byte(Attribute.REQUESTED_TRANSPORT) is None
        assert message.xor_address(Attribute.XOR_PEER_ADDRESS) is None
        assert message.xor_addresses(Attribute.XOR_PEER_ADDRESS) == ()
        assert not message.has_integrity
        assert not message.verify_integrity(b"")

    def test_several_peers(self) -> None:
        peers = (("10.0.0.9", 0), ("10.0.0.10", 5))
        message = request(Method.CREATE_PERMISSION)
        for peer in peers:
            message = message.with_xor_address(Attribute.XOR_PEER_ADDRESS, peer)
        assert Message.parse(message.pack()).xor_addresses(Attribute.XOR_PEER_ADDRESS) == peers

    def test_one_byte_values(self) -> None:
        message = request().with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6)
        assert message.get(Attribute.REQUESTED_ADDRESS_FAMILY) == b"\2\0\0\0"
        assert message.first_byte(Attribute.REQUESTED_ADDRESS_FAMILY) == FAMILY_IPV6


class TestFrameLength:
    def test_length_is_known_from_four_bytes(self) -> None:
        for size in range(4):
            assert frame_length(SAMPLE_REQUEST[:size]) is None
        for size in range(4, len(SAMPLE_REQUEST) + 1):
            assert frame_length(SAMPLE_REQUEST[:size]) == len(SAMPLE_REQUEST)

    @pytest.mark.parametrize(
        "prefix",
        [
            b"G",
            b"\x40\x00\x00\x04",  # ChannelData
            bytes.fromhex("0001ffff"),
            bytes.fromhex("00010801"),
            bytes.fromhex("00010800"),
            bytes.fromhex("160301020001fc03"),  # a TLS ClientHello
            bytes.fromhex("16030100010000000303"),
            bytes.fromhex("0001000000000000"),
        ],
    )
    def test_refused_at_once(self, prefix: bytes) -> None:
        with pytest.raises(StunError):
            frame_length(prefix)


MESSAGES = st.builds(
    Message,
    st.integers(0, 0xFFF),
    st.sampled_from(MessageClass),
    st.binary(min_size=12, max_size=12),
    st.lists(
        st.tuples(
            st.integers(0, 0xFFFF).filter(
                lambda kind: kind not in (Attribute.MESSAGE_INTEGRITY, Attribute.FINGERPRINT)
            ),
            st.binary(max_size=60),
        ),
        max_size=20,
    ).map(tuple),
)


@given(MESSAGES, st.none() | st.binary(max_size=40), st.booleans())
def test_what_is_packed_is_parsed(message: Message, key: bytes | None, fingerprint: bool) -> None:
    data = message.pack(integrity_key=key, fingerprint=fingerprint)
    assert len(data) % 4 == 0
    again = Message.parse(data)
    assert Message(again.method, again.message_class, again.transaction_id, again.attributes) == message
    assert again.has_integrity is (key is not None)
    assert again.has_fingerprint is fingerprint
    if key is not None:
        assert again.verify_integrity(key)
        assert not again.verify_integrity(key + b"\1")
    assert again.pack(integrity_key=key, fingerprint=fingerprint) == data


def read_everything(message: Message) -> None:
    """Call every getter; each may raise StunError, nothing else."""
    getters: list[Callable[[], object]] = [
        *(lambda a=a: message.text(a) for a in Attribute),
        *(lambda a=a: message.number(a) for a in Attribute),
        *(lambda a=a: message.first_byte(a) for a in Attribute),
        *(lambda a=a: message.xor_address(a) for a in Attribute),
        *(lambda a=a: message.xor_addresses(a) for a in Attribute),
        lambda: message.error,
        lambda: message.not_understood(()),
        lambda: message.verify_integrity(b"key"),
    ]
    for getter in getters:
        try:
            getter()
        except StunError:
            pass


@given(st.binary(max_size=200))
@example(SAMPLE_REQUEST)
def test_garbage_is_a_stun_error(data: bytes) -> None:
    try:
        frame_length(data)
        message = Message.parse(data)
    except StunError:
        return
    read_everything(message)


@given(
    st.integers(0, 0x3FFF),
    st.lists(st.tuples(st.sampled_from([*Attribute, 0x7777]), st.integers(0, 40), st.binary(max_size=40)), max_size=8),
)
def test_a_good_frame_around_garbage_is_a_stun_error_at_worst(
    message_type: int, attributes: list[tuple[int, int, bytes]]
) -> None:
    body = b"".join(
        kind.to_bytes(2, "big") + length.to_bytes(2, "big") + value + bytes(-len(value) % 4)
        for kind, length, value in attributes
    )
    try:
        message = Message.parse(header(message_type, len(body)) + body)
    except StunError:
        return
    read_everything(message)
