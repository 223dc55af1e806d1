"""The configuration of a DnsServer."""

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
DEFAULT_RATE_LIMIT = 0
"""None, as in CoreDNS, unbound and dnsdist: one client may be the cluster's own DNS, which forwards for thousands."""

DEFAULT_TTL_S = 5
"""As Kubernetes' own DNS: clients soon forget a relay that is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsConfig:
    """The resolver of one network."""

    network: str
    """The network whose clients ask, and whose relays they are sent to."""

    listen: tuple[Endpoint, ...]
    """Addresses to listen on, over UDP and TCP. Port 0: any free port, the same for both."""

    domain: str = DEFAULT_DOMAIN
    """The mesh domain."""

    upstream: tuple[UpstreamAddress | Endpoint, ...] = ()
    """Resolvers for all other names, in order. Empty: the name servers of `resolv_conf`."""

    forward: Mapping[str, tuple[UpstreamAddress, ...]] = field(default_factory=dict)
    """Resolvers for particular zones: for these names and all below them."""

    absent: tuple[str | IPv4Network | IPv6Network, ...] = ()
    """Names that do not exist, with all below them, and networks whose addresses have no PTR records, in addition to
    those of `mesh_zone/local_zones.py`."""

    search: tuple[str, ...] = ()
    """Search domains of the clients. Upstream is asked for names in them, even below `.local`."""

    upstream_ca: str | None = None
    """CA certificates, as PEM, for upstreams over TLS and HTTPS. None: those of the system."""

    race_s: float = RACE_S
    """How long one upstream has to answer before the next is asked as well."""

    random_case: bool = True
    """Ask upstream in random case and accept only answers that keep it (DNS 0x20). Turned off for an upstream that does not
    preserve case."""

    client_subnet: bool = False
    """Forward the client's subnet option (RFC 7871). Answers to such questions are not cached."""

    resolv_conf: Path = Path("/etc/resolv.conf")
    imports: Imports = field(default_factory=Imports)
    """Plain names that this network imports from others."""

    ttl_s: int = DEFAULT_TTL_S
    """TTL of our own answers, positive and negative."""

    allow: tuple[IPv4Network | IPv6Network, ...] = PRIVATE_RANGES
    """Networks whose clients are answered; all others get REFUSED. The default is what asks from inside: loopback, RFC 1918,
    shared (RFC 6598, many pod networks), link-local and unique local addresses. Answering others makes an open resolver, a tool
    for attacks (RFC 5358)."""

    rate_limit: int = DEFAULT_RATE_LIMIT
    """Questions per second and client; 0: no limit."""

    max_udp_reply: int = MAX_UDP_REPLY
    """Largest reply over UDP in bytes, 512 to 1232, even if the client advertises more."""

    cache: CacheConfig = field(default_factory=CacheConfig)

    stale_relays_for_s: float = 0.0
    """How long answers name the last known relays when none is alive; 0: such questions fail at once."""

    vip: IPv4Network | IPv6Network | None = None
    """A range from which each imported service gets an address of its own. Routing it to a relay is up to the network."""

    cookie_secret: bytes | None = None
    """16 bytes, shared by all servers behind one address (RFC 9018). None: drawn at the start."""

    loop_probe: bool = True
    """Now and then ask upstream for a random name, to see whether the question comes back here."""

    reuse_port: bool = False
    """Let other processes listen on the same addresses; the kernel distributes the clients among them."""

    max_in_flight: int = MAX_IN_FLIGHT
    """Questions that may wait for an upstream. More are refused at once: a queue would only make all of them late."""

    max_tcp_connections: int = 512
    max_tcp_connections_per_client: int = 128
    tcp_idle_timeout_s: float = 10.0
    """A connection on which no complete question has come for this long is closed (RFC 7766 section 6.2.3)."""
