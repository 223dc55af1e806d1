"""The `turn` and `turn_servers` sections: TURN servers of this network, ours and others."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from crossnet.config.schema import Live, OneOrMore, rule
from crossnet.config.types import (
    Boolean,
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
"""Two networks cannot keep each other out, and one alone can hold two allocations where only four ports are open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTlsSection:
    """Where the embedded TURN server speaks TLS (`turns:`). The files are read again when they change."""

    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()]
    """Where `turns:` clients come."""
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
    """For TCP, which gateways need, unless they come by TLS."""
    tls: TurnTlsSection | None = None
    """Where it speaks TLS."""
    listen_udp: Annotated[tuple[ListenAddress, ...], OneOrMore()] = ()
    """For STUN and TURN clients that are no gateways."""
    relay_address: Annotated[tuple[IpAddress, ...], OneOrMore()]
    """Where allocations are made; one address of a family."""
    advertise_relay_address: Annotated[tuple[IpAddress, ...], OneOrMore()] = ()
    """The same addresses, in their order, as this network's relays reach them, where a NAT lies between."""
    ports: PortRange = DEFAULT_PORTS
    """The range of ports of allocations. Relays must reach them, gateways need not."""
    secret: Live[Annotated[tuple[SecretFile, ...], OneOrMore()]] = ()
    """REST secrets; two while one is being replaced."""
    users: Live[dict[Text, SecretFile]] = dataclasses.field(default_factory=dict)
    """Users by name, with their passwords (long-term credentials)."""
    realm: Text | None = None
    """What clients are told the credentials are for; the mesh domain by default."""
    allow_peers: Live[tuple[Cidr, ...]] = ()
    """Peers in ranges that are refused otherwise, such as 127.0.0.0/8 for a try on one machine."""
    zone: RecordId | None = None
    """Where it stands: relays of the same zone prefer its allocations."""
    advertise: TurnServerUrl | None = None
    """How gateways of other networks reach it; by default by the address that it listens on or relays from."""
    udp_allocations: Boolean = False
    """Clients may send datagrams to any address that is not refused."""
    active_connect: Boolean = False
    """Clients may have it connect to any address that is not refused. Gateways do not need that."""
    max_allocations_per_user: Live[Count] = _TURN_LIMITS.max_allocations_per_account
    """Allocations of one user at once."""
    max_port_share_per_user: Live[Percent] = DEFAULT_PORT_SHARE
    """Of `ports`, by allocations: one port each. The name of a REST username counts, without its time."""
    max_streams_per_user: Live[Count] = _TURN_LIMITS.max_connections_per_account
    """Connections of one user at once."""
    max_bytes_per_second_per_user: Live[Size | None] = None
    """Both ways together; streams are slowed down to it, datagrams beyond it are dropped."""

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
    """A TURN server of this network that is not ours to run, such as coturn."""

    id: RecordId
    """The id of its record."""
    url: TurnServerUrl
    """How gateways of other networks reach it."""
    relay_addresses: tuple[IpAddress, ...]
    """Where its allocations are, as the relays of this network reach them."""
    port_min: Port = 49152  # RFC 8656 section 5, coturn's default too
    """The first port of its allocations."""
    port_max: Port = 65535
    """The last one."""
    zone: RecordId | None = None
    """As for `turn`."""

    @rule("port_min", "port_max")
    def _range(self) -> Iterator[Fault]:
        if self.port_max < self.port_min:
            yield Fault(".port_max", f"a port from {self.port_min} on", str(self.port_max))
