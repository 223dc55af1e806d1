"""Parsing an Allocate request, and the reasons to refuse it (RFC 8656, section 7.2; RFC 6062, section 5.1).

Not here: whether the client already has an allocation, and whether quotas allow another one (`turnreg.server.allocation`).
"""

from collections.abc import Callable
from typing import Self

import msgspec

from turnreg.server.allocation import Refusal
from turnreg.stun.message import (
    FAMILY_IPV4,
    TRANSPORT_TCP,
    TRANSPORT_UDP,
    Attribute,
    Message,
    StunError,
)

_TOKEN_BYTES = 8
_NOT_WITH_TCP = (Attribute.EVEN_PORT, Attribute.DONT_FRAGMENT, Attribute.RESERVATION_TOKEN)


class AllocateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The attributes of an Allocate."""

    over: int
    """Transport of the control connection."""
    transport: int
    """Requested transport of the relayed address."""
    family: int
    """Requested family; IPv4 if the client requests none, whatever the control connection uses."""
    names_family: bool
    even: bool
    pair: bool
    """Reserve the next higher port, too."""
    token: bytes
    """Token of a reserved port; empty if there is none."""
    has_datagram_attributes: bool
    """The request has an attribute that is valid for UDP allocations only."""
    asked_lifetime_s: int
    """0 if the client requests none."""

    @classmethod
    def parse(cls, message: Message, over: int) -> Self:
        """Parse the attributes. Raises StunError if one of them is malformed or REQUESTED-TRANSPORT is missing."""
        transport = message.first_byte(Attribute.REQUESTED_TRANSPORT)
        if transport is None:
            raise StunError("no REQUESTED-TRANSPORT")
        family = message.first_byte(Attribute.REQUESTED_ADDRESS_FAMILY)
        even, token = message.get(Attribute.EVEN_PORT), message.get(Attribute.RESERVATION_TOKEN)
        if even is not None and len(even) != 1:
            raise StunError(f"EVEN-PORT has {len(even)} bytes, not 1")
        if token is not None and len(token) != _TOKEN_BYTES:
            raise StunError(f"RESERVATION-TOKEN has {len(token)} bytes, not {_TOKEN_BYTES}")
        return cls(
            over=over,
            transport=transport,
            family=FAMILY_IPV4 if family is None else family,
            names_family=family is not None,
            even=even is not None,
            pair=bool(even and even[0] & 0x80),
            token=token or b"",
            has_datagram_attributes=any(message.get(kind) is not None for kind in _NOT_WITH_TCP),
            asked_lifetime_s=message.number(Attribute.LIFETIME) or 0,
        )


class AllocatePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What this server supports."""

    families: frozenset[int]
    """Families of the relay addresses."""
    udp_allocations: bool


def refuse(request: AllocateRequest, policy: AllocatePolicy) -> Refusal | None:
    """Return the first reason to refuse the request, in the order of the RFC; None if there is none."""
    return next((why for guard in _GUARDS if (why := guard(request, policy)) is not None), None)


def _known_transport(request: AllocateRequest, _: AllocatePolicy) -> Refusal | None:
    known = request.transport in (TRANSPORT_TCP, TRANSPORT_UDP)
    return None if known else Refusal.TRANSPORT_NOT_SUPPORTED


def _streams_over_streams(request: AllocateRequest, _: AllocatePolicy) -> Refusal | None:
    """RFC 6062, section 5.1: a TCP allocation needs TCP, and must not have the attributes for UDP allocations."""
    wrong = request.over == TRANSPORT_UDP or request.has_datagram_attributes
    return Refusal.BAD_REQUEST if request.transport == TRANSPORT_TCP and wrong else None


def _datagrams_if_allowed(request: AllocateRequest, policy: AllocatePolicy) -> Refusal | None:
    refused = request.transport == TRANSPORT_UDP and not policy.udp_allocations
    return Refusal.TRANSPORT_NOT_SUPPORTED if refused else None


def _token_alone(request: AllocateRequest, _: AllocatePolicy) -> Refusal | None:
    """The parity and family of a reserved port are fixed."""
    return Refusal.BAD_REQUEST if request.token and (request.even or request.names_family) else None


def _family_of_ours(request: AllocateRequest, policy: AllocatePolicy) -> Refusal | None:
    return None if request.family in policy.families else Refusal.FAMILY_NOT_SUPPORTED


_GUARDS: tuple[Callable[[AllocateRequest, AllocatePolicy], Refusal | None], ...] = (
    _known_transport,
    _streams_over_streams,
    _datagrams_if_allowed,
    _token_alone,
    _family_of_ours,
)
