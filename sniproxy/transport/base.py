"""The interface of transports: how a relay gets a byte stream to a gateway, and how a gateway accepts one.

Each transport is one module: its traits, the candidates it finds in the mesh (`Transport.candidates`), how they are dialled, and an
acceptor, if gateways accept streams through it. `registry` lists all of them. Other code never asks which transport a candidate
belongs to. Where it must treat some differently, it asks for a trait.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from discovery.model.addresses import Address, BadAddress, TargetList, format_endpoint, parse_address, parse_endpoint
from discovery.model.lookup import Place
from discovery.model.mesh import AllocationSpec, GatewaySpec, Mesh, Record
from discovery.model.names import AddressTarget, ServiceTarget
from sniproxy.access.loop_guard import LoopGuard

if TYPE_CHECKING:
    from sniproxy.engine import ByteStream

MAX_FIRST_WRITE = 8 * 1024
"""Bytes that every transport buffers before the gateway reads. coturn buffers 16 reads before the bind, which hold this much at the
smallest usual MSS."""

CandidateKey = tuple[str, str, str, int]
"""What identifies a way to a network: the network, the record's id, and the dialled address and port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """The properties of a transport that other code depends on."""

    name: str
    """Its name in log lines, metrics and the configuration."""
    to_gateway: bool = True
    """Whether the far end is a gateway, with the protocol of `sniproxy.tunnel`. Otherwise it is the service itself."""
    rank: int = 0
    """Transports with a lower rank are tried first."""
    first_write_limit: int = MAX_FIRST_WRITE
    """The most bytes that may be sent before the gateway has answered."""
    ready_timeout_s: float = 3.0
    """From the first byte sent to the gateway's answer: two connects and two answers over the slowest network, and one lost SYN."""
    idle_limit_s: float = 30.0
    """Middleboxes may drop a connection that is idle for this long, so a warm connection sends something earlier."""
    reset_retry_s: tuple[float, ...] = ()
    """Pauses before retries after a reset before the gateway has answered. Empty: such a reset is permanent."""
    needs_second_connection: bool = False
    """Bulk in both directions over one connection can stall, so a large upload moves to its own connection."""
    gateway_dials: bool = False
    """The gateway connects, too, to a server in between, and ends its connections so that none keeps a local port (TIME_WAIT)."""
    warmable: bool = False
    """Reaching the gateway takes so long that connections are kept warm for allocations in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One address to dial for a stream."""

    traits: Traits
    """The traits of the transport that found it."""
    network: str
    target: str
    """What the gateway is asked for, as written in the preamble."""
    address: str
    port: int
    addressee: str = ""
    """The id of the allocation or gateway record, so that a captured preamble is useless elsewhere; empty without a gateway."""
    weight: int = 1
    """Relative share of streams."""
    near: bool = False
    """Whether it is in the relay's own zone."""
    proto: tuple[str, ...] = ()
    """The protocols of the gateway, from its record. `sniproxy.tunnel.epoch` reads the epoch in it."""
    proxy_version: int | None = None
    """The version of the PROXY header that the service expects, if the service itself is dialled. A gateway knows it by itself."""
    meant: AddressTarget | ServiceTarget | None = field(default=None, compare=False)
    """The meaning of the name, with a service by its full name: for rules. The router always sets it."""
    imports: str | None = field(default=None, compare=False)
    """Patterns of the services whose addresses may be reached, for the preamble. None: all services."""

    @property
    def key(self) -> CandidateKey:
        """Identifies the way, whatever the target. A recreated allocation has the id of the lost one, but another port."""
        return self.network, self.addressee, self.address, self.port

    def __str__(self) -> str:
        return f"{self.traits.name}:{self.addressee or format_endpoint(parse_address(self.address), self.port)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """The configuration of a relay's transports."""

    network: str
    """The relay's own network."""
    deliver: TargetList
    """What may be dialled in the relay's own network."""
    direct: TargetList
    """Where gateways may be dialled directly. A CIDR in it that lies entirely inside a refused range (127.0.0.0/8) lifts that
    refusal, also for relayed addresses of TURN servers."""
    guard: LoopGuard
    """What is not a service of the own network, even if `deliver` allows it."""
    zone: str = ""
    """The relay's zone."""

    def is_near(self, zone: str) -> bool:
        """Return whether this zone is the relay's own."""
        return bool(zone) and zone == self.zone


class Transport(Protocol):
    """A transport of one relay."""

    @property
    def traits(self) -> Traits:
        """The properties that other code depends on."""

    @property
    def lacks(self) -> str:
        """What is missing in a network that this transport cannot reach, for an error text after "has"."""

    def candidates(self, place: Place, mesh: Mesh) -> Iterable[Candidate]:
        """Find the candidates for a place. Raises Unroutable if it finds none for a reason of its own.

        The place is in another network if the far end of this transport is a gateway, else in the relay's own.
        """

    def offers(self, candidate: Candidate, mesh: Mesh) -> bool:
        """Return whether a candidate that was found before still exists."""


@runtime_checkable
class GatewayTransport(Transport, Protocol):
    """One that leads to gateways, each dialled by itself. The service of a local route is one of several endpoints
    (`sniproxy.endpoints`)."""

    async def dial(self, candidate: Candidate, *, timeout_s: float) -> "ByteStream":
        """Connect to a candidate. Raises OSError if that fails, TimeoutError if it takes longer than `timeout_s` seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A connection that a gateway accepted. The next byte is the relay's first. The receiver owns the stream."""

    stream: "ByteStream"
    traits: Traits
    addressee: str
    """The id of the record that publishes this way to the gateway. The relay's preamble must name it."""
    came_by: Mapping[str, str] = field(default_factory=dict)
    """How the connection came in, as log fields."""


OnStream = Callable[[Accepted], None]
"""Receives an accepted connection; must not block."""


class Acceptor(Protocol):
    """A gateway's side of a transport."""

    async def run(self, on_stream: OnStream) -> None:
        """Accept connections and pass them to `on_stream`, until `close`."""

    def close(self) -> None:
        """Stop accepting. Accepted connections go on."""


def target_text(target: AddressTarget | ServiceTarget) -> str:
    """Return the text of a target, as written in the preamble."""
    if isinstance(target, AddressTarget):
        return format_endpoint(target.address, target.port)
    return f"{target.service}:{target.port}"


def framed_candidate(
    traits: Traits,
    place: Place,
    endpoint: tuple[Address, int],
    record: Record[GatewaySpec] | Record[AllocationSpec],
    *,
    near: bool,
) -> Candidate:
    """Return the candidate for a gateway with our protocol at this address and port, published by this record."""
    return Candidate(
        traits=traits,
        network=place.network,
        target=target_text(place.target),
        address=str(endpoint[0]),
        port=endpoint[1],
        addressee=record.id,
        weight=record.spec.weight,
        near=near,
        proto=tuple(record.spec.proto),
        meant=place.target,
    )


def endpoint_in(text: str) -> tuple[Address, int] | None:
    """Parse an address and port from a record; None if it is neither."""
    try:
        return parse_endpoint(text)
    except BadAddress:
        return None  # records are checked when they are written; an invalid one is no candidate
