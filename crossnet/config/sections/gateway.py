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
    CertificatesFile,
    Cidr,
    ContentType,
    Count,
    Duration,
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
    """How this network's gateway proves itself to another network's TURN servers: one of the three ways."""

    username: Text | None = None
    """With `password`: the long-term credentials of a user of those servers."""
    password: SecretFile | None = None
    """The password of `username`."""
    secret: SecretFile | None = None
    """The shared secret of their REST credentials (coturn: static-auth-secret)."""
    issue: Boolean = False
    """Ask this network's discovery server for credentials that live shortly."""
    ca: CertificatesFile | None = None
    """Verifies `turns:` servers; the system's authorities by default."""
    allow: tuple[Cidr, ...] = ()
    """Where alone that network's TURN servers may be. Without it at most four addresses an hour, none of them this host's own or in
    a range that is refused, such as 127.0.0.0/8."""

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
    """How services that have no live endpoint are woken while streams wait: by a command or by an HTTP call."""

    names: Annotated[tuple[ServicePattern, ...], OneOrMore()]
    """Of services as their records have them; `*` is one label and a leading `**` one or more."""
    command: tuple[Argument, ...] = ()
    """A program and its arguments, without a shell; CROSSNET_SERVICE and CROSSNET_NETWORK say what to wake."""
    url: Url | None = None
    """Called with the headers Crossnet-Service and Crossnet-Network."""
    method: Method = "POST"
    """The HTTP method of the call."""
    body: HiddenText | None = None
    """Neither this nor the URL's query is shown: there may be secrets in them."""
    content_type: ContentType = "application/json"
    """The type of `body`."""
    ca: ExistingFile | None = None
    """Verifies the URL's server; the system's authorities by default."""
    token: SecretFile | None = None
    """Sent as `Authorization: Bearer …`."""
    timeout_s: Duration = activation.DEFAULT_TIMEOUT_S
    """How long a stream waits; two minutes at most."""
    run_timeout_s: Duration = activation.DEFAULT_RUN_TIMEOUT_S
    """How long the command or call may take: then it is ended."""
    cooldown_s: Duration = activation.DEFAULT_COOLDOWN_S
    """After a success, how long a service is not woken again."""
    max_held: Count = activation.DEFAULT_MAX_HELD_PER_SERVICE
    """Streams that wait for one service."""

    def as_rule(self) -> ActivationRule:
        """The rule as the gateway has it."""
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
    """The gateway to this network's services."""

    RENAMED: ClassVar[dict[str, str]] = {"allow_turn_servers": "turn.NETWORK.allow, a list of CIDRs for each network"}

    id: RecordId
    """The id that its records begin with; another gateway of this network has another one."""
    allow: Live[tuple[Target, ...]]
    """What it may dial."""
    rules: Live[tuple[RuleSection, ...]] = ()
    """Which streams may go where, by the network and client that they come from; without any all that `allow` lists."""
    activate: Live[tuple[ActivateSection, ...]] = ()
    """How services that sleep are woken; the first that names one counts."""
    max_held: Live[Count] = activation.DEFAULT_MAX_HELD
    """Streams that wait for services to wake."""
    accept: tuple[Accepted, ...] = ("framed",)
    """What it takes from relays."""
    turn: Live[dict[NetworkId, TurnAccessSection]] = dataclasses.field(default_factory=dict)
    """For each other network whose TURN servers it registers with, the credentials."""
    register: Live[Register] = "all"
    """`imported`: only with networks in which a relay asks for ours."""
    replicas: Live[Replicas] = DEFAULT_REPLICAS
    """Allocations on each TURN server, by different gateways of this network where there are several."""
    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()] = ()
    """Where relays reach it without a TURN server; by default nowhere."""
    advertise: Endpoint | None = None
    """The address that relays dial for it; by default the one that it listens on."""
    weight: Weight = 1
    """How many times the streams of a gateway of weight 1 it is for."""
    zone: RecordId | None = None
    """Where it stands: relays of the same zone that may dial it prefer it."""
    max_hello_bytes: Live[Size] = dataclasses.field(default=DEFAULT_MAX_HELLO_BYTES, metadata=key("max_hello"))
    """The longest ClientHello."""
    max_streams: Live[Count] = gateway.DEFAULT_MAX_STREAMS
    """Streams at once; further ones are refused."""
    max_streams_per_network: Live[Count] = 0
    """Streams at once from one network, so that none takes the share of the others; 0: no limit of its own."""
    require_epoch: Live[Boolean] = False
    """Refuse relays of versions from before epochs, whose preambles alone could count again after a restart."""
    hello_timeout_s: Live[Duration] = gateway.DEFAULT_HELLO_TIMEOUT_S
    """From the start of a connection to the end of its ClientHello."""
    dial_timeout_s: Live[Duration] = gateway.DEFAULT_DIAL_TIMEOUT_S
    """For one TCP handshake with a service."""
    idle_timeout_s: Live[Duration] = gateway.DEFAULT_IDLE_TIMEOUT_S
    """A stream ends after this long without a byte in either direction. The lower one of relay and gateway counts."""
    half_close_timeout_s: Live[Duration] = gateway.DEFAULT_HALF_CLOSE_TIMEOUT_S
    """The same, once one direction has ended."""

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
