"""Settings of a registrar: our identity, credentials for other networks' TURN servers, and timing."""

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
    """The discovery server issues short-lived credentials, so that we never have the other network's secret."""


TurnCredentials = Credentials | RestSecret | Issued


_UNREACHABLE = (TurnReason.CONNECT_FAILED, TurnReason.CONNECTION_LOST, TurnReason.TIMEOUT)

DEFAULT_REPLICAS = 2
"""If one is lost, one is left. Besides, coturn serves an allocation on one thread, so two can use two."""


class Register(StrEnum):
    """Which of the networks that we have credentials for to register with."""

    ALL = "all"
    IMPORTED = "imported"
    """Only networks in which a relay asks for our network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Pause before the next attempt: random, up to a bound that doubles with every failure in a row."""

    unreachable: Backoff = Backoff(1.0, 4.0, jitter=1.0)
    """For a server that does not respond: attempts are cheap, and we want to be registered within 10 s of its return."""
    refused: Backoff = Backoff(1.0, 15.0, jitter=1.0)
    """For a server that responds with an error."""

    def pause_s(self, failures: int, reason: TurnReason) -> float:
        """Return a random pause after that many failures in a row, the last one for `reason`."""
        return (self.unreachable if reason in _UNREACHABLE else self.refused).pause_s(failures)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrarConfig:
    """Settings of the registrar of one gateway."""

    network: str
    """Id of our own network."""
    gateway: str
    """Id of the gateway, unique within the network."""
    turn: dict[str, TurnCredentials]
    """Credentials for the TURN servers of other networks, by network id. We do not register with networks without an entry."""
    proto: tuple[str, ...] = ("framed/1",)
    allow: Mapping[str, TargetList] = field(default_factory=dict)
    """The only addresses and ports where TURN servers of a pinned network may be, by network id. An entry also permits this host's
    own addresses, and refused ranges such as 127.0.0.0/8 in tests and the lab."""
    guard: tuple[tuple[str, int], ...] = ()
    """Our own addresses and ports that are in no record (discovery servers, this process's listeners). They are never dialled."""
    guard_names: tuple[tuple[str, int], ...] = ()
    """The same by name, for discovery servers whose URLs contain a name."""
    ca: dict[str, str] = field(default_factory=dict)
    """Authorities, as PEM, that verify a network's `turns:` servers, by network id; the system's by default."""
    register: Register = Register.ALL
    replicas: int = DEFAULT_REPLICAS
    """Allocations of our network on each TURN server, held by different gateways if there are several. A second one of the same
    gateway carries new streams while the first one is being replaced, and may run on another thread of the server."""
    weight: int = 1
    """Relative share of streams: a gateway of weight 2 gets twice as many as one of weight 1."""
    overlap_s: float = 10.0
    """How long at least an allocation that was replaced or is no longer wanted outlives its record, so that relays can learn of the
    change. Open streams keep it for longer."""
    linger_s: float = 60.0
    """How long an allocation, with its streams, outlives the record of its TURN server: the cause may be discovery or the server's
    lease, and not the server. A relay's address is admitted for as long after its record is gone."""
    retry: Retry = Retry()
    timing: Timing = field(default_factory=Timing)
