"""What a DnsServer is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from discovery.model.addresses import PRIVATE_RANGES
from discovery.model.imports import Imports
from dnsgw.message.question import MAX_UDP_REPLY
from dnsgw.upstream.address import UpstreamAddress
from dnsgw.upstream.cache import CacheConfig
from dnsgw.upstream.forwarder import MAX_IN_FLIGHT, RACE_S
from dnsgw.upstream.host_resolvers import Endpoint

DEFAULT_DOMAIN = "svc.mesh.internal"
DEFAULT_RATE_LIMIT = (
    0  # as CoreDNS, unbound and dnsdist: one client may be the cluster's own DNS, which asks for thousands
)
DEFAULT_TTL_S = 5  # what Kubernetes' own DNS uses: a relay that is gone is forgotten soon


# Who asks from inside: loopback, RFC 1918, shared (RFC 6598, many pod networks), link-local and unique local addresses.
# Answering anybody else makes an open resolver, a tool for attacks on others (RFC 5358).
@dataclass(frozen=True, slots=True, kw_only=True)
class DnsConfig:
    """The resolver of one network."""

    network: str
    """The network whose clients ask, and whose relays they are sent to."""

    listen: tuple[Endpoint, ...]
    """Addresses for UDP and TCP alike; port 0 is any, the same for both."""

    domain: str = DEFAULT_DOMAIN
    """The mesh domain."""

    upstream: tuple[UpstreamAddress | Endpoint, ...] = ()
    """Resolvers for all other names, in order; none: the name servers of `resolv_conf`."""

    forward: Mapping[str, tuple[UpstreamAddress, ...]] = field(default_factory=dict)
    """Resolvers of their own for the names at and under these."""

    absent: tuple[str | IPv4Network | IPv6Network, ...] = ()
    """Names that do not exist, with all below them, and networks whose addresses have no names, besides those of `absent.py`."""

    search: tuple[str, ...] = ()
    """Domains that clients search names in: upstream is asked for what is in them, be it under `.local`."""

    upstream_ca: str | None = None
    """Who signs the certificates of upstreams that are spoken to in secret, as PEM; none: the system's authorities."""

    race_s: float = RACE_S
    """How long one upstream has before another is asked as well."""

    random_case: bool = True
    """Ask upstream in random case and believe only answers that keep it (DNS 0x20); off by itself where one loses it."""

    client_subnet: bool = False
    """Pass the clients' own subnet option on (RFC 7871); what is answered to it is not kept."""

    resolv_conf: Path = Path("/etc/resolv.conf")
    imports: Imports = field(default_factory=Imports)
    """Plain names that this network takes from others."""

    ttl_s: int = DEFAULT_TTL_S
    """Of every answer of ours, positive or negative."""

    allow: tuple[IPv4Network | IPv6Network, ...] = PRIVATE_RANGES
    """Whose questions are answered; everybody else is refused."""

    rate_limit: int = DEFAULT_RATE_LIMIT
    """Questions that one client may ask in a second; 0: any number."""

    max_udp_reply: int = MAX_UDP_REPLY
    """Bytes of the largest reply over UDP, 512 to 1232, whatever the client says that it can take."""

    cache: CacheConfig = field(default_factory=CacheConfig)

    stale_relays_for_s: float = 0.0
    """How long the relays known last are answered when none is alive; 0: such questions fail at once."""

    vip: IPv4Network | IPv6Network | None = None
    """A range from which imported services have addresses of their own; what leads them to a relay is another's task."""

    cookie_secret: bytes | None = None
    """16 bytes that all servers of one address share (RFC 9018); none: drawn at the start."""

    loop_probe: bool = True
    """Ask upstream a name that nobody has now and then, to see whether it comes back here."""

    reuse_port: bool = False
    """Let other processes listen on the same addresses: the kernel shares the clients out among them."""

    max_in_flight: int = MAX_IN_FLIGHT
    """Questions that may wait for an upstream; more are refused at once, as a queue would only make all of them late."""

    max_tcp_connections: int = 512
    max_tcp_connections_per_client: int = 128
    tcp_idle_timeout_s: float = 10.0
    """A connection without a whole question for so long is closed (RFC 7766 section 6.2.3)."""
