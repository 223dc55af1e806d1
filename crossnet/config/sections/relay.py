"""The `relay` section."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from crossnet.config.schema import Live, OneOrMore, key, rule
from crossnet.config.sections.policy import RuleSection, faults_of_rules
from crossnet.config.types import (
    Boolean,
    BufferSize,
    Cidr,
    Count,
    Duration,
    DurationOrOff,
    IpAddress,
    ListenAddress,
    NetworkId,
    PortRange,
    Ports,
    RecordId,
    Size,
    Target,
)
from discovery.model.addresses import PRIVATE_RANGES
from discovery.model.validation import Fault
from sniproxy.access import client_limits
from sniproxy.engine import DEFAULT_BUFFER_BYTES
from sniproxy.formats.client_hello import DEFAULT_MAX_HELLO_BYTES
from sniproxy.relay import relay
from sniproxy.relay.upstreams import DEFAULT_DIAL_TIMEOUT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySection:
    """The relay, which accepts the connections of this network's clients."""

    id: RecordId
    """The id of its record, unique among the relays of this network."""
    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()]
    """Addresses to listen on for clients. Port 443 serves names without a port in them."""
    reuse_port: Boolean = False
    """Let several relay processes, such as one per core, listen on the same addresses; the kernel distributes the clients."""
    advertise: Annotated[tuple[IpAddress, ...], OneOrMore()] = ()
    """Addresses under which clients reach it; by default those that it listens on."""
    ports: Ports = "listen"
    """`auto`: also listen on the ports of imported services, since a plain service name contains no port."""
    port_range: PortRange = (1024, 65535)
    """Ports that `auto` may open; ports below 1024 require a privilege."""
    own_ports: Boolean = False
    """`ports: auto` also opens the ports of services that this network imports from itself."""
    allow: Live[tuple[Cidr, ...]] = PRIVATE_RANGES
    """Clients that may use it."""
    rules: Live[tuple[RuleSection, ...]] = ()
    """Which clients may reach what; without rules, all may reach everything."""
    deliver: Live[tuple[Target, ...]] = ()
    """Targets that it may dial in its own network."""
    direct: Live[tuple[Target, ...]] = ()
    """Addresses at which it may dial gateways of other networks directly, without a TURN server."""
    sources: dict[RecordId, tuple[IpAddress, ...]] = dataclasses.field(default_factory=dict)
    """For each TURN server, the addresses from which it sees this relay connect; by default the server is asked."""
    asks: Live[tuple[NetworkId, ...]] = ()
    """Networks that it wants to reach in addition to those it imports from: gateways may register only where that is requested."""
    zone: Live[RecordId | None] = None
    """Its zone: TURN servers and gateways of the same zone are preferred."""
    pool: Live[Count] = relay.DEFAULT_POOL
    """Connections kept ready for each allocation that clients use (warm streams); 0: none."""
    proxy_from: Live[tuple[Cidr, ...]] = ()
    """Load balancers that begin each connection with a PROXY header (v1 or v2). From others, the header is refused as not TLS."""
    max_hello_bytes: Live[Size] = dataclasses.field(default=DEFAULT_MAX_HELLO_BYTES, metadata=key("max_hello"))
    """Size limit of a ClientHello."""
    max_hello_held_bytes: Live[Size] = dataclasses.field(
        default=client_limits.DEFAULT_MAX_HELLO_HELD_BYTES, metadata=key("max_hello_held")
    )
    """Limit of the memory for all incomplete ClientHellos. Record headers count; those of one hello may take 64 KiB."""
    max_streams: Live[Count] = relay.DEFAULT_MAX_STREAMS
    """Limit of concurrent streams; further clients are refused."""
    max_streams_per_client: Live[Count] = client_limits.DEFAULT_MAX_STREAMS_PER_CLIENT
    """Limit of one client's concurrent streams. A client is an IPv4 address or an IPv6 /64. 0: no limit per client."""
    new_streams_per_s: Live[Count] = dataclasses.field(
        default=client_limits.DEFAULT_NEW_STREAMS_PER_S, metadata=key("new_streams_per_second")
    )
    """Limit of one client's new streams per second; 0: no limit."""
    buffer_bytes: Live[BufferSize] = dataclasses.field(default=DEFAULT_BUFFER_BYTES, metadata=key("buffer"))
    """Kernel memory for each direction of a stream whose reader is slow. While it moves fast, it may hold more."""
    hello_timeout_s: Live[Duration] = relay.DEFAULT_HELLO_TIMEOUT_S
    """Time from accept until the ClientHello is complete."""
    dial_timeout_s: Live[Duration] = DEFAULT_DIAL_TIMEOUT_S
    """Time for one TCP handshake with a gateway, a TURN server or a service."""
    idle_timeout_s: Live[DurationOrOff] = relay.DEFAULT_IDLE_TIMEOUT_S
    """A stream ends after this long without a byte in either direction. `off`: never, since lost hosts are found anyway; a full
    relay then ends idle streams to make room."""
    half_close_timeout_s: Live[DurationOrOff] = relay.DEFAULT_HALF_CLOSE_TIMEOUT_S
    """The same after one direction has ended."""

    @rule("rules")
    def _rules(self) -> Iterator[Fault]:
        yield from faults_of_rules(self.rules)

    @rule("advertise", "listen")
    def _advertised(self) -> Iterator[Fault]:
        if not self.advertise and any(listen.address.is_unspecified for listen in self.listen):
            yield Fault(".advertise", "the addresses that clients reach, since it listens on all", "nothing")
