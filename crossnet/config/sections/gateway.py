"""The `gateway` section."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from crossnet.config.schema import Live, OneOrMore, key, rule
from crossnet.config.sections.policy import RuleSection, faults_of_rules
from crossnet.config.types import (
    Accepted,
    Argument,
    Boolean,
    BufferSize,
    CertificatesFile,
    Cidr,
    ContentType,
    Count,
    Duration,
    DurationOrOff,
    Endpoint,
    ExistingFile,
    HiddenText,
    ListenAddress,
    Method,
    NetworkId,
    RecordId,
    Register,
    Replicas,
    SecretFile,
    ServicePattern,
    Size,
    Target,
    Text,
    Url,
    Weight,
)
from discovery.model.validation import Fault
from sniproxy.engine import DEFAULT_BUFFER_BYTES
from sniproxy.formats.client_hello import DEFAULT_MAX_HELLO_BYTES
from turnreg.gateway import activation
from turnreg.gateway import config as gateway
from turnreg.gateway.activation import ActivationRule
from turnreg.gateway.activation_trigger import Command, HttpCall, Trigger
from turnreg.registrar.config import DEFAULT_REPLICAS

MAX_ACTIVATION_RULES = 256
MAX_ITEMS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnAccessSection:
    """How this network's gateway authenticates with another network's TURN servers: one of three ways."""

    username: Text | None = None
    """User name for long-term credentials; needs `password`."""
    password: SecretFile | None = None
    """The password of `username`."""
    secret: SecretFile | None = None
    """Shared secret for REST credentials (coturn: static-auth-secret)."""
    issue: Boolean = False
    """Request short-lived credentials from the discovery server."""
    ca: CertificatesFile | None = None
    """CA for `turns:` servers; by default the system's CAs."""
    allow: tuple[Cidr, ...] = ()
    """The only ranges in which that network's TURN servers may be. Without it, at most four addresses per hour are used, none of
    them this host's own or in a range that is refused, such as 127.0.0.0/8."""

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
class ActivateSection:
    """How services without a live endpoint are started while streams wait: by a command or an HTTP call."""

    names: Annotated[tuple[ServicePattern, ...], OneOrMore()]
    """Service names as in their records; `*` matches one label, and a leading `**` one or more."""
    command: tuple[Argument, ...] = ()
    """A program and its arguments, run without a shell. CROSSNET_SERVICE and CROSSNET_NETWORK name the service to start."""
    url: Url | None = None
    """URL to call, with the headers Crossnet-Service and Crossnet-Network."""
    method: Method = "POST"
    """The HTTP method of the call."""
    body: HiddenText | None = None
    """Body of the call. It is never shown, and neither is the URL's query: they may contain secrets."""
    content_type: ContentType = "application/json"
    """The type of `body`."""
    ca: ExistingFile | None = None
    """CA for the URL's server; by default the system's CAs."""
    token: SecretFile | None = None
    """Sent as `Authorization: Bearer …`."""
    timeout_s: Duration = activation.DEFAULT_TIMEOUT_S
    """How long a stream waits, at most two minutes."""
    run_timeout_s: Duration = activation.DEFAULT_RUN_TIMEOUT_S
    """How long the command or call may take before it is aborted."""
    cooldown_s: Duration = activation.DEFAULT_COOLDOWN_S
    """How long a service is not started again after a success."""
    max_held: Count = activation.DEFAULT_MAX_HELD_PER_SERVICE
    """Limit of streams that wait for one service."""

    def as_rule(self) -> ActivationRule:
        """Convert to the gateway's rule."""
        return ActivationRule(
            names=self.names,
            trigger=self._trigger(),
            timeout_s=self.timeout_s,
            run_timeout_s=self.run_timeout_s,
            cooldown_s=self.cooldown_s,
            max_held=self.max_held,
        )

    def _trigger(self) -> Trigger:
        if self.url is None:
            return Command(self.command)
        return HttpCall(
            url=self.url,
            method=self.method,
            body=self.body or "",
            content_type=self.content_type,
            ca=self.ca,
            token=None if self.token is None else self.token.text,
        )

    @rule("command", "url", "body", "ca", "token")
    def _one_way(self) -> Iterator[Fault]:
        if bool(self.command) == (self.url is not None):
            yield Fault("", "one of command and url", "both" if self.command else "none")
        elif self.url is None:
            for name, given in (("body", self.body), ("ca", self.ca), ("token", self.token)):
                if given is not None:
                    yield Fault(f".{name}", "nothing, since a command is run", "a value")

    @rule("names", "command")
    def _bounded(self) -> Iterator[Fault]:
        for name, given in (("names", self.names), ("command", self.command)):
            if len(given) > MAX_ITEMS:
                yield Fault(f".{name}", f"at most {MAX_ITEMS} items", str(len(given)))
        if not self.names:
            yield Fault(".names", "one name or more", "none")

    @rule("timeout_s")
    def _in_time(self) -> Iterator[Fault]:
        if self.timeout_s > activation.MAX_TIMEOUT_S:
            expected = f"{activation.MAX_TIMEOUT_S:g}s or less, since relays wait no longer"
            yield Fault(".timeout", expected, f"{self.timeout_s:g}s")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySection:
    """The gateway, through which other networks reach this network's services."""

    RENAMED: ClassVar[dict[str, str]] = {"allow_turn_servers": "turn.NETWORK.allow, a list of CIDRs for each network"}

    id: RecordId
    """Prefix of its records' ids, unique among the gateways of this network."""
    allow: Live[tuple[Target, ...]]
    """Targets that it may dial."""
    rules: Live[tuple[RuleSection, ...]] = ()
    """Which streams may reach what, by their network and client; without rules, all may reach everything in `allow`."""
    activate: Live[tuple[ActivateSection, ...]] = ()
    """How idle services are started; the first entry that matches a service applies."""
    max_held: Live[Count] = activation.DEFAULT_MAX_HELD
    """Limit of streams that wait for services to start."""
    accept: tuple[Accepted, ...] = ("framed",)
    """Protocols that it accepts from relays."""
    turn: Live[dict[NetworkId, TurnAccessSection]] = dataclasses.field(default_factory=dict)
    """Credentials for each network whose TURN servers it registers with."""
    register: Live[Register] = "all"
    """`imported`: register only with networks in which a relay requests our network."""
    replicas: Live[Replicas] = DEFAULT_REPLICAS
    """Allocations on each TURN server, by different gateways of this network if there are several."""
    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()] = ()
    """Addresses to listen on for relays that connect without a TURN server; by default none."""
    advertise: Endpoint | None = None
    """Address under which relays reach it directly; by default the one that it listens on."""
    weight: Weight = 1
    """Relative share of streams."""
    zone: RecordId | None = None
    """Its zone: relays of the same zone that may dial it prefer it."""
    max_hello_bytes: Live[Size] = dataclasses.field(default=DEFAULT_MAX_HELLO_BYTES, metadata=key("max_hello"))
    """Size limit of a ClientHello."""
    max_streams: Live[Count] = gateway.DEFAULT_MAX_STREAMS
    """Limit of concurrent streams; further ones are refused."""
    max_streams_per_network: Live[Count] = 0
    """Limit of concurrent streams from one network, so that none takes the share of others; 0: no limit per network."""
    buffer_bytes: Live[BufferSize] = dataclasses.field(default=DEFAULT_BUFFER_BYTES, metadata=key("buffer"))
    """Kernel memory for each direction of a stream whose reader is slow. While it moves fast, it may hold more."""
    require_epoch: Live[Boolean] = False
    """Refuse relays of versions without epochs, whose preambles could be replayed after a restart."""
    hello_timeout_s: Live[Duration] = gateway.DEFAULT_HELLO_TIMEOUT_S
    """Time from the start of a connection until its ClientHello is complete."""
    dial_timeout_s: Live[Duration] = gateway.DEFAULT_DIAL_TIMEOUT_S
    """Time for one TCP handshake with a service."""
    idle_timeout_s: Live[DurationOrOff] = gateway.DEFAULT_IDLE_TIMEOUT_S
    """A stream ends after this long without a byte in either direction; `off`: never, and a full gateway then ends idle streams to
    make room. The lower value of relay and gateway applies."""
    half_close_timeout_s: Live[DurationOrOff] = gateway.DEFAULT_HALF_CLOSE_TIMEOUT_S
    """The same after one direction has ended."""

    @rule("rules")
    def _rules(self) -> Iterator[Fault]:
        yield from faults_of_rules(self.rules)

    @rule("activate")
    def _activated(self) -> Iterator[Fault]:
        if len(self.activate) > MAX_ACTIVATION_RULES:
            yield Fault(".activate", f"at most {MAX_ACTIVATION_RULES} rules", str(len(self.activate)))

    @rule("advertise", "listen")
    def _advertised(self) -> Iterator[Fault]:
        if self.listen and self.advertise is None and self.listen[0].address.is_unspecified:
            yield Fault(".advertise", "ip:port that relays dial, since it listens on all addresses", "nothing")
