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

MIN_VIP_ADDRESSES = 16  # a range with fewer has room for hardly a service


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
    """Where clients ask, over UDP and TCP."""
    reuse_port: Boolean = False
    """Several processes listen on the same addresses, one for each core, say; the kernel shares the clients out."""
    upstream: Live[Annotated[tuple[Upstream, ...], OneOrMore()]] = ()
    """Servers that answer what is not ours; by default those of /etc/resolv.conf."""
    upstream_ca: Live[CertificatesFile | None] = None
    """Who signs the certificates of tls:// and https:// upstreams; by default the system's authorities."""
    forward: Live[dict[Domain, Annotated[tuple[Upstream, ...], OneOrMore()]]] = dataclasses.field(default_factory=dict)
    """Servers of their own for the names at and under these."""
    absent: Live[Annotated[tuple[AbsentName, ...], OneOrMore()]] = ()
    """Names that do not exist, with all below them, and networks whose addresses have no names: [10.0.0.0/8] where nobody serves
    their reverse, [use-application-dns.net, mask.icloud.com, mask-h2.icloud.com] where browsers should not go past this resolver.
    Always: local, but for cluster.local and what stands in `forward` or `search`, and the reverse of loopback and link-local
    addresses."""
    race_s: Live[Duration] = RACE_S
    """How long one upstream has before the next is asked as well."""
    random_case: Live[Boolean] = True
    """Ask upstream in random case and believe only answers that keep it (DNS 0x20); off by itself where an upstream loses it."""
    client_subnet: Live[Boolean] = False
    """Pass the subnet option of clients that send one on to upstream (RFC 7871); what is answered to it is not kept."""
    allow: Live[tuple[Cidr, ...]] = PRIVATE_RANGES
    """Clients that are answered; an open resolver is a weapon for others."""
    rate_limit: Live[Count] = dns.DEFAULT_RATE_LIMIT
    """Questions that one client, an IPv4 address or an IPv6 /64, may ask in a second; 0: any number."""
    max_udp_reply: Live[UdpReply] = MAX_UDP_REPLY
    """The longest UDP reply, in bytes; longer ones are truncated and asked for again over TCP."""
    search: Live[Annotated[tuple[Domain, ...], OneOrMore()] | None] = None
    """Search domains of the clients, which the mesh domain must not touch; by default this machine's."""
    ttl_s: Live[WholeSeconds] = dns.DEFAULT_TTL_S
    """How long clients may keep our own answers."""
    vip: Live[Cidr | None] = None
    """A range from which imported services have addresses of their own, for protocols without a server name."""
    stale_relays_for_s: Live[DurationOrZero] = dataclasses.field(default=0.0, metadata=key("stale_relays"))
    """How long the last relays are answered when none is alive; 0: such questions fail at once."""
    cache: Live[SizeOrZero] = _CACHE.max_bytes
    """Memory for answers of upstream; 0: none are kept."""
    max_ttl_s: Live[WholeSeconds] = _CACHE.max_ttl_s
    """The longest that an answer of upstream is kept."""
    max_negative_ttl_s: Live[WholeSeconds] = _CACHE.max_negative_ttl_s
    """The longest that it is kept that a name or a type does not exist."""
    stale_answers_s: Live[DurationOrZero] = _CACHE.stale_for_s
    """How long after its end upstream's last answer is given when upstream gives none; 0: never."""
    cookie_secret: Live[SecretFile | None] = None
    """32 hexadecimal digits that all servers of one address share; by default drawn at the start."""
    loop_probe: Live[Boolean] = True
    """Ask upstream now and then a name that nobody has, to see whether it comes back here."""
    max_in_flight: Live[Count] = MAX_IN_FLIGHT
    """Questions to upstream at once; further ones are answered SERVFAIL."""

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
        """The secret of cookies; None: there is none, or it is no such."""
        if self.cookie_secret is None:
            return None
        try:
            secret = bytes.fromhex(self.cookie_secret.text)
        except ValueError:
            return None
        return secret if len(secret) == SECRET_SIZE else None

    @property
    def cache_config(self) -> CacheConfig:
        """How much of upstream's answers is kept, and for how long."""
        return CacheConfig(
            max_bytes=self.cache,
            max_ttl_s=self.max_ttl_s,
            max_negative_ttl_s=self.max_negative_ttl_s,
            stale_for_s=self.stale_answers_s,
        )
