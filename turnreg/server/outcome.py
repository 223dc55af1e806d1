"""What comes of one message of a client. `Transactions.respond` returns one of these; the shells do it.

An outcome that carries `answer` bytes has been decided: send them. `Open` and `Connect` need a socket first, and their answer
comes from the `complete_…` or `fail_…` method that they name.
"""

from typing import TypeAlias

import msgspec

from turnreg.server.allocation import Allocation, Attempt, Drop, Endpoint, FiveTuple, Refusal
from turnreg.stun.auth import Accepted
from turnreg.stun.message import TRANSPORT_TCP, Message


class Ignore(msgspec.Struct, frozen=True):
    """Do nothing: not a request, or of a method that is not supported (RFC 8489, section 6.3)."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Send this."""

    answer: bytes
    refusal: Refusal | None = None
    """Why the answer is an error."""
    unproven: bool = False
    """The client has not shown that the source address is its own, so over UDP the answer counts against the answer rate."""


class Close(msgspec.Struct, frozen=True, kw_only=True):
    """Send this, then close the connection in a way that lets it arrive."""

    reply: Reply


class GiveBack(msgspec.Struct, frozen=True, kw_only=True):
    """The client gave its allocation back: send this, then end the allocation."""

    answer: bytes
    allocation: Allocation


class Join(msgspec.Struct, frozen=True, kw_only=True):
    """Send this, then join the connection to that peer. What follows the request is payload."""

    answer: bytes
    attempt: Attempt


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """Open a relayed port, then call `complete_allocate` or `fail_allocate`: the allocation's place is taken until then."""

    request: Message
    five_tuple: FiveTuple
    user: Accepted
    family: int
    lifetime_s: float
    transport: int = TRANSPORT_TCP
    even: bool = False
    """The port must be even (RFC 8656, section 18.6) ..."""
    pair: bool = False
    """... and the one above it reserved for an Allocate with the token that the answer brings."""
    token: bytes = b""
    """The port is the one that was reserved with this token."""


class Connect(msgspec.Struct, frozen=True, kw_only=True):
    """Connect to a peer, then call `complete_connect` or `fail_connect`: the peer counts as connected until then."""

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
