"""The `relay` section."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from crossnet.config.schema import Live, OneOrMore, key, rule
from crossnet.config.sections.policy import RuleSection, faults_of_rules
from crossnet.config.types import (
    Boolean,
    Cidr,
    Count,
    Duration,
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
from sniproxy.formats.client_hello import DEFAULT_MAX_HELLO_BYTES
from sniproxy.relay import relay
from sniproxy.relay.upstreams import DEFAULT_DIAL_TIMEOUT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySection:
    """The relay of this network's clients."""

    id: RecordId
    """The id of its record; another relay of this network has another one."""
    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()]
    """Where clients come. Port 443 serves names that say no other port."""
    reuse_port: Boolean = False
    """Several relay processes listen on the same addresses, one for each core, say; the kernel shares the clients out."""
    advertise: Annotated[tuple[IpAddress, ...], OneOrMore()] = ()
    """Addresses that clients reach it under; by default those that it listens on."""
    ports: Ports = "listen"
    """`auto`: it listens on the ports of imported services, too, since a plain service name says none."""
    port_range: PortRange = (1024, 65535)
    """What `auto` may open; ports below 1024 take a right of their own."""
    allow: Live[tuple[Cidr, ...]] = PRIVATE_RANGES
    """Clients that may use it."""
    rules: Live[tuple[RuleSection, ...]] = ()
    """Which of them may go where; without any all may go everywhere."""
    deliver: Live[tuple[Target, ...]] = ()
    """What it may dial in its own network."""
    direct: Live[tuple[Target, ...]] = ()
    """Where it may dial gateways of other networks without a TURN server."""
    sources: dict[RecordId, tuple[IpAddress, ...]] = dataclasses.field(default_factory=dict)
    """For each TURN server the addresses that it sees this relay come from; asked of the server by default."""
    asks: Live[tuple[NetworkId, ...]] = ()
    """Networks that it asks for besides those it imports from: their gateways may register only where they are asked for."""
    zone: Live[RecordId | None] = None
    """Where it stands: TURN servers and gateways whose records name the same zone are preferred."""
    pool: Live[Count] = relay.DEFAULT_POOL
    """Connections kept ready for each allocation that clients use (warm streams); 0: none."""
    proxy_from: Live[tuple[Cidr, ...]] = ()
    """Load balancers that begin each connection with a PROXY header (v1 or v2); from anywhere else that is not TLS."""
    max_hello_bytes: Live[Size] = dataclasses.field(default=DEFAULT_MAX_HELLO_BYTES, metadata=key("max_hello"))
    """The longest ClientHello."""
    max_hello_held_bytes: Live[Size] = dataclasses.field(
        default=client_limits.DEFAULT_MAX_HELLO_HELD_BYTES, metadata=key("max_hello_held")
    )
    """Of all unfinished ClientHellos together, as they came: record headers, of which one hello may have 64 KiB, count."""
    max_streams: Live[Count] = relay.DEFAULT_MAX_STREAMS
    """Streams at once; further clients are refused."""
    max_streams_per_client: Live[Count] = client_limits.DEFAULT_MAX_STREAMS_PER_CLIENT
    """By source address, an IPv6 client by its /64; 0 is no limit of its own."""
    new_streams_per_s: Live[Count] = dataclasses.field(
        default=client_limits.DEFAULT_NEW_STREAMS_PER_S, metadata=key("new_streams_per_second")
    )
    """Of one client; 0 is no limit."""
    hello_timeout_s: Live[Duration] = relay.DEFAULT_HELLO_TIMEOUT_S
    """From accept to the end of the ClientHello."""
    dial_timeout_s: Live[Duration] = DEFAULT_DIAL_TIMEOUT_S
    """For one TCP handshake with a gateway, a TURN server or a service."""
    idle_timeout_s: Live[Duration] = relay.DEFAULT_IDLE_TIMEOUT_S
    """A stream ends after this long without a byte in either direction."""
    half_close_timeout_s: Live[Duration] = relay.DEFAULT_HALF_CLOSE_TIMEOUT_S
    """The same, once one direction has ended."""

    @rule("rules")
    def _rules(self) -> Iterator[Fault]:
        yield from faults_of_rules(self.rules)

    @rule("advertise", "listen")
    def _advertised(self) -> Iterator[Fault]:
        if not self.advertise and any(listen.address.is_unspecified for listen in self.listen):
            yield Fault(".advertise", "the addresses that clients reach, since it listens on all", "nothing")
