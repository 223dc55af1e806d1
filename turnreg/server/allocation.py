"""State of a TURN server: allocations, their permissions and channels, and peers that wait for their ConnectionBind.

No sockets and no clock: `now` is monotonic seconds, a function that is passed in draws identifiers, and the code with the sockets
asks here what is allowed. Everything that clients can make grow has a limit in `Limits`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import msgspec

from sniproxy.engine.buffer_share import DEFAULT_BUFFER_BYTES
from turnreg.server.pace import Pace
from turnreg.stun.message import TRANSPORT_TCP

Endpoint = tuple[str, int]
"""IP address as text in canonical form, and port."""


class FiveTuple(NamedTuple):
    """A client's connection: its address, ours, and the protocol; TLS counts as TCP (RFC 8656, section 2.2)."""

    client: Endpoint
    server: Endpoint
    transport: int = TRANSPORT_TCP


class Refusal(StrEnum):
    """Why a request or a connection was refused. Log field and metric label."""

    # Requests, in the order of their error codes
    BAD_REQUEST = "bad_request"
    UNKNOWN_CONNECTION = "unknown_connection"
    NO_CREDENTIALS = "no_credentials"
    UNKNOWN_USER = "unknown_user"
    WRONG_PASSWORD = "wrong_password"  # noqa: S105 - a reason, not a password
    EXPIRED = "expired"
    FORBIDDEN_METHOD = "forbidden_method"
    FORBIDDEN_PEER = "forbidden_peer"
    UNKNOWN_ATTRIBUTE = "unknown_attribute"
    NO_ALLOCATION = "no_allocation"
    HAS_ALLOCATION = "has_allocation"
    STALE_NONCE = "stale_nonce"
    FAMILY_NOT_SUPPORTED = "family_not_supported"
    WRONG_USER = "wrong_user"
    TRANSPORT_NOT_SUPPORTED = "transport_not_supported"
    FAMILY_MISMATCH = "family_mismatch"
    CONNECTION_EXISTS = "connection_exists"
    CONNECT_FAILED = "connect_failed"
    QUOTA = "quota"
    PORT_SHARE = "port_share"
    CAPACITY = "capacity"
    DRAINING = "draining"
    # Connections
    NOT_STUN = "not_stun"
    TOO_SLOW = "too_slow"
    FLOOD = "flood"
    CROWDED_OUT = "crowded_out"
    PEER_NOT_PERMITTED = "peer_not_permitted"
    PEER_LIMIT = "peer_limit"
    PEER_NOT_BOUND = "peer_not_bound"
    TLS_FAILED = "tls_failed"


CODES: dict[Refusal, tuple[int, str]] = {
    Refusal.BAD_REQUEST: (400, "Bad Request"),
    Refusal.UNKNOWN_CONNECTION: (400, "Bad Request"),
    Refusal.NO_CREDENTIALS: (401, "Unauthorized"),
    Refusal.UNKNOWN_USER: (401, "Unauthorized"),
    Refusal.WRONG_PASSWORD: (401, "Unauthorized"),
    Refusal.EXPIRED: (401, "Unauthorized"),
    Refusal.FORBIDDEN_METHOD: (403, "Forbidden"),
    Refusal.FORBIDDEN_PEER: (403, "Forbidden"),
    Refusal.UNKNOWN_ATTRIBUTE: (420, "Unknown Attribute"),
    Refusal.NO_ALLOCATION: (437, "Allocation Mismatch"),
    Refusal.HAS_ALLOCATION: (437, "Allocation Mismatch"),
    Refusal.STALE_NONCE: (438, "Stale Nonce"),
    Refusal.FAMILY_NOT_SUPPORTED: (440, "Address Family not Supported"),
    Refusal.WRONG_USER: (441, "Wrong Credentials"),
    Refusal.TRANSPORT_NOT_SUPPORTED: (442, "Unsupported Transport Protocol"),
    Refusal.FAMILY_MISMATCH: (443, "Peer Address Family Mismatch"),
    Refusal.CONNECTION_EXISTS: (446, "Connection Already Exists"),
    Refusal.CONNECT_FAILED: (447, "Connection Timeout or Failure"),
    Refusal.QUOTA: (486, "Allocation Quota Reached"),
    Refusal.PORT_SHARE: (486, "Allocation Quota Reached"),
    Refusal.CAPACITY: (508, "Insufficient Capacity"),
    Refusal.DRAINING: (508, "Insufficient Capacity"),
}
"""Code and phrase on the wire (RFC 8656, section 19; RFC 6062, section 6.3)."""


