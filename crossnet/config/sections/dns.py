"""The `dns` section: the resolver of this network's clients."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, TypeAlias

from crossnet.config.schema import Leaf, Live, Mismatch, OneOrMore, key, rule
from crossnet.config.types import (
    Boolean,
    CertificatesFile,
    Cidr,
    Count,
    Domain,
    Duration,
    DurationOrZero,
    ListenAddress,
    SecretFile,
    WholeSeconds,
    format_size,
    parse_size,
)
from discovery.files.yaml_file import Plain
from discovery.model.addresses import PRIVATE_RANGES, Network
from discovery.model.names import normalise_domain
from discovery.model.validation import Fault
from dnsgw import config as dns
from dnsgw.message.cookie import SECRET_SIZE
from dnsgw.message.question import MAX_UDP_REPLY, MIN_UDP_REPLY
from dnsgw.upstream.address import EXPECTED, BadUpstreamAddress, UpstreamAddress, UpstreamProtocol, parse_destination
from dnsgw.upstream.cache import CacheConfig
from dnsgw.upstream.forwarder import MAX_IN_FLIGHT, RACE_S

MIN_VIP_ADDRESSES = 16  # a smaller range has room for hardly any service


def _destination(value: Plain, folder: Path) -> UpstreamAddress:
    del folder
    if not isinstance(value, str):
        raise Mismatch
    try:
        return parse_destination(value)
    except BadUpstreamAddress as error:
        raise Mismatch from error


def _size_or_zero(value: Plain, folder: Path) -> int:
    del folder
    return parse_size(value)


def _udp_reply(value: Plain, folder: Path) -> int:
    del folder
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_UDP_REPLY <= value <= MAX_UDP_REPLY:
        raise Mismatch
    return value


def _absent(value: Plain, folder: Path) -> str | Network:
    del folder
    if not isinstance(value, str):
        raise Mismatch
    try:
        return ip_network(value) if "/" in value else normalise_domain(value)
    except ValueError as error:
        raise Mismatch from error


Upstream: TypeAlias = Annotated[UpstreamAddress, Leaf(EXPECTED, _destination)]
AbsentName: TypeAlias = Annotated[str | Network, Leaf("a domain name or a CIDR", _absent)]
SizeOrZero: TypeAlias = Annotated[int, Leaf("a size such as 32MiB, or 0", _size_or_zero, format_size)]
UdpReply: TypeAlias = Annotated[
    int, Leaf(f"a whole number {MIN_UDP_REPLY}-{MAX_UDP_REPLY}", _udp_reply, lambda number: number)
]

_CACHE = CacheConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsSection:
    """The resolver of this network's clients."""

    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()]
    """Addresses to listen on, over UDP and TCP."""
    reuse_port: Boolean = False
    """Let several processes, such as one per core, listen on the same addresses; the kernel distributes the clients."""
    upstream: Live[Annotated[tuple[Upstream, ...], OneOrMore()]] = ()
    """Resolvers for all other names; by default those of /etc/resolv.conf."""
    upstream_ca: Live[CertificatesFile | None] = None
    """CA for the certificates of tls:// and https:// upstreams; by default the system's CAs."""
    forward: Live[dict[Domain, Annotated[tuple[Upstream, ...], OneOrMore()]]] = dataclasses.field(default_factory=dict)
    """Other resolvers for particular zones: for these names and all below them."""
    absent: Live[Annotated[tuple[AbsentName, ...], OneOrMore()]] = ()
    """Names that do not exist, with all below them, and networks whose addresses have no names. Examples: [10.0.0.0/8] if nobody
    serves their reverse zones; [use-application-dns.net, mask.icloud.com, mask-h2.icloud.com] if browsers must not bypass this
    resolver. Always included: local, except cluster.local, clusterset.local and names in `forward` or `search`, and the reverse
    zones of loopback and link-local addresses."""
    race_s: Live[Duration] = RACE_S
    """How long one upstream has to answer before the next is asked as well."""
    random_case: Live[Boolean] = True
    """Ask upstream in random case and accept only answers that keep it (DNS 0x20). Turned off for upstreams that do not keep it."""
    client_subnet: Live[Boolean] = False
    """Forward the client's subnet option to upstream (RFC 7871). Answers to such questions are not cached."""
    allow: Live[tuple[Cidr, ...]] = PRIVATE_RANGES
    """Clients that are answered. An open resolver can be abused for attacks."""
    rate_limit: Live[Count] = dns.DEFAULT_RATE_LIMIT
    """Questions per second of one client, which is an IPv4 address or an IPv6 /64; 0: no limit."""
    max_udp_reply: Live[UdpReply] = MAX_UDP_REPLY
    """Largest UDP reply in bytes. Longer ones are truncated, and clients ask again over TCP."""
    search: Live[Annotated[tuple[Domain, ...], OneOrMore()] | None] = None
    """Search domains of the clients, which must not overlap with the mesh domain; by default this machine's."""
    ttl_s: Live[WholeSeconds] = dns.DEFAULT_TTL_S
    """TTL of our own answers."""
    vip: Live[Cidr | None] = None
    """Range from which each imported service gets an address of its own, for protocols without a server name."""
    stale_relays_for_s: Live[DurationOrZero] = dataclasses.field(default=0.0, metadata=key("stale_relays"))
    """How long answers name the last known relays when none is alive; 0: such questions fail at once."""
    cache: Live[SizeOrZero] = _CACHE.max_bytes
    """Memory for cached answers of upstream; 0: no cache."""
    max_ttl_s: Live[WholeSeconds] = _CACHE.max_ttl_s
    """How long an answer of upstream is cached at most."""
    max_negative_ttl_s: Live[WholeSeconds] = _CACHE.max_negative_ttl_s
    """How long it is cached at most that a name or a type does not exist."""
    stale_answers_s: Live[DurationOrZero] = _CACHE.stale_for_s
    """How long after its expiry a cached answer is used when upstream does not answer; 0: never."""
    cookie_secret: Live[SecretFile | None] = None
    """Secret of DNS cookies: 32 hexadecimal digits, shared by all servers behind one address; by default drawn at the start."""
    loop_probe: Live[Boolean] = True
    """Now and then ask upstream for a random name, to detect forwarding loops."""
    max_in_flight: Live[Count] = MAX_IN_FLIGHT
    """Limit of outstanding questions to upstream; further ones are answered REFUSED."""

    @rule("vip")
    def _room(self) -> Iterator[Fault]:
        if self.vip is not None and self.vip.num_addresses < MIN_VIP_ADDRESSES:
            yield Fault(".vip", f"a range of {MIN_VIP_ADDRESSES} addresses or more", str(self.vip))

    @rule("cookie_secret")
    def _cookie(self) -> Iterator[Fault]:
        if self.cookie_secret is not None and self.cookie_bytes is None:
            yield Fault(".cookie_secret", f"a file with {2 * SECRET_SIZE} hexadecimal digits", "something else")

    @rule("upstream", "forward", "upstream_ca")
    def _signed(self) -> Iterator[Fault]:
        used = [way for group in (self.upstream, *self.forward.values()) for way in (found.way for found in group)]
        if self.upstream_ca is not None and not {UpstreamProtocol.TLS, UpstreamProtocol.HTTPS} & set(used):
            yield Fault(".upstream_ca", "nothing, since no upstream is tls:// or https://", str(self.upstream_ca))

    @property
    def cookie_bytes(self) -> bytes | None:
        """The secret of DNS cookies; None: there is none, or it is not valid."""
        if self.cookie_secret is None:
            return None
        try:
            secret = bytes.fromhex(self.cookie_secret.text)
        except ValueError:
            return None
        return secret if len(secret) == SECRET_SIZE else None

    @property
    def cache_config(self) -> CacheConfig:
        """The configuration of the cache."""
        return CacheConfig(
            max_bytes=self.cache,
            max_ttl_s=self.max_ttl_s,
            max_negative_ttl_s=self.max_negative_ttl_s,
            stale_for_s=self.stale_answers_s,
        )
