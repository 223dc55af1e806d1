"""The sections of the configuration file and the rules over their keys.

Each section is a dataclass whose fields are the section's keys, with the defaults written out.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated

from crossnet.dns_section import DnsSection
from crossnet.scalars import (
    Accepted,
    Boolean,
    Cidr,
    Count,
    DiscoverySource,
    Domain,
    Duration,
    DurationOrZero,
    Endpoint,
    ExistingFile,
    ImportName,
    IpAddress,
    KeyFile,
    KeyId,
    KeyPrefix,
    KubernetesUrl,
    Listen,
    ListenAddress,
    LogFormat,
    LogLevel,
    NetworkId,
    NewFile,
    Port,
    PortRange,
    Ports,
    Prefer,
    RecordId,
    Register,
    Replicas,
    RuleAction,
    RuleDestination,
    RulePort,
    RuleSource,
    SecretFile,
    Size,
    Store,
    Target,
    Text,
    TurnServerUrl,
    WholeSeconds,
)
from crossnet.schema import OneOrMore, key, rule
from discovery.addresses import TargetList
from discovery.imports import BadImport, ImportRule
from discovery.names import BadName, is_under, normalise_domain
from discovery.servers import parse_server_url
from discovery.shape import Fault
from discovery.static import load_mesh
from discovery.store.etcdapi import DEFAULT_PREFIX
from discovery.tokens import Tokens
from discovery.yamlfile import BadFile
from sniproxy import limits, relay
from sniproxy.dial import DEFAULT_DIAL_TIMEOUT_S
from sniproxy.hello import DEFAULT_MAX_HELLO_BYTES
from sniproxy.stream.policy import BadRule, Policy, Rule
from turnreg import gateway
from turnreg.server.allocation import Limits as TurnLimits
from turnreg.server.config import DEFAULT_PORTS
from turnreg.settings import DEFAULT_REPLICAS

_TURN_LIMITS = TurnLimits()

ROLES = ("discovery_server", "turn", "turn_servers", "dns", "relay", "gateway", "publisher")
"""In the order in which they start: each finds ready what it asks at its start."""

DEFAULT_DOMAIN = "svc.mesh.internal"
DEFAULT_ADMIN = Listen(IPv4Address("127.0.0.1"), 8690)
DEFAULT_DRAIN_S = 30.0
"""Long enough for a request under way, and what Kubernetes gives before it kills."""

CLUSTER_DOMAIN = "cluster.local"
MAX_RESOLV_CONF = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    """How log lines are written, on stderr."""

    format: LogFormat = "json"
    level: LogLevel = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryTlsSection:
    """How a discovery server's certificate is verified, and what we show in place of a token."""

    ca: ExistingFile
    cert: ExistingFile | None = None
    key: ExistingFile | None = None

    @rule("cert", "key")
    def _pair(self) -> Iterator[Fault]:
        if (self.cert is None) != (self.key is None):
            yield Fault(".cert" if self.cert is None else ".key", "cert and key, or neither", "one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySection:
    """A key that signs what relays of `from` send to gateways of `to`."""

    file: KeyFile
    source: NetworkId = dataclasses.field(metadata=key("from"))
    to: NetworkId

    @property
    def secret(self) -> bytes:
        """The 32 bytes."""
        return bytes.fromhex(self.file.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSection:
    """Plain service names that this network takes from others."""

    names: tuple[ImportName, ...]
    sources: tuple[NetworkId, ...] = dataclasses.field(metadata=key("from"))
    prefer: Prefer = "local"

    def as_rule(self) -> ImportRule:
        """The rule as discovery has it. Raises BadImport."""
        return ImportRule(names=self.names, sources=self.sources, prefer=self.prefer)

    @rule("names", "sources", "prefer")
    def _meant(self) -> Iterator[Fault]:
        try:
            self.as_rule()
        except BadImport as error:
            expected, _, got = error.expected.removeprefix("expected ").rpartition(", got ")
            yield Fault(f".{error.path}", expected or got, got if expected else "something else")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSection:
    """Who may go where, one rule: the first that matches decides, and what none matches is denied."""

    sources: Annotated[tuple[RuleSource, ...], OneOrMore()] = dataclasses.field(default=(), metadata=key("from"))
    """Clients, and at a gateway networks; by default all."""
    to: Annotated[tuple[RuleDestination, ...], OneOrMore()] = ()
    """Networks, names in which `*` is one label and a leading `**` one or more, targets; by default all."""
    ports: Annotated[tuple[RulePort, ...], OneOrMore()] = ()
    action: RuleAction

    def as_rule(self) -> Rule:
        """The rule as relays and gateways have it. Raises BadRule."""
        return Rule.parse(action=self.action, sources=self.sources, to=self.to, ports=self.ports)

    @rule("sources", "to", "ports", "action")
    def _bounded(self) -> Iterator[Fault]:
        try:
            self.as_rule()
        except BadRule as error:
            yield Fault(f".{error.path}", error.expected, "more")


def policy(rules: Iterable[RuleSection]) -> Policy:
    """Return what a list of rules comes to. Raises BadRule."""
    return Policy(tuple(section.as_rule() for section in rules))


def _not_too_many(rules: Iterable[RuleSection]) -> Iterator[Fault]:
    try:
        policy(rules)
    except BadRule as error:
        yield Fault(f".{error.path}", error.expected, "more")


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySection:
    """The relay of this network's clients."""

    id: RecordId
    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()]
    advertise: Annotated[tuple[IpAddress, ...], OneOrMore()] = ()
    """Addresses that clients reach it under; by default those that it listens on."""
    ports: Ports = "listen"
    """`auto`: it listens on the ports of imported services, too, since a plain service name says none."""
    port_range: PortRange = (1024, 65535)
    """What `auto` may open; ports below 1024 take a right of their own."""
    allow: tuple[Cidr, ...] = relay.PRIVATE_RANGES
    """Clients that may use it."""
    rules: tuple[RuleSection, ...] = ()
    """Which of them may go where; without any all may go everywhere."""
    deliver: tuple[Target, ...] = ()
    """What it may dial in its own network."""
    direct: tuple[Target, ...] = ()
    """Where it may dial gateways of other networks without a TURN server."""
    sources: dict[RecordId, tuple[IpAddress, ...]] = dataclasses.field(default_factory=dict)
    """For each TURN server the addresses that it sees this relay come from; asked of the server by default."""
    asks: tuple[NetworkId, ...] = ()
    """Networks that it asks for besides those it imports from: their gateways may register only where they are asked for."""
    pool: Count = 0
    """Connections kept ready to each allocation. There are none yet: see `config.warnings`."""
    proxy_from: tuple[Cidr, ...] = ()
    """Load balancers that begin each connection with a PROXY header (v1 or v2); from anywhere else that is not TLS."""
    max_hello: Size = DEFAULT_MAX_HELLO_BYTES
    max_hello_held: Size = limits.DEFAULT_MAX_HELLO_HELD_BYTES
    """Of all unfinished ClientHellos together."""
    max_streams: Count = relay.DEFAULT_MAX_STREAMS
    max_streams_per_client: Count = limits.DEFAULT_MAX_STREAMS_PER_CLIENT
    """By source address, an IPv6 client by its /64; 0 is no limit of its own."""
    new_streams_per_second: Count = limits.DEFAULT_NEW_STREAMS_PER_S
    """Of one client; 0 is no limit."""
    hello_timeout_s: Duration = relay.DEFAULT_HELLO_TIMEOUT_S
    dial_timeout_s: Duration = DEFAULT_DIAL_TIMEOUT_S
    idle_timeout_s: Duration = relay.DEFAULT_IDLE_TIMEOUT_S
    half_close_timeout_s: Duration = relay.DEFAULT_HALF_CLOSE_TIMEOUT_S

    @rule("rules")
    def _rules(self) -> Iterator[Fault]:
        yield from _not_too_many(self.rules)

    @rule("advertise", "listen")
    def _advertised(self) -> Iterator[Fault]:
        if not self.advertise and any(listen.address.is_unspecified for listen in self.listen):
            yield Fault(".advertise", "the addresses that clients reach, since it listens on all", "nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnAccessSection:
    """How this network's gateway proves itself to another network's TURN servers: one of the three ways."""

    username: Text | None = None
    password: SecretFile | None = None
    secret: SecretFile | None = None
    issue: Boolean = False
    """Ask this network's discovery server for credentials that live shortly."""
    ca: ExistingFile | None = None
    """Verifies `turns:` servers; the system's authorities by default."""

    @rule("username", "password", "secret", "issue")
    def _one_way(self) -> Iterator[Fault]:
        ways = [self.username is not None or self.password is not None, self.secret is not None, self.issue]
        if sum(ways) != 1:
            yield Fault(
                "", "one of {username, password}, {secret} and {issue: true}", "none" if not any(ways) else "more"
            )
        elif ways[0] and self.username is None:
            yield Fault(".username", "the name that the password is for", "nothing")
        elif ways[0] and self.password is None:
            yield Fault(".password", "{file: PATH}", "nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySection:
    """The gateway to this network's services."""

    id: RecordId
    allow: tuple[Target, ...]
    """What it may dial."""
    rules: tuple[RuleSection, ...] = ()
    """Which streams may go where, by the network and client that they come from; without any all that `allow` lists."""
    accept: tuple[Accepted, ...] = ("framed",)
    turn: dict[NetworkId, TurnAccessSection] = dataclasses.field(default_factory=dict)
    register: Register = "all"
    """`imported`: only with networks in which a relay asks for ours."""
    replicas: Replicas = DEFAULT_REPLICAS
    """Allocations on each TURN server, by different gateways of this network where there are several."""
    allow_turn_servers: tuple[Cidr, ...] = ()
    """TURN servers in ranges that are refused otherwise, such as 127.0.0.0/8 for a try on one machine."""
    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()] = ()
    """Where relays reach it without a TURN server; by default nowhere."""
    advertise: Endpoint | None = None
    """The address that relays dial for it; by default the one that it listens on."""
    max_hello: Size = DEFAULT_MAX_HELLO_BYTES
    max_streams: Count = gateway.DEFAULT_MAX_STREAMS
    hello_timeout_s: Duration = gateway.DEFAULT_HELLO_TIMEOUT_S
    dial_timeout_s: Duration = gateway.DEFAULT_DIAL_TIMEOUT_S
    idle_timeout_s: Duration = gateway.DEFAULT_IDLE_TIMEOUT_S
    half_close_timeout_s: Duration = gateway.DEFAULT_HALF_CLOSE_TIMEOUT_S

    @rule("rules")
    def _rules(self) -> Iterator[Fault]:
        yield from _not_too_many(self.rules)

    @rule("advertise", "listen")
    def _advertised(self) -> Iterator[Fault]:
        if self.listen and self.advertise is None and self.listen[0].address.is_unspecified:
            yield Fault(".advertise", "ip:port that relays dial, since it listens on all addresses", "nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTlsSection:
    """Where the embedded TURN server speaks TLS (`turns:`). The files are read again when they change."""

    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()]
    cert: ExistingFile
    key: ExistingFile


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSection:
    """The embedded TURN server, for gateways of other networks."""

    id: RecordId
    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()] = ()
    """For TCP, which gateways need, unless they come by TLS."""
    tls: TurnTlsSection | None = None
    listen_udp: Annotated[tuple[ListenAddress, ...], OneOrMore()] = ()
    """For STUN and TURN clients that are no gateways."""
    relay_address: Annotated[tuple[IpAddress, ...], OneOrMore()]
    """Where allocations are made; one address of a family."""
    advertise_relay_address: Annotated[tuple[IpAddress, ...], OneOrMore()] = ()
    """The same addresses, in their order, as this network's relays reach them, where a NAT lies between."""
    ports: PortRange = DEFAULT_PORTS
    secret: Annotated[tuple[SecretFile, ...], OneOrMore()] = ()
    """REST secrets; two while one is being replaced."""
    users: dict[Text, SecretFile] = dataclasses.field(default_factory=dict)
    realm: Text | None = None
    """What clients are told the credentials are for; the mesh domain by default."""
    allow_peers: tuple[Cidr, ...] = ()
    """Peers in ranges that are refused otherwise, such as 127.0.0.0/8 for a try on one machine."""
    advertise: TurnServerUrl | None = None
    """How gateways of other networks reach it; by default by the address that it listens on or relays from."""
    udp_allocations: Boolean = False
    """Clients may send datagrams to any address that is not refused."""
    active_connect: Boolean = False
    """Clients may have it connect to any address that is not refused. Gateways do not need that."""
    max_allocations_per_user: Count = _TURN_LIMITS.max_allocations_per_account
    max_streams_per_user: Count = _TURN_LIMITS.max_connections_per_account
    max_bytes_per_second_per_user: Size | None = None
    """Both ways together; streams are slowed down to it, datagrams beyond it are dropped."""

    @rule("secret", "users")
    def _log_in(self) -> Iterator[Fault]:
        if not self.secret and not self.users:
            yield Fault(".secret", "{file: PATH}, or users", "neither")

    @rule("listen", "tls")
    def _reachable(self) -> Iterator[Fault]:
        if not self.listen and self.tls is None:
            yield Fault(".listen", "ip:port, or tls", "neither")

    @rule("relay_address", "advertise_relay_address")
    def _relay_addresses(self) -> Iterator[Fault]:
        families = [address.version for address in self.relay_address]
        if len(set(families)) != len(families):
            yield Fault(".relay_address", "one address of a family", "two")
        outside = [address.version for address in self.advertise_relay_address]
        if outside and outside != families:
            yield Fault(".advertise_relay_address", "as many addresses of the same families as relay_address", "others")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnServerSection:
    """A TURN server of this network that is not ours to run, such as coturn."""

    id: RecordId
    url: TurnServerUrl
    relay_addresses: tuple[IpAddress, ...]
    port_min: Port = 49152  # RFC 8656 section 5, coturn's default too
    port_max: Port = 65535

    @rule("port_min", "port_max")
    def _range(self) -> Iterator[Fault]:
        if self.port_max < self.port_min:
            yield Fault(".port_max", f"a port from {self.port_min} on", str(self.port_max))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTlsSection:
    """The certificate that a server of ours shows."""

    cert: ExistingFile
    key: ExistingFile
    client_ca: ExistingFile | None = None
    """Verifies client certificates, which entries of the tokens file can name in place of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSection:
    """The file that says which token may write what."""

    file: ExistingFile


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSection:
    """How an etcd cluster is spoken to that is the store."""

    prefix: KeyPrefix = DEFAULT_PREFIX
    """What keys begin with; several meshes can share a cluster."""
    ca: ExistingFile | None = None
    """Verifies the members; the system's authorities by default."""
    cert: ExistingFile | None = None
    key: ExistingFile | None = None
    """What we show to a cluster that wants certificates of its clients."""

    @rule("cert", "key")
    def _pair(self) -> Iterator[Fault]:
        if (self.cert is None) != (self.key is None):
            yield Fault(".cert" if self.cert is None else ".key", "cert and key, or neither", "one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryServerSection:
    """The discovery server, for all networks."""

    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()]
    store: Store = "memory"
    """`memory`, `sqlite:PATH`, or `etcd:` and the URLs of its members, the nearest first."""
    etcd: EtcdSection = EtcdSection()
    tls: ServerTlsSection | None = None
    tokens: TokensSection | None = None
    turn_secrets: dict[NetworkId, SecretFile] = dataclasses.field(default_factory=dict)
    """For each network the secret of its TURN servers, to issue credentials from."""
    requests_per_second: Count = 200
    """What each network may ask in the long run; far more at once."""
    max_records_per_network: Count = 20_000
    max_watchers: Count = 2000
    turn_credential_ttl_s: WholeSeconds = 3600
    """How long issued credentials live; gateways get new ones after two thirds of it."""
    allow_addresses: tuple[Cidr, ...] = ()
    """Addresses in ranges that are refused in records otherwise, such as 127.0.0.0/8 for a try on one machine."""

    @rule("tokens")
    def _tokens_file(self) -> Iterator[Fault]:
        if self.tokens is not None:
            try:
                Tokens.load(self.tokens.file)
            except BadFile as error:
                for fault in error.faults:
                    yield Fault(".tokens.file", f"a tokens file ({fault.path}: expected {fault.expected})", fault.got)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherSection:
    """What publishes a Kubernetes cluster's exported Services as service records of this network."""

    id: RecordId = "k8s"
    """What the ids of its records begin with; each cluster of a network has its own."""
    api: KubernetesUrl | None = None
    """URL of the API; by default that of the cluster that we are a pod of, with the pod's own token and authority."""
    token: ExistingFile | None = None
    """Read again as it is renewed."""
    ca: ExistingFile | None = None
    namespaces: tuple[NetworkId, ...] = ()
    """Only these; by default all."""
    cluster_domain: Domain = CLUSTER_DOMAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    network: NetworkId
    domain: Domain = DEFAULT_DOMAIN
    discovery: Annotated[tuple[DiscoverySource, ...], OneOrMore()] = ()
    discovery_tls: DiscoveryTlsSection | None = None
    insecure: Boolean = False
    """Let discovery be reached by http beyond this machine: tokens and records then travel in the clear."""
    snapshot: NewFile | None = None
    """Where the last good view of discovery is kept, to start from when discovery is away."""
    token: SecretFile | None = None
    admin: ListenAddress = DEFAULT_ADMIN
    log: LogSection = LogSection()
    drain_s: DurationOrZero = DEFAULT_DRAIN_S
    keys: dict[KeyId, KeySection] = dataclasses.field(default_factory=dict)
    imports: tuple[ImportSection, ...] = dataclasses.field(default=(), metadata=key("import"))
    handover: NewFile | None = None
    """A unix socket where a new process takes the listening sockets of the one that runs, which then drains."""
    relay: RelaySection | None = None
    dns: DnsSection | None = None
    gateway: GatewaySection | None = None
    turn: TurnSection | None = None
    turn_servers: tuple[TurnServerSection, ...] = ()
    discovery_server: DiscoveryServerSection | None = None
    publisher: PublisherSection | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the file configures, in the order in which they start."""
        return tuple(role for role in ROLES if getattr(self, role))

    @property
    def static_mesh(self) -> Path | None:
        """The file that stands in for a discovery server, or beside some."""
        return next((source for source in self.discovery if isinstance(source, Path)), None)

    @rule("handover", "dns", "turn", "discovery_server")
    def _handed_over(self) -> Iterator[Fault]:
        others = [name for name in ("dns", "turn", "discovery_server") if getattr(self, name) is not None]
        if self.handover is not None and others:
            yield Fault(
                ".handover",
                "a file of relay and gateway alone, whose sockets can be handed over",
                f"one with {others[0]}",
            )

    @rule("domain")
    def _domain(self) -> Iterator[Fault]:
        yield from _apart(self.domain, (CLUSTER_DOMAIN,), "the cluster's own")

    @rule("domain", "dns")
    def _domain_and_dns(self) -> Iterator[Fault]:
        search = None if self.dns is None else self.dns.search
        yield from _apart(self.domain, search_domains() if search is None else search, "a search domain")
        if self.dns is not None:
            yield from _apart(self.domain, self.dns.forward, "a zone that dns.forward sends elsewhere")

    @rule("discovery")
    def _discovery_for_roles(self) -> Iterator[Fault]:
        asking = [
            name for name in ("turn", "turn_servers", "dns", "relay", "gateway", "publisher") if getattr(self, name)
        ]
        if asking and not self.discovery:
            yield Fault(".discovery", f"URLs, or a path ending in .yaml, since {asking[0]} needs it", "nothing")
        files = sum(isinstance(source, Path) for source in self.discovery)
        if files > 1:
            yield Fault(".discovery", "URLs, and one path at most", f"{files} paths")

    @property
    def discovery_urls(self) -> tuple[str, ...]:
        """The discovery servers."""
        return tuple(source for source in self.discovery if isinstance(source, str))

    @property
    def dialled(self) -> TargetList:
        """What relay and gateway of this file may dial; it lifts refusals in a static mesh file, as for them."""
        items = [] if self.gateway is None else list(self.gateway.allow)
        if self.relay is not None:
            items += [*self.relay.deliver, *self.relay.direct]
        return TargetList.parse(items)

    @rule("discovery", "relay", "gateway")
    def _mesh_file(self) -> Iterator[Fault]:
        if self.static_mesh is not None:
            try:
                load_mesh(self.static_mesh, self.dialled)
            except BadFile as error:
                for fault in error.faults:
                    yield Fault(".discovery", f"a mesh file ({fault.path}: expected {fault.expected})", fault.got)

    @rule("discovery", "gateway")
    def _discovery_for_allocations(self) -> Iterator[Fault]:
        if not self.discovery_urls and self.static_mesh is not None and self.gateway is not None and self.gateway.turn:
            yield Fault(".gateway.turn", "a discovery server, since allocations come and go", "a static mesh file")

    @rule("discovery_server", "insecure")
    def _served_in_the_clear(self) -> Iterator[Fault]:
        server = self.discovery_server
        public = [str(listen) for listen in server.listen if not listen.address.is_loopback] if server else []
        if server is None or self.insecure or not public:
            return
        for section, given in (("tokens", server.tokens), ("tls", server.tls)):
            if given is None:
                expected = f"{section}, since it listens on {public[0]}, or insecure: true"
                yield Fault(f".discovery_server.{section}", expected, "nothing")

    @rule("discovery", "insecure")
    def _discovery_in_the_clear(self) -> Iterator[Fault]:
        for index, source in enumerate(self.discovery):
            if isinstance(source, str):
                try:
                    parse_server_url(source, insecure=self.insecure)
                except ValueError:
                    yield Fault(f".discovery[{index}]", "https, or http to loopback, or insecure: true", repr(source))


def _apart(domain: str, zones: Iterable[str], what: str) -> Iterator[Fault]:
    # Upstream must not serve the mesh domain: there would be two answers for one name, by who is asked.
    for zone in zones:
        if is_under(domain, zone) or is_under(zone, domain):
            yield Fault(".domain", f"a zone apart from {zone}, which is {what}", repr(domain))


def search_domains(path: Path = Path("/etc/resolv.conf")) -> tuple[str, ...]:
    """Return the search domains of this machine's resolver; none where they cannot be read."""
    found: tuple[str, ...] = ()
    try:
        lines = path.read_text(errors="replace")[:MAX_RESOLV_CONF].splitlines()
    except OSError:
        return ()
    for line in lines:
        words = line.split()
        if words and words[0] in ("search", "domain"):
            found = tuple(words[1:])  # resolv.conf(5): the last of them counts
    domains = []
    for word in found:
        try:
            domains.append(normalise_domain(word))
        except BadName:
            continue  # "." and the like name no zone
    return tuple(domains)
