"""Decisions about one message of a client. `Transactions.respond` returns one of these; the code with the sockets carries it out.

An outcome with `answer` bytes is final: send them. `Open` and `Connect` need a socket first; the answer then comes from the
`complete_…` or `fail_…` method in their docstring.
"""

from typing import TypeAlias

import msgspec

from turnreg.server.allocation import Allocation, Attempt, Drop, Endpoint, FiveTuple, Refusal
from turnreg.stun.auth import Accepted
from turnreg.stun.message import TRANSPORT_TCP, Message


class Ignore(msgspec.Struct, frozen=True):
    """Do nothing: the message is not a request, or its method is not supported (RFC 8489, section 6.3)."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Send an answer."""

    answer: bytes
    refusal: Refusal | None = None
    """Why the answer is an error; None if it is not."""
    unproven: bool = False
    """The client has not proved that it owns the source address, so over UDP the answer counts against the answer rate."""


class Close(msgspec.Struct, frozen=True, kw_only=True):
    """Send an answer, then close the connection such that the answer arrives."""

    reply: Reply


class GiveBack(msgspec.Struct, frozen=True, kw_only=True):
    """The client deletes its allocation: send the answer, then end the allocation."""

    answer: bytes
    allocation: Allocation


class Join(msgspec.Struct, frozen=True, kw_only=True):
    """Send the answer, then join the connection to that peer. Bytes after the request are payload."""

    answer: bytes
    attempt: Attempt


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """Open a relayed port, then call `complete_allocate` or `fail_allocate`. A place for the allocation is reserved until then."""

    request: Message
    five_tuple: FiveTuple
    user: Accepted
    family: int
    lifetime_s: float
    transport: int = TRANSPORT_TCP
    even: bool = False
    """The port must be even (RFC 8656, section 18.6) ..."""
    pair: bool = False
    """... and the next higher one reserved, for an Allocate with the token in the answer."""
    token: bytes = b""
    """Use the port that is reserved under this token."""


class Connect(msgspec.Struct, frozen=True, kw_only=True):
    """Connect to a peer, then call `complete_connect` or `fail_connect`. The peer counts as connected until then."""

    request: Message
    user: Accepted
    allocation: Allocation
    peer: Endpoint


class Relay(msgspec.Struct, frozen=True, kw_only=True):
    """Send this datagram from the relayed address."""

    allocation: Allocation
    peer: Endpoint
    data: bytes
    dont_fragment: bool = False


Outcome: TypeAlias = Relay | Drop | Reply | Join | Open | Connect | GiveBack | Close | Ignore
