"""What the embedded TURN server is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from discovery.model.addresses import TargetList
from turnreg.server.allocation import Endpoint, Limits
from turnreg.stun.auth import NONCE_LIFETIME_S

DEFAULT_PORTS = (49_152, 65_535)
"""The dynamic ports (RFC 6335), which RFC 8656, section 7.2, asks for. Linux's own ephemeral ports end at 60999 and overlap:
a port that is busy is skipped."""

UNAUTHENTICATED_TIMEOUT_S = 30.0
"""How long a connection may be neither an allocation's nor a peer's. It takes three round trips to become one; coturn gives
60 s, which is also what a client may rely on that opens connections in advance."""

MAX_UNAUTHENTICATED = 4096
"""Connections that have not shown credentials yet. When one too many comes, an old one goes, of whoever has many: a flood from
a few addresses crowds out itself."""

STREAM_IDLE_TIMEOUT_S = 24 * 3600.0
"""A TURN server cannot know what silence means; keep-alive finds peers that are gone within half a minute."""

HALF_CLOSE_TIMEOUT_S = 3600.0
"""Silence after one side has ended, where some client waits for an answer that takes long."""

SEND_TIMEOUT_S = 10.0
"""An answer or indication is a hundred bytes: a client that has no room for it for so long does not read any more."""

MAX_REFUSALS = 16
"""Refused requests after which a connection without an allocation is closed: a client needs one 401, and perhaps a 438."""

STRANGER_REQUESTS = (4.0, 32)
"""Messages a second, and at once, on a connection without an allocation. A client needs three or four in all, and asks whether the
server lives every ten seconds."""

CLIENT_REQUESTS = (200.0, 400)
"""The same on one with an allocation, payload not counted. A gateway proves its nonce at most twenty times a second; the rest is
room for permissions, and for clients that ask for a Connect for each stream."""

MAX_REALM_CHARACTERS = 127
"""RFC 8489, section 14.9: fewer than 128 characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnServerConfig:
    """Settings of one embedded TURN server. ValueError if they contradict each other."""

    listen: tuple[Endpoint, ...] = ()
    """Address and port of each listener for TCP; port 0 takes any."""
    listen_tls: tuple[Endpoint, ...] = ()
    """The same for TLS."""
    listen_udp: tuple[Endpoint, ...] = ()
    """The same for UDP. Who comes that way can only have UDP allocations."""
    tls_cert: Path | None = None
    """Certificate chain, PEM. It and the key are read again when they change."""
    tls_key: Path | None = None
    relay_addresses: tuple[str, ...]
    """Addresses of this host that relayed ports are opened on; at most one of each family."""
    realm: str
    advertised: Mapping[str, str] = field(default_factory=dict)
    """By relay address what it is to peers, where a NAT (one to one, ports unchanged) lies between."""
    udp_allocations: bool = False
    """Let clients send datagrams to any peer that is not refused."""
    active_connect: bool = False
    """Let clients have us connect to any peer that is not refused (RFC 6062, section 5.2). No permission guards it: whoever
    has credentials reaches what this host reaches."""
    port_min: int = DEFAULT_PORTS[0]
    port_max: int = DEFAULT_PORTS[1]
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Name to password."""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """REST secrets; two while one is being replaced."""
    allowed_peers: TargetList | None = None
    """Lifts refused ranges that it lies wholly inside, such as 127.0.0.0/8 for tests and the lab, and this host's own addresses
    that it holds."""
    limits: Limits = field(default_factory=Limits)
    nonce_lifetime_s: float = NONCE_LIFETIME_S
    unauthenticated_timeout_s: float = UNAUTHENTICATED_TIMEOUT_S
    max_unauthenticated: int = MAX_UNAUTHENTICATED
    software: str | None = "crossnet"
    """What SOFTWARE says; None leaves it out. No version: it would help attackers only."""

    def __post_init__(self) -> None:
        if not (self.listen or self.listen_tls or self.listen_udp):
            raise ValueError("listen, listen_tls, listen_udp: expected at least one address")
        if self.listen_tls and (self.tls_cert is None or self.tls_key is None):
            raise ValueError("tls_cert, tls_key: expected both, since listen_tls is there")
        if not self.users and not self.secrets:
            raise ValueError("users, secrets: expected at least one of them, or nobody can use the server")
        if not 0 < len(self.realm) <= MAX_REALM_CHARACTERS:
            raise ValueError(f"realm: expected 1 to {MAX_REALM_CHARACTERS} characters, got {len(self.realm)}")
        if not 0 < self.port_min <= self.port_max <= 65_535:
            raise ValueError(f"ports: expected a range in 1-65535, got {self.port_min}-{self.port_max}")
        addresses = [ip_address(text) for text in self.relay_addresses]
        if not addresses or len({address.version for address in addresses}) != len(addresses):
            raise ValueError("relay_addresses: expected one IPv4 address, one IPv6 address, or one of each")
        for address in addresses:
            if address.is_unspecified or address.is_multicast:
                raise ValueError(f"relay_addresses: expected an address of this host, got {address}")
        unknown = set(self.advertised) - set(self.relay_addresses)
        if unknown:
            raise ValueError(f"advertised: expected relay addresses, got {', '.join(sorted(unknown))}")
        for relay, reached in self.advertised.items():
            if ip_address(relay).version != ip_address(reached).version:
                raise ValueError(f"advertised: expected the family of {relay}, got {reached}")
        rate = self.limits.max_bytes_per_second_per_account
        if rate is not None and rate <= 0:
            raise ValueError(f"limits: expected bytes per second above 0, got {rate}")
