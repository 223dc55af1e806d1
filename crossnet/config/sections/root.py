"""The top level of the file, and the rules that involve several sections."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated

from yarl import URL

from crossnet.config.schema import Live, OneOrMore, key, rule
from crossnet.config.sections.discovery import DiscoveryServerSection
from crossnet.config.sections.dns import DnsSection
from crossnet.config.sections.gateway import GatewaySection
from crossnet.config.sections.policy import ImportSection
from crossnet.config.sections.process import DiscoveryTlsSection, KeySection, LogSection
from crossnet.config.sections.publisher import CLUSTER_DOMAIN, PublisherSection
from crossnet.config.sections.relay import RelaySection
from crossnet.config.sections.turn import TurnSection, TurnServerSection
from crossnet.config.types import (
    Boolean,
    DiscoverySource,
    Domain,
    DurationOrZero,
    KeyId,
    Listen,
    ListenAddress,
    NetworkId,
    NewFile,
    SecretFile,
)
from discovery.client.mesh_file import load_mesh
from discovery.client.servers import parse_server_url
from discovery.files.yaml_file import BadFile
from discovery.model.addresses import TargetList
from discovery.model.names import BadName, is_under, normalise_domain
from discovery.model.validation import Fault
from discovery.store.etcdapi import parse_endpoints
from turnreg.server.config import MAX_REALM_CHARACTERS, is_realm

ROLES = ("discovery_server", "turn", "turn_servers", "dns", "relay", "gateway", "publisher")
"""In the order in which they start, so that each finds the ones it depends on ready."""


DEFAULT_DOMAIN = "svc.mesh.internal"


DEFAULT_ADMIN = Listen(IPv4Address("127.0.0.1"), 8690)


DEFAULT_DRAIN_S = 30.0
"""Long enough for requests in progress, and the time that Kubernetes gives before it kills a pod."""


MAX_RESOLV_CONF = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The top level of the file."""

    network: NetworkId
    """The network that this process belongs to. Other networks refer to it by this id."""
    domain: Domain = DEFAULT_DOMAIN
    """The mesh domain, which contains all address and compact names. All networks of a mesh use the same one."""
    discovery: Annotated[tuple[DiscoverySource, ...], OneOrMore()] = ()
    """Discovery servers, of which one is used at a time, and at most one static mesh file, whose records take precedence."""
    discovery_tls: DiscoveryTlsSection | None = None
    """Verification of https discovery servers, and our client certificate."""
    insecure: Boolean = False
    """Allow plain http to discovery servers on other machines: tokens and records are then sent unencrypted."""
    snapshot: NewFile | None = None
    """File that keeps the last good view of discovery, to start from when no discovery server can be reached."""
    token: Live[SecretFile | None] = None
    """Our token for discovery: one line, as printed by `crossnet token new`."""
    admin: ListenAddress = DEFAULT_ADMIN
    """Listening address of the admin server: health, readiness, metrics, status. It has no authentication."""
    log: Live[LogSection] = dataclasses.field(default_factory=LogSection)
    """Format and level of the log."""
    drain_s: Live[DurationOrZero] = DEFAULT_DRAIN_S
    """How long a process that is asked to stop waits for its streams. A second signal stops it at once."""
    keys: Live[dict[KeyId, KeySection]] = dataclasses.field(default_factory=dict)
    """Signing keys by id, one or more for each direction. The first of a direction is used to sign; all are accepted."""
    imports: Live[tuple[ImportSection, ...]] = dataclasses.field(default=(), metadata=key("import"))
    """Which plain service names this network imports from which others. The first rule that matches a name applies."""
    handover: NewFile | None = None
    """Unix socket at which a new process takes over the listening sockets of the running one, which then drains."""
    relay: RelaySection | None = None
    """The relay: accepts the connections of this network's clients."""
    dns: DnsSection | None = None
    """The resolver: resolves names of other networks to the address of a relay."""
    gateway: GatewaySection | None = None
    """The gateway: lets other networks reach services of this one."""
    turn: TurnSection | None = None
    """The embedded TURN server, where gateways of other networks register."""
    turn_servers: Live[tuple[TurnServerSection, ...]] = ()
    """TURN servers of this network that are operated separately, such as coturn."""
    discovery_server: DiscoveryServerSection | None = None
    """The discovery server, which all networks use."""
    publisher: PublisherSection | None = None
    """Publishes services of a Kubernetes cluster."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the file configures, in the order in which they start."""
        return tuple(role for role in ROLES if getattr(self, role))

    @property
    def static_mesh(self) -> Path | None:
        """The static mesh file, used instead of or in addition to discovery servers; None: there is none."""
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

    @rule("domain", "turn")
    def _domain_as_realm(self) -> Iterator[Fault]:
        if self.turn is not None and self.turn.realm is None and not is_realm(self.domain):
            yield Fault(
                ".turn.realm", f"one of at most {MAX_REALM_CHARACTERS} characters", "the domain, which is longer"
            )

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
        """The URLs of the discovery servers."""
        return tuple(source for source in self.discovery if isinstance(source, str))

    @property
    def dialled(self) -> TargetList:
        """What relay and gateway of this file may dial. Such addresses are also allowed in a static mesh file."""
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

    @rule("discovery_server", "insecure")
    def _etcd_in_the_clear(self) -> Iterator[Fault]:
        server = self.discovery_server
        if server is None or server.etcd.password is None:
            return
        for url in parse_endpoints(server.store.partition(":")[2]) if server.store.startswith("etcd:") else ():
            try:
                parse_server_url(url, insecure=self.insecure)
            except ValueError:
                expected = "https where there is a password, or http to loopback, or insecure: true"
                yield Fault(".discovery_server.store", expected, repr(url))

    @rule("gateway", "insecure")
    def _woken_in_the_clear(self) -> Iterator[Fault]:
        for index, section in enumerate(self.gateway.activate if self.gateway else ()):
            if section.url is not None:
                try:
                    parse_server_url(str(URL(section.url).origin()), insecure=self.insecure)
                except ValueError:
                    expected = "https, or http to loopback, or insecure: true"
                    yield Fault(f".gateway.activate[{index}].url", expected, repr(section.url.partition("?")[0]))


def _apart(domain: str, zones: Iterable[str], what: str) -> Iterator[Fault]:
    # Upstream must not serve the mesh domain: the answer for a name would depend on who is asked.
    for zone in zones:
        if is_under(domain, zone) or is_under(zone, domain):
            yield Fault(".domain", f"a zone apart from {zone}, which is {what}", repr(domain))


def search_domains(path: Path = Path("/etc/resolv.conf")) -> tuple[str, ...]:
    """Return the search domains of this machine's resolver; none if the file cannot be read."""
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
