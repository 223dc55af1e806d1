"""Settings of the embedded TURN server."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from discovery.model.addresses import Address, TargetList
from turnreg.server.allocation import Endpoint, Limits
from turnreg.server.certificates import POLL_INTERVAL_S
from turnreg.stun.auth import NONCE_LIFETIME_S

DEFAULT_PORTS = (49_152, 65_535)
"""The dynamic ports (RFC 6335), as RFC 8656, section 7.2, recommends. Linux's ephemeral ports end at 60999 and overlap; a port that
is in use is skipped."""

UNAUTHENTICATED_TIMEOUT_S = 30.0
"""How long a connection may have neither an allocation nor a peer. A client needs three round trips to get there. coturn allows
60 s, and a client that opens connections in advance may rely on that."""

MAX_UNAUTHENTICATED = 4096
"""Most connections that are not authenticated yet. Beyond that, the oldest one of the busiest client is closed, so that a flood
from a few addresses displaces only itself."""

STREAM_IDLE_TIMEOUT_S = 24 * 3600.0
"""A TURN server cannot know what silence means. TCP keep-alive finds dead peers within half a minute."""

HALF_CLOSE_TIMEOUT_S = 3600.0
"""Silence after one direction has ended: a client may wait for an answer that takes long."""

SEND_TIMEOUT_S = 10.0
"""Timeout for sending an answer or indication of a hundred bytes. A client without room for it for so long has stopped reading."""

MAX_REFUSALS = 16
"""Refused requests after which a connection without an allocation is closed. A client needs one 401, and perhaps a 438."""

UNAUTHENTICATED_REQUESTS = (4.0, 32)
"""Messages per second, and burst, on a connection without an allocation. A client needs three or four in all, and sends a
keep-alive request every ten seconds."""

CLIENT_REQUESTS = (200.0, 400)
"""The same on a connection with an allocation, payload not counted. A gateway verifies its nonce at most twenty times a second; the
rest is room for permissions, and for clients that send a Connect for each stream."""

MAX_REALM_CHARACTERS = 127
"""RFC 8489, section 14.9: fewer than 128 characters."""


def can_log_in(users: Collection[object], secrets: Collection[object]) -> bool:
    """Tell whether any client can authenticate."""
    return bool(users or secrets)


def is_one_per_family(addresses: Sequence[Address]) -> bool:
    """Tell whether there is an IPv4 address, an IPv6 address, or one of each."""
    versions = [address.version for address in addresses]
    return bool(versions) and len(set(versions)) == len(versions)


def can_be_relayed_from(address: Address) -> bool:
    """Tell whether this can be the address of one host, on which relayed ports are opened."""
    return not address.is_unspecified and not address.is_multicast


def are_families_alike(relay_addresses: Sequence[Address], advertised: Sequence[Address]) -> bool:
    """Tell whether there is an advertised address of the same family for every relay address, in the same order."""
    return [address.version for address in relay_addresses] == [address.version for address in advertised]


def is_realm(text: str) -> bool:
    """Tell whether REALM can hold this text."""
    return 0 < len(text) <= MAX_REALM_CHARACTERS


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnServerConfig:
    """Settings of one embedded TURN server. ValueError if they contradict each other."""

    listen: tuple[Endpoint, ...] = ()
    """Address and port of each listener for TCP; port 0 takes any."""
    listen_tls: tuple[Endpoint, ...] = ()
    """The same for TLS."""
    listen_udp: tuple[Endpoint, ...] = ()
    """The same for UDP. Clients on it can only have UDP allocations."""
    tls_cert: Path | None = None
    """Certificate chain, PEM. It and the key are reloaded when they change."""
    tls_key: Path | None = None
    relay_addresses: tuple[str, ...]
    """Addresses of this host on which relayed ports are opened; at most one of each family."""
    realm: str
    advertised: Mapping[str, str] = field(default_factory=dict)
    """Relay address to the address at which peers reach it, if there is a NAT between (one to one, ports unchanged)."""
    udp_allocations: bool = False
    """Let clients exchange datagrams with any peer that is not refused."""
    active_connect: bool = False
    """Let clients make us connect to any peer that is not refused (RFC 6062, section 5.2). It needs no permission, so a client with
    credentials can reach what this host can reach."""
    port_min: int = DEFAULT_PORTS[0]
    port_max: int = DEFAULT_PORTS[1]
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Name to password."""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """REST secrets; two while one is being replaced."""
    allowed_peers: TargetList | None = None
    """Peers to allow although they are in a refused range or are addresses of this host, such as 127.0.0.0/8 in tests and the lab.
    A CIDR lifts only refused ranges that contain all of it."""
    limits: Limits = field(default_factory=Limits)
    nonce_lifetime_s: float = NONCE_LIFETIME_S
    unauthenticated_timeout_s: float = UNAUTHENTICATED_TIMEOUT_S
    max_unauthenticated: int = MAX_UNAUTHENTICATED
    send_timeout_s: float = SEND_TIMEOUT_S
    certificate_poll_s: float = POLL_INTERVAL_S
    software: str | None = "crossnet"
    """Value of SOFTWARE; None omits it. It has no version, which would only help attackers."""

    def __post_init__(self) -> None:
        for rule in _RULES:
            error = rule(self)
            if error is not None:
                raise ValueError(error)