class Drop(StrEnum):
    """Why a datagram was not relayed, or not answered. Metric label."""

    NOT_STUN = "not_stun"
    NO_ALLOCATION = "no_allocation"
    NO_PERMISSION = "no_permission"
    NO_CHANNEL = "no_channel"
    PACE = "pace"
    """The account's bytes per second are used up."""
    FULL = "full"
    """The kernel's send buffer had no room."""
    UNSENDABLE = "unsendable"
    """No route, too long for the path with DONT-FRAGMENT, or blocked by a local firewall."""
    ANSWER_RATE = "answer_rate"
    """Too many unsigned answers to that address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Lifetimes in seconds, and counts. The defaults suit a server with a few hundred gateways."""

    default_lifetime_s: float = 600.0
    """RFC 8656, section 3.2. A client that requests less gets this."""
    max_lifetime_s: float = 3600.0
    """RFC 8656, section 7.2, recommends at most an hour; coturn's limit is the same."""
    permission_lifetime_s: float = 300.0
    """RFC 8656, section 9: a permission lasts 300 s."""
    channel_lifetime_s: float = 600.0
    """RFC 8656, section 12: a channel lasts 10 minutes."""
    bind_timeout_s: float = 30.0
    """RFC 6062, section 5.2: a peer waits at least 30 s for its ConnectionBind."""
    connect_timeout_s: float = 30.0
    """RFC 6062, section 5.2: an active Connect is tried for at least 30 s."""
    max_allocations: int = 16_384
    """As many as the dynamic ports 49152-65535."""
    max_allocations_per_account: int = 256
    """The gateways of a network may share one account: 16 gateways with 16 allocations each."""
    max_ports_per_account: int | None = None
    """An account's share of the relay ports, so that it leaves some to the others. None: no share of its own."""
    max_permissions: int = 1024
    """Per allocation, as in coturn since 4.17. Each is the address of a relay, so a network needs a few."""
    max_unbound_per_allocation: int = 1024
    """Peers that wait for their bind. 300 at once were measured to be bound within 0.2 s. So the oldest of a thousand will probably
    never be bound, and is dropped when another one comes."""
    max_unbound: int = 4096
    """The same for all allocations together. Each peer takes a descriptor and, since it is not read, up to 128 KiB in the kernel
    (measured: the initial size of net.ipv4.tcp_rmem, which does not grow): half a GiB in all. A smaller SO_RCVBUF until the bind
    would make it 52 kB each, but the stream would never recover from that: 3 Gb/s instead of 17 after raising it again, and stalls
    as long as a retransmission timeout."""
    max_connections_per_account: int = 16_384
    """Peers, waiting or bound. Each takes two descriptors."""
    buffer_bytes: int = DEFAULT_BUFFER_BYTES
    """What the kernel may hold of one direction of a slow stream."""
    max_channels: int = 1024
    """Per allocation. There are numbers for 4096."""
    max_connects_per_allocation: int = 64
    """Active Connects in progress: each sends a SYN to a third party."""
    max_bytes_per_second_per_account: float | None = None
    """Payload relayed for one account, both directions together. Streams are slowed down to it; datagrams beyond it are dropped."""


