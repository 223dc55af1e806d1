"""The `gateway` section."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from crossnet.scalars import (
    Accepted,
    Boolean,
    Cidr,
    Count,
    Duration,
    Endpoint,
    ExistingFile,
    ListenAddress,
    NetworkId,
    RecordId,
    Register,
    Replicas,
    SecretFile,
    Size,
    Target,
    Text,
)
from crossnet.schema import OneOrMore, rule
from crossnet.sections.policy import RuleSection, faults_of_rules
from discovery.shape import Fault
from sniproxy.hello import DEFAULT_MAX_HELLO_BYTES
from turnreg import gateway
from turnreg.settings import DEFAULT_REPLICAS


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
        yield from faults_of_rules(self.rules)

    @rule("advertise", "listen")
    def _advertised(self) -> Iterator[Fault]:
        if self.listen and self.advertise is None and self.listen[0].address.is_unspecified:
            yield Fault(".advertise", "ip:port that relays dial, since it listens on all addresses", "nothing")