def _listens(config: TurnServerConfig) -> str | None:
    there = config.listen or config.listen_tls or config.listen_udp
    return None if there else "listen, listen_tls, listen_udp: expected at least one address"


def _has_certificate(config: TurnServerConfig) -> str | None:
    missing = config.listen_tls and (config.tls_cert is None or config.tls_key is None)
    return "tls_cert, tls_key: expected both, since listen_tls is there" if missing else None


def _has_credentials(config: TurnServerConfig) -> str | None:
    return (
        None
        if can_log_in(config.users, config.secrets)
        else "users, secrets: expected at least one of them, or nobody can use the server"
    )


def _realm_fits(config: TurnServerConfig) -> str | None:
    if is_realm(config.realm):
        return None
    return f"realm: expected 1 to {MAX_REALM_CHARACTERS} characters, got {len(config.realm)}"


def _ports_are_a_range(config: TurnServerConfig) -> str | None:
    first, last = config.port_min, config.port_max
    return None if 0 < first <= last <= 65_535 else f"ports: expected a range in 1-65535, got {first}-{last}"


def _one_relay_address_of_a_family(config: TurnServerConfig) -> str | None:
    if is_one_per_family([ip_address(text) for text in config.relay_addresses]):
        return None
    return "relay_addresses: expected one IPv4 address, one IPv6 address, or one of each"


def _relay_addresses_of_this_host(config: TurnServerConfig) -> str | None:
    for address in map(ip_address, config.relay_addresses):
        if not can_be_relayed_from(address):
            return f"relay_addresses: expected an address of this host, got {address}"
    return None


def _advertises_relay_addresses(config: TurnServerConfig) -> str | None:
    unknown = set(config.advertised) - set(config.relay_addresses)
    return f"advertised: expected relay addresses, got {', '.join(sorted(unknown))}" if unknown else None


def _advertises_the_same_family(config: TurnServerConfig) -> str | None:
    for relay, reached in config.advertised.items():
        if not are_families_alike([ip_address(relay)], [ip_address(reached)]):
            return f"advertised: expected the family of {relay}, got {reached}"
    return None


def _rate_is_positive(config: TurnServerConfig) -> str | None:
    rate = config.limits.max_bytes_per_second_per_account
    wrong = rate is not None and rate <= 0
    return f"limits: expected bytes per second above 0, got {rate}" if wrong else None


_RULES: tuple[Callable[[TurnServerConfig], str | None], ...] = (
    _listens,
    _has_certificate,
    _has_credentials,
    _realm_fits,
    _ports_are_a_range,
    _one_relay_address_of_a_family,
    _relay_addresses_of_this_host,
    _advertises_relay_addresses,
    _advertises_the_same_family,
    _rate_is_positive,
)
"""Each returns an error text or None; the first error is raised. A rule may raise ValueError for an invalid IP address."""