@dataclass(slots=True, kw_only=True, eq=False)
class Allocation:
    """One relayed address. It ends with its control connection at the latest."""

    five_tuple: FiveTuple
    """Of the control connection."""
    account: str
    relayed: Endpoint
    transaction_id: bytes
    """Of the Allocate that made it, so that a retransmission gets the same answer."""
    lifetime_s: float
    """The lifetime granted last, in seconds."""
    expires_at: float
    family: int
    transport: int = TRANSPORT_TCP
    """Of the relayed address."""
    reservation: bytes = b""
    """Token of the reserved next higher port, if requested."""
    pace: Pace | None = None
    fingerprint: bool = False
    """The client uses FINGERPRINT, so indications have it too."""
    permissions: dict[str, float] = field(default_factory=dict)
    """Peer address to the time when the permission expires."""
    waiting: dict[bytes, "Attempt"] = field(default_factory=dict)
    """Peers that wait for their bind, by connection id, in order of arrival."""
    connected: set[Endpoint] = field(default_factory=set)
    """Peers that are connected, or that we are connecting to."""
    connecting: int = 0
    """Connects in progress."""
    channels: dict[int, tuple[Endpoint, float]] = field(default_factory=dict)
    """Channel number to peer and the time when the channel expires."""
    channel_of: dict[Endpoint, int] = field(default_factory=dict)
    to_client: int = 0
    """Payload bytes relayed to the client."""
    to_peer: int = 0

    def refresh(self, lifetime_s: float, now: float) -> None:
        """Set the lifetime to `lifetime_s` from now."""
        self.lifetime_s = lifetime_s
        self.expires_at = now + lifetime_s

    def permit(self, addresses: Iterable[str], lifetime_s: float, limit: int, now: float) -> bool:
        """Install or refresh permissions, all or none; False if there would be more than `limit`."""
        wanted = dict.fromkeys(addresses, now + lifetime_s)
        kept = {address: end for address, end in self.permissions.items() if end > now}
        if len(kept | wanted) > limit:
            return False
        self.permissions = kept | wanted
        return True

    def permits(self, address: str, now: float) -> bool:
        """Tell whether a peer has a permission now. Ports do not matter (RFC 8656, section 9)."""
        return self.permissions.get(address, now) > now

    def bind_channel(self, number: int, peer: Endpoint, limits: "Limits", now: float) -> Refusal | None:
        """Bind or refresh a channel (RFC 8656, section 12.2). A number has one peer, and a peer one number."""
        self.channels = {known: (bound, end) for known, (bound, end) in self.channels.items() if end > now}
        self.channel_of = {bound: known for known, (bound, _) in self.channels.items()}
        if self.channels.get(number, (peer, 0.0))[0] != peer or self.channel_of.get(peer, number) != number:
            return Refusal.BAD_REQUEST
        if number not in self.channels and len(self.channels) >= limits.max_channels:
            return Refusal.CAPACITY
        if not self.permit([peer[0]], limits.permission_lifetime_s, limits.max_permissions, now):
            return Refusal.CAPACITY
        self.channels[number] = (peer, now + limits.channel_lifetime_s)
        self.channel_of[peer] = number
        return None

    def peer_of(self, channel: int, now: float) -> Endpoint | None:
        """Return the peer of a channel, None if it is not bound now."""
        peer, end = self.channels.get(channel, (None, 0.0))
        return peer if end > now else None

    def channel_to(self, peer: Endpoint, now: float) -> int | None:
        """Return the channel of a peer, None if none is bound now."""
        channel = self.channel_of.get(peer)
        return channel if channel is not None and self.channels[channel][1] > now else None


