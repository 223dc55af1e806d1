"""What all transports have in common: how a relay gets a stream of bytes to a gateway, and how a gateway takes one in.

A transport is a module of its own: its traits, what it finds in the mesh (`Transport.candidates`), how that is dialled, and, where
gateways take streams in by it, an acceptor. `registry` lists them. Nothing outside asks which one a candidate is of: who has to
treat some differently asks for a trait.
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
"""Bytes that any way to a gateway keeps before the gateway reads: coturn keeps 16 reads before the bind, which hold this much at
the smallest usual MSS."""

CandidateKey = tuple[str, str, str, int]
"""What tells a way to a network from others: the network, the record's id, and the address and port that are dialled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How a transport behaves, as far as others have to know."""

    name: str
    """In log lines, metrics and the configuration."""
    to_gateway: bool = True
    """A gateway is at the far end, which is spoken to in our protocol (`sniproxy.tunnel`); else the service itself."""
    rank: int = 0
    """Lower ones are tried first."""
    first_write_limit: int = MAX_FIRST_WRITE
    """Bytes that are sent before the gateway has answered."""
    ready_timeout_s: float = 3.0
    """From the first byte sent to the gateway's answer: two connects, two answers over the widest network, one lost SYN."""
    idle_limit_s: float = 30.0
    """What is idle for this long may be forgotten on the way: a connection that is kept ready says something before."""
    reset_retry_s: tuple[float, ...] = ()
    """Resets before the gateway has answered may pass: pauses after which it is tried again. Empty: they do not."""
    needs_second_connection: bool = False
    """Bulk in both directions over one connection can stand still: a large upload moves on to a connection of its own."""
    warmable: bool = False
    """Reaching the gateway takes so long that connections are kept ready where clients use them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One address to dial for a stream."""

    traits: Traits
    """Of the transport that found it."""
    network: str
    target: str
    """What the gateway is asked for, as the preamble spells it."""
    address: str
    port: int
    addressee: str = ""
    """Id of the allocation or gateway record, so that a captured preamble is good nowhere else; empty without a gateway."""
    weight: int = 1
    """Relative share of streams."""
    near: bool = False
    """In the relay's own zone."""
    proto: tuple[str, ...] = ()
    """What the gateway speaks, as its record says (`sniproxy.tunnel.epoch` reads the rest of it)."""
    proxy_version: int | None = None
    """Of the PROXY header that the service wants first, where it is dialled itself; a gateway knows that by itself."""
    meant: AddressTarget | ServiceTarget | None = field(default=None, compare=False)
    """What the name means, a service by its whole name: for rules. The router always says it."""
    imports: str | None = field(default=None, compare=False)
    """The services whose addresses may be reached by it, for the preamble; None: any."""

    @property
    def key(self) -> CandidateKey:
        """The way, whatever is asked for at its end. An allocation made anew has the id of the lost one and another port."""
        return self.network, self.addressee, self.address, self.port

    def __str__(self) -> str:
        return f"{self.traits.name}:{self.addressee or format_endpoint(parse_address(self.address), self.port)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """What a relay's transports go by."""

    network: str
    """The relay's own."""
    deliver: TargetList
    """What may be dialled in the relay's own network."""
    direct: TargetList
    """Where gateways may be dialled directly. A CIDR in it that lies wholly inside a refused range (127.0.0.0/8) lifts that
    refusal, for TURN servers' relayed addresses too."""
    guard: LoopGuard
    """What is no service of the own network, whatever `deliver` allows."""
    zone: str = ""
    """Where the relay stands."""

    def is_near(self, zone: str) -> bool:
        """Tell whether something in that zone stands in the relay's own."""
        return bool(zone) and zone == self.zone


class Transport(Protocol):
    """One way to reach networks, for one relay."""

    @property
    def traits(self) -> Traits:
        """How it behaves."""

    @property
    def lacks(self) -> str:
        """What a network does not have that this transport does not reach, to stand behind "has"."""

    def candidates(self, place: Place, mesh: Mesh) -> Iterable[Candidate]:
        """Find the ways to a place. Raises Unroutable where it has a reason of its own for finding none."""

    def offers(self, candidate: Candidate, mesh: Mesh) -> bool:
        """Say whether a candidate that was found before is still there."""


@runtime_checkable
class GatewayTransport(Transport, Protocol):
    """One that leads to gateways, each dialled by itself. The service of a local route is one of several endpoints
    (`sniproxy.endpoints`)."""

    async def dial(self, candidate: Candidate, *, timeout_s: float) -> "ByteStream":
        """Connect. OSError if that cannot be, TimeoutError if it takes too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A connection that a gateway takes in: the next byte is the relay's first. Its taker owns the stream."""

    stream: "ByteStream"
    traits: Traits
    addressee: str
    """Id of the record that says that gateways are reached this way: what the relay's preamble must name."""
    came_by: Mapping[str, str] = field(default_factory=dict)
    """Where it came through, for the log."""


OnStream = Callable[[Accepted], None]
"""Takes a connection that came in; must not block."""


class Acceptor(Protocol):
    """One way in which streams come to a gateway."""

    async def run(self, on_stream: OnStream) -> None:
        """Hand over what comes in, until `close`."""

    def close(self) -> None:
        """Take nothing more in; what was handed over goes on."""


def target_text(target: AddressTarget | ServiceTarget) -> str:
    """Write what a gateway is asked for, as the preamble spells it."""
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
    """Make the candidate of a gateway that takes our protocol at this address and port, as this record says."""
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
    """Read an address and port in a record; None for neither."""
    try:
        return parse_endpoint(text)
    except BadAddress:
        return None  # records are checked when they are written; one that slipped through is no candidate
