"""Control capsules: packed and parsed without loss, and anything else is refused."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.capsules import CapsuleError, CapsuleReader, CapsuleType, Control
from sniproxy.tunnel.messages import (
    MAX_DETAIL,
    Continued,
    Done,
    Finished,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Ready,
    Received,
    Refused,
    Waiting,
    parse_control,
)

addresses = st.ip_addresses(v=4) | st.ip_addresses(v=6)
reasons = st.sampled_from(Reason).map(str) | st.from_regex(r"[a-z_]{1,32}", fullmatch=True)
details = st.text(max_size=50)
messages: st.SearchStrategy[Message] = st.one_of(
    st.sampled_from([Ready(), Finished(), Done(), Continued()]),
    st.builds(Opened, addresses, st.integers(1, 65535), st.integers(0, (1 << 32) - 1)),
    st.builds(Refused, reasons, details),
    st.builds(Ping, st.binary(min_size=8, max_size=8)),
    st.builds(Pong, st.binary(min_size=8, max_size=8)),
    st.builds(Received, st.integers(0, (1 << 64) - 1)),
    st.builds(Open, st.binary(max_size=1024)),
    st.builds(Waiting, st.integers(0, 0xFFFF)),
)


@given(st.lists(messages, max_size=5))
def test_what_is_packed_is_what_is_parsed(said: list[Message]) -> None:
    events = CapsuleReader().feed(b"".join(message.pack() for message in said))
    assert all(isinstance(event, Control) for event in events)
    assert [parse_control(event) for event in events if isinstance(event, Control)] == said


def test_bytes() -> None:
    """The layout, so that no change of it goes unnoticed."""
    assert Ready().pack().hex() == "a063720080000000"
    assert Finished().pack().hex() == "a063720380000000"
    assert Done().pack().hex() == "a063720780000000"
    assert (
        Opened(IPv4Address("10.1.0.5"), 8443, 258).pack().hex() == "a06372018000000a" + "00000102" + "20fb" + "0a010005"
    )
    assert Opened(IPv6Address("fd00::5"), 1, 0).pack()[8:].hex() == "000000000001fd000000000000000000000000000005"
    assert Refused("dial_failed", "no").pack() == bytes.fromhex("a06372028000000e") + b"\x0bdial_failedno"
    assert Ping(bytes(range(8))).pack().hex() == "a0637204800000080001020304050607"
    assert Pong(bytes(8)).pack().hex() == "a0637205800000080000000000000000"
    assert Received(258).pack().hex() == "a0637208800000080000000000000102"
    assert Continued().pack().hex() == "a063720980000000"
    assert Open(b"abc").pack().hex() == "a063720680000003616263"
    assert Waiting(258).pack().hex() == "a063720a800000020102"
    assert Waiting(1 << 20).pack()[8:] == b"\xff\xff"


def test_a_long_dial_is_written_as_the_longest() -> None:
    assert Opened(IPv4Address("10.1.0.5"), 1, 1 << 40).pack()[8:12] == b"\xff\xff\xff\xff"
    assert Opened(IPv4Address("10.1.0.5"), 1, -1).pack()[8:12] == bytes(4)


@pytest.mark.parametrize("detail", ["x" * 201, "ü" * 150, "€" * 70, "a\ud800b"])
def test_a_long_detail_is_cut_between_characters(detail: str) -> None:
    [event] = CapsuleReader().feed(Refused("other", detail).pack())
    assert isinstance(event, Control)
    assert len(event.value) <= 1 + len("other") + MAX_DETAIL
    message = parse_control(event)
    assert isinstance(message, Refused)
    assert detail.encode("utf-8", "replace").decode().startswith(message.detail)
    assert len(message.detail.encode()) > MAX_DETAIL - 4 or len(detail) < 10


@pytest.mark.parametrize(
    "pack",
    [
        Refused("").pack,
        Refused("Denied").pack,
        Refused("x" * 33).pack,
        Refused("ok\n").pack,
        Ping(bytes(7)).pack,
        Pong(bytes(9)).pack,
        Open(bytes(1025)).pack,
    ],
)
def test_values_that_do_not_fit_are_not_written(pack: object) -> None:
    assert callable(pack)
    with pytest.raises(ValueError, match=r"."):
        pack()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (CapsuleType.READY, b"\0"),
        (CapsuleType.FINISHED, b"\0"),
        (CapsuleType.DONE, b"\0"),
        (CapsuleType.OPENED, b""),
        (CapsuleType.OPENED, bytes(4) + b"\0\1" + bytes(5)),
        (CapsuleType.OPENED, bytes(4) + b"\0\0" + bytes(4)),
        (CapsuleType.OPENED, bytes(4) + b"\0\1" + bytes(17)),
        (CapsuleType.REFUSED, b""),
        (CapsuleType.REFUSED, b"\0"),
        (CapsuleType.REFUSED, b"\x05othe"),
        (CapsuleType.REFUSED, b"\x05OTHER"),
        (CapsuleType.REFUSED, b"\x05oth\xffr"),
        (CapsuleType.REFUSED, b"\x06other\n"),
        (CapsuleType.REFUSED, b"\x21" + b"x" * 33),
        (CapsuleType.REFUSED, b"\x05other\xff"),
        (CapsuleType.REFUSED, b"\x05other" + b"x" * 201),
        (CapsuleType.PING, bytes(7)),
        (CapsuleType.PONG, bytes(9)),
        (CapsuleType.OPEN, bytes(1025)),
    ],
)
def test_other_values_are_refused(kind: CapsuleType, value: bytes) -> None:
    with pytest.raises(CapsuleError) as refused:
        parse_control(Control(kind, value))
    assert refused.value.reason is Reason.PROTOCOL_ERROR


controls = [kind for kind in CapsuleType if kind not in (CapsuleType.DATA, CapsuleType.FINAL_DATA)]


@given(st.sampled_from(controls), st.binary(max_size=300))
def test_garbage_is_refused_or_canonical(kind: CapsuleType, value: bytes) -> None:
    try:
        message = parse_control(Control(kind, value))
    except CapsuleError:
        return
    assert message.pack()[8:] == value


def test_every_control_capsule_has_a_reader() -> None:
    values = {
        CapsuleType.OPENED: bytes(5) + b"\1" + ip_address("10.0.0.1").packed,
        CapsuleType.REFUSED: b"\x05other",
        CapsuleType.PING: bytes(8),
        CapsuleType.PONG: bytes(8),
        CapsuleType.RECEIVED: bytes(8),
        CapsuleType.WAITING: bytes(2),
    }
    for kind in controls:
        assert parse_control(Control(kind, values.get(kind, b""))).pack()
