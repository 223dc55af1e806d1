"""What a registrar is told: who we are, what other networks' TURN servers know us by, and how patient to be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from discovery.model.addresses import TargetList
from discovery.pacing.backoff import Backoff
from turnreg.client.control_connection import Credentials, TurnReason
from turnreg.client.timing import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class RestSecret:
    """The secret that a TURN server shares with us (coturn's static-auth-secret)."""

    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """The discovery server makes short-lived credentials: we never hold the other network's secret."""


TurnCredentials = Credentials | RestSecret | Issued


_UNREACHABLE = (TurnReason.CONNECT_FAILED, TurnReason.CONNECTION_LOST, TurnReason.TIMEOUT)


DEFAULT_REPLICAS = 2
"""One that is lost leaves one; and coturn runs an allocation on one thread."""


class Register(StrEnum):
    """With which of the other networks, those that we have credentials for, to register."""

    ALL = "all"
    IMPORTED = "imported"
    """Those in which a relay asks for our network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When to try again: any time up to a bound that doubles with every failure in a row."""

    unreachable: Backoff = Backoff(1.0, 4.0, jitter=1.0)
    """A server that is not there: asking is cheap, and a server that comes back shall have us within 10 s."""
    refused: Backoff = Backoff(1.0, 15.0, jitter=1.0)
    """A server that is there and says no."""

    def pause_s(self, failures: int, reason: TurnReason) -> float:
        """Draw how long to wait after that many failures in a row, the last one for `reason`."""
        return (self.unreachable if reason in _UNREACHABLE else self.refused).pause_s(failures)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrarConfig:
    """Which gateway we are, and how we show ourselves to the TURN servers of other networks."""

    network: str
    """Our own."""
    gateway: str
    """The gateway's id: one name in one network."""
    turn: dict[str, TurnCredentials]
    """For each other network, by its id, what its TURN servers know us by. Networks without are left alone."""
    proto: tuple[str, ...] = ("framed/1",)
    allow: Mapping[str, TargetList] = field(default_factory=dict)
    """For each other network that is pinned, where alone its TURN servers are looked for. It lifts the refusal of this host's own
    addresses, and of ranges such as 127.0.0.0/8 in tests and the lab."""
    guard: tuple[tuple[str, int], ...] = ()
    """Addresses and ports of our own that no record names (discovery servers, this process's listeners): never dialled."""
    guard_names: tuple[tuple[str, int], ...] = ()
    """The same by name: discovery servers whose URLs have one."""
    ca: dict[str, str] = field(default_factory=dict)
    """For each other network the authorities, as PEM, that sign its `turns:` servers' certificates; the system's by default."""
    register: Register = Register.ALL
    replicas: int = DEFAULT_REPLICAS
    """Allocations of our network on each TURN server, by different gateways where there are several. A second one of
    the same gateway takes over while the first is had again, and may run on another thread of the server."""
    weight: int = 1
    """How many times the streams of a gateway of weight 1 ours is for."""
    overlap_s: float = 10.0
    """How long at least an allocation that was replaced or is no longer wanted goes on after its record: until relays
    have heard of it. Streams keep it for longer."""
    linger_s: float = 60.0
    """How long an allocation, and with it its streams, outlives the record of its TURN server: discovery may be at
    fault, or the server's lease, and not the server. The address of a relay is admitted for as long after its record."""
    retry: Retry = Retry()
    timing: Timing = field(default_factory=Timing)