class Attempt(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A connected peer that waits for the ConnectionBind with this id."""

    connection_id: bytes
    """Four unpredictable bytes, valid for one bind."""
    peer: Endpoint
    allocation: Allocation


class AllocationTable:
    """All allocations and all waiting peers of one server."""

    def __init__(self, limits: Limits, draw: Callable[[int], bytes]) -> None:
        """`draw(n)` returns n unpredictable random bytes; in production it is `secrets.token_bytes`."""
        self.limits = limits
        self._draw = draw
        self._allocations: dict[FiveTuple, Allocation] = {}
        self._per_account: Counter[str] = Counter()
        self._connections: Counter[str] = Counter()
        self._attempts: dict[bytes, Attempt] = {}
        self._places = 0
        self.draining = False
        """The server is about to stop and makes no new allocations."""

    def __len__(self) -> int:
        return len(self._allocations)

    def __iter__(self) -> Iterator[Allocation]:
        return iter(self._allocations.values())

    @property
    def waiting(self) -> int:
        """Number of peers that wait for their bind."""
        return len(self._attempts)

    @property
    def largest_account(self) -> int:
        """Number of allocations of the account that has the most."""
        return max(self._per_account.values(), default=0)

    # -- allocations

    def find(self, five_tuple: FiveTuple, now: float) -> Allocation | None:
        """Return the allocation of that control connection, None if there is none or it has expired."""
        allocation = self._allocations.get(five_tuple)
        return allocation if allocation is not None and allocation.expires_at > now else None

    def reserve(self, account: str) -> Refusal | None:
        """Reserve a place for an allocation of that account before its port is opened. Returns the refusal if there is none left.

        A reserved place is either filled by `add` or released by `give_up`.
        """
        if self.draining:
            return Refusal.DRAINING
        if self._per_account.get(account, 0) >= self.limits.max_allocations_per_account:
            return Refusal.QUOTA
        most = self.limits.max_ports_per_account
        if most is not None and self._per_account.get(account, 0) >= most:
            return Refusal.PORT_SHARE
        if self._places >= self.limits.max_allocations:
            return Refusal.CAPACITY
        self._per_account[account] += 1
        self._places += 1
        return None

    def give_up(self, account: str) -> None:
        """Release a place that `reserve` reserved."""
        _count_down(self._per_account, account)
        self._places -= 1

    def add(self, allocation: Allocation) -> None:
        """Add an allocation in the place that `reserve` reserved."""
        self._allocations[allocation.five_tuple] = allocation

    def remove(self, allocation: Allocation) -> None:
        """Remove an allocation and the peers that wait for it. Does nothing the second time."""
        if self._allocations.get(allocation.five_tuple) is allocation:
            del self._allocations[allocation.five_tuple]
            self.give_up(allocation.account)
            for attempt in tuple(allocation.waiting.values()):
                self.release(attempt)

    # -- peers

    def announce(self, allocation: Allocation, peer: Endpoint, now: float) -> tuple[Attempt, Attempt | None] | Refusal:
        """Admit a peer that has connected to the relayed address.

        Returns its attempt, which waits now, and the attempt that is dropped for it if too many wait; or the refusal.
        """
        if not allocation.permits(peer[0], now):
            return Refusal.PEER_NOT_PERMITTED
        if self._connections.get(allocation.account, 0) >= self.limits.max_connections_per_account:
            return Refusal.PEER_LIMIT
        if len(self._attempts) >= self.limits.max_unbound and not allocation.waiting:
            return Refusal.PEER_LIMIT  # peers of other allocations are not dropped for it
        self._connections[allocation.account] += 1
        allocation.connected.add(peer)
        return self.enqueue(allocation, peer)

    def connect(self, allocation: Allocation, peer: Endpoint) -> Refusal | None:
        """Admit a peer that we shall connect to (RFC 6062, section 5.2), or return the refusal. Call `depart` in the end."""
        if peer in allocation.connected:
            return Refusal.CONNECTION_EXISTS
        if (
            allocation.connecting >= self.limits.max_connects_per_allocation
            or self._connections.get(allocation.account, 0) >= self.limits.max_connections_per_account
        ):
            return Refusal.CAPACITY
        self._connections[allocation.account] += 1
        allocation.connected.add(peer)
        allocation.connecting += 1
        return None

    def enqueue(self, allocation: Allocation, peer: Endpoint) -> tuple[Attempt, Attempt | None]:
        """Let a connected peer wait for its bind. Returns the same as `announce`."""
        crowded_out = None
        if allocation.waiting and (
            len(allocation.waiting) >= self.limits.max_unbound_per_allocation
            or len(self._attempts) >= self.limits.max_unbound
        ):
            crowded_out = next(iter(allocation.waiting.values()))
            self.release(crowded_out)
        connection_id = self._draw(4)
        while connection_id in self._attempts:
            connection_id = self._draw(4)
        attempt = Attempt(connection_id=connection_id, peer=peer, allocation=allocation)
        self._attempts[connection_id] = attempt
        allocation.waiting[connection_id] = attempt
        return attempt, crowded_out

    def claim(self, connection_id: bytes | None, account: str) -> Attempt | Refusal:
        """Return the waiting peer with that id and end its wait. After a refusal it still waits."""
        attempt = self._attempts.get(connection_id or b"")
        if attempt is None:
            return Refusal.UNKNOWN_CONNECTION
        if attempt.allocation.account != account:
            return Refusal.WRONG_USER
        self.release(attempt)
        return attempt

    def release(self, attempt: Attempt) -> bool:
        """End the wait of a peer. False if it had already ended: the peer was claimed or dropped, or its allocation removed."""
        if self._attempts.get(attempt.connection_id) is not attempt:
            return False
        del self._attempts[attempt.connection_id]
        del attempt.allocation.waiting[attempt.connection_id]
        return True

    def depart(self, allocation: Allocation, peer: Endpoint) -> None:
        """Record that a peer of an allocation, from `announce` or `connect`, has gone."""
        allocation.connected.discard(peer)
        _count_down(self._connections, allocation.account)


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
