"""The `turn` and `turn_servers` sections: this network's TURN servers, embedded and external."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from crossnet.config.schema import Live, OneOrMore, key, rule
from crossnet.config.types import (
    Boolean,
    BufferSize,
    Cidr,
    Count,
    ExistingFile,
    IpAddress,
    ListenAddress,
    Percent,
    Port,
    PortRange,
    RecordId,
    SecretFile,
    Size,
    Text,
    TurnServerUrl,
)
from discovery.model.validation import Fault
from sniproxy.engine import DEFAULT_BUFFER_BYTES
from turnreg.server.allocation import Limits as TurnLimits
from turnreg.server.config import (
    DEFAULT_PORTS,
    MAX_REALM_CHARACTERS,
    are_families_alike,
    can_be_relayed_from,
    can_log_in,
    is_one_per_family,
    is_realm,
)

_TURN_LIMITS = TurnLimits()

DEFAULT_PORT_SHARE = 50
"""In percent. Two networks cannot lock each other out, and one alone can have two allocations where only four ports are open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTlsSection:
    """TLS of the embedded TURN server (`turns:`). The files are reloaded when they change."""

    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()]
    """Addresses to listen on for TLS."""
    cert: ExistingFile
    """The certificate chain."""
    key: ExistingFile
    """Its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSection:
    """The embedded TURN server, for gateways of other networks."""

    id: RecordId
    """The id of its record."""
    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()] = ()
    """Addresses to listen on for TCP, which gateways need unless they use TLS."""
    tls: TurnTlsSection | None = None
    """Listening addresses and certificate for TLS."""
    listen_udp: Annotated[tuple[ListenAddress, ...], OneOrMore()] = ()
    """Addresses to listen on for UDP, for STUN and TURN clients other than gateways."""
    relay_address: Annotated[tuple[IpAddress, ...], OneOrMore()]
    """Addresses of allocations, at most one per address family."""
    advertise_relay_address: Annotated[tuple[IpAddress, ...], OneOrMore()] = ()
    """If there is a NAT in between: the same addresses, in the same order, as this network's relays reach them."""
    ports: PortRange = DEFAULT_PORTS
    """Port range of allocations. Relays must be able to reach them, gateways need not."""
    secret: Live[Annotated[tuple[SecretFile, ...], OneOrMore()]] = ()
    """Shared secrets of REST credentials; two while one is being replaced."""
    users: Live[dict[Text, SecretFile]] = dataclasses.field(default_factory=dict)
    """Users by name, with their passwords (long-term credentials)."""
    realm: Text | None = None
    """Realm of the credentials; by default the mesh domain."""
    allow_peers: Live[tuple[Cidr, ...]] = ()
    """Ranges of peers that are allowed although they are refused by default, such as 127.0.0.0/8 for trying it on one machine."""
    zone: RecordId | None = None
    """Its zone: relays of the same zone prefer its allocations."""
    advertise: TurnServerUrl | None = None
    """URL under which gateways of other networks reach it; by default its listening or relay address."""
    udp_allocations: Boolean = False
    """Allow UDP allocations, over which clients may send datagrams to any address that is not refused."""
    active_connect: Boolean = False
    """Allow clients to make it connect to any address that is not refused. Gateways do not need this."""
    max_allocations_per_user: Live[Count] = _TURN_LIMITS.max_allocations_per_account
    """Limit of one user's allocations."""
    max_port_share_per_user: Live[Percent] = DEFAULT_PORT_SHARE
    """Limit of one user's share of `ports`; an allocation takes one port. A REST user is identified without the timestamp."""
    max_streams_per_user: Live[Count] = _TURN_LIMITS.max_connections_per_account
    """Limit of one user's concurrent connections."""
    buffer_bytes: Live[BufferSize] = dataclasses.field(default=DEFAULT_BUFFER_BYTES, metadata=key("buffer"))
    """Kernel memory for each direction of a stream whose reader is slow. While it moves fast, it may hold more."""
    max_bytes_per_second_per_user: Live[Size | None] = None
    """Limit of one user's bandwidth, both directions together. Streams are slowed down to it, datagrams above it are dropped."""

    @rule("secret", "users")
    def _log_in(self) -> Iterator[Fault]:
        if not can_log_in(self.users, self.secret):
            yield Fault(".secret", "{file: PATH}, or users", "neither")

    @rule("listen", "tls")
    def _reachable(self) -> Iterator[Fault]:
        if not self.listen and self.tls is None:
            yield Fault(".listen", "ip:port, or tls", "neither")

    @rule("relay_address")
    def _relay_addresses(self) -> Iterator[Fault]:
        if not is_one_per_family(self.relay_address):
            yield Fault(".relay_address", "one address of a family", "two" if self.relay_address else "none")
        for address in self.relay_address:
            if not can_be_relayed_from(address):
                yield Fault(".relay_address", "an address of this host", str(address))

    @rule("realm")
    def _realm(self) -> Iterator[Fault]:
        if self.realm is not None and not is_realm(self.realm):
            yield Fault(".realm", f"at most {MAX_REALM_CHARACTERS} characters", str(len(self.realm)))

    @rule("relay_address", "advertise_relay_address")
    def _advertised_addresses(self) -> Iterator[Fault]:
        outside = self.advertise_relay_address
        if outside and not are_families_alike(self.relay_address, outside):
            yield Fault(".advertise_relay_address", "as many addresses of the same families as relay_address", "others")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnServerSection:
    """A TURN server of this network that is operated separately, such as coturn."""

    id: RecordId
    """The id of its record."""
    url: TurnServerUrl
    """URL under which gateways of other networks reach it."""
    relay_addresses: tuple[IpAddress, ...]
    """Addresses of its allocations, as the relays of this network reach them."""
    port_min: Port = 49152  # RFC 8656 section 5, coturn's default too
    """Lowest port of its allocations."""
    port_max: Port = 65535
    """Highest port of its allocations."""
    zone: RecordId | None = None
    """As for `turn`."""

    @rule("port_min", "port_max")
    def _range(self) -> Iterator[Fault]:
        if self.port_max < self.port_min:
            yield Fault(".port_max", f"a port from {self.port_min} on", str(self.port_max))
