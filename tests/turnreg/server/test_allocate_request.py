"""Parsing an Allocate, and the first reason to refuse it in the order of RFC 8656, section 7.2."""

import pytest

from turnreg.server.allocate_request import AllocatePolicy, AllocateRequest, refuse
from turnreg.server.allocation import Refusal
from turnreg.stun.message import (
    FAMILY_IPV4,
    FAMILY_IPV6,
    TRANSPORT_TCP,
    TRANSPORT_UDP,
    Attribute,
    Message,
    MessageClass,
    Method,
    StunError,
)

TOKEN = b"12345678"
TCP, UDP, SCTP = (bytes((number, 0, 0, 0)) for number in (TRANSPORT_TCP, TRANSPORT_UDP, 132))
IPV6 = bytes((FAMILY_IPV6, 0, 0, 0))


def message(attributes: dict[int, bytes]) -> Message:
    made = Message(Method.ALLOCATE, MessageClass.REQUEST, bytes(12))
    for kind, value in attributes.items():
        made = made.with_bytes(kind, value)
    return made


def test_what_a_gateway_asks_for() -> None:
    request = AllocateRequest.parse(message({Attribute.REQUESTED_TRANSPORT: TCP}), TRANSPORT_TCP)
    assert request == AllocateRequest(
        over=TRANSPORT_TCP,
        transport=TRANSPORT_TCP,
        family=FAMILY_IPV4,
        names_family=False,
        even=False,
        pair=False,
        token=b"",
        has_datagram_attributes=False,
        asked_lifetime_s=0,
    )


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {Attribute.REQUESTED_TRANSPORT: b"\x11"},
        {Attribute.REQUESTED_TRANSPORT: UDP, Attribute.REQUESTED_ADDRESS_FAMILY: b""},
        {Attribute.REQUESTED_TRANSPORT: UDP, Attribute.EVEN_PORT: b"\0\0"},
        {Attribute.REQUESTED_TRANSPORT: UDP, Attribute.RESERVATION_TOKEN: TOKEN[1:]},
        {Attribute.REQUESTED_TRANSPORT: UDP, Attribute.LIFETIME: b"\0"},
    ],
)
def test_malformed(attributes: dict[int, bytes]) -> None:
    with pytest.raises(StunError):
        AllocateRequest.parse(message(attributes), TRANSPORT_TCP)


@pytest.mark.parametrize(
    ("attributes", "over", "why"),
    [
        ({Attribute.REQUESTED_TRANSPORT: TCP}, TRANSPORT_TCP, None),
        ({Attribute.REQUESTED_TRANSPORT: SCTP, Attribute.REQUESTED_ADDRESS_FAMILY: IPV6}, TRANSPORT_TCP, 442),
        ({Attribute.REQUESTED_TRANSPORT: TCP, Attribute.REQUESTED_ADDRESS_FAMILY: IPV6}, TRANSPORT_UDP, 400),
        ({Attribute.REQUESTED_TRANSPORT: TCP, Attribute.DONT_FRAGMENT: b""}, TRANSPORT_TCP, 400),
        ({Attribute.REQUESTED_TRANSPORT: TCP, Attribute.REQUESTED_ADDRESS_FAMILY: IPV6}, TRANSPORT_TCP, 440),
        (
            {
                Attribute.REQUESTED_TRANSPORT: UDP,
                Attribute.RESERVATION_TOKEN: TOKEN,
                Attribute.REQUESTED_ADDRESS_FAMILY: IPV6,
            },
            TRANSPORT_UDP,
            400,
        ),
        ({Attribute.REQUESTED_TRANSPORT: UDP, Attribute.DONT_FRAGMENT: b""}, TRANSPORT_UDP, None),
    ],
)
def test_the_first_reason_counts(attributes: dict[int, bytes], over: int, why: int | None) -> None:
    codes = {
        400: Refusal.BAD_REQUEST,
        440: Refusal.FAMILY_NOT_SUPPORTED,
        442: Refusal.TRANSPORT_NOT_SUPPORTED,
        None: None,
    }
    policy = AllocatePolicy(families=frozenset({FAMILY_IPV4}), udp_allocations=True)
    assert refuse(AllocateRequest.parse(message(attributes), over), policy) is codes[why]


def test_no_datagrams_where_they_are_off_even_with_a_contradiction() -> None:
    request = AllocateRequest.parse(
        message({Attribute.REQUESTED_TRANSPORT: UDP, Attribute.RESERVATION_TOKEN: TOKEN, Attribute.EVEN_PORT: b"\x80"}),
        TRANSPORT_UDP,
    )
    policy = AllocatePolicy(families=frozenset({FAMILY_IPV4}), udp_allocations=False)
    assert (request.even, request.pair, request.token) == (True, True, TOKEN)
    assert refuse(request, policy) is Refusal.TRANSPORT_NOT_SUPPORTED
