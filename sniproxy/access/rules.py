"""Access rules: an ordered list, applied in the same way by relays and gateways.

    rules:
      - {from: ["10.1.0.0/16"], to: ["b"], ports: ["8443"], action: allow}
      - {from: ["10.0.0.0/8"], to: ["*.shop.svc.cluster.local"], action: deny}
      - {to: ["b"], names: [service], action: allow}

The first rule that matches decides. If there are rules and none matches, the stream is denied. An item of `from` is a client CIDR
or, at a gateway, the network that the stream comes from. An item of `to` is a network, a name in which a label `*` matches
exactly one label and a leading `**` one or more, or a target `CIDR[:PORTS]`. `names` says by which kind of name the client must
have asked. A missing list matches everything.

Deny is wide, allow is narrow. A name in a deny rule matches every name of what is reached, and every service that has the dialled
address or had it recently. A name in an allow rule matches only names of the one target that the client asked for. `reach` finds
these names.

Sans-IO. The only error is BadRule.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, TypeAlias, TypeVar

from discovery.model.addresses import Address, BadAddress, Network, TargetList, parse_cidrs, parse_port, spellings
from discovery.model.names import AddressTarget, ServiceTarget, is_ldh_label, possible_names
from sniproxy.access.name_pattern import NamePattern, NameTree

T = TypeVar("T")

MAX_RULES = 1024
"""A relay checks them one after the other for each stream. A thousand cost less than one connect."""

MAX_ITEMS = 1024

MAX_KNOWN_TARGETS = 65_536
"""Targets for which a policy caches the rules that may match them."""

MAX_KNOWN_SETS = 1024
"""The same for sets of names or targets, one for each target or endpoint. When full, the cache is cleared and refills from use."""


class BadRule(ValueError):
    """An invalid rule. `path` is the place of the error in it."""

    def __init__(self, path: str, expected: str) -> None:
        super().__init__(f"{path}: expected {expected}")
        self.path = path
        self.expected = expected


class Action(StrEnum):
    """What a matching rule decides."""

    ALLOW = "allow"
    DENY = "deny"


class NameKind(StrEnum):
    """The kind of name by which a client asks."""

    SERVICE = "service"
    """The service's own name, or its compact or mangled name under the mesh domain."""
    ADDRESS = "address"
    """A name under the mesh domain that contains an address and a port."""


Target: TypeAlias = AddressTarget | ServiceTarget


class Alias(NamedTuple):
    """Targets that a flow reaches, under any of their names, and the ports that count with them. For deny rules."""

    targets: frozenset[Target]
    ports: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One stream to one destination, which rules are applied to. Made by `Reach.flow`."""

    client: Address
    from_network: str | None
    """None at a gateway if nothing proves it. Then no rule that names a network in `from` matches."""
    network: str
    """The network of the target."""
    kind: NameKind
    """The kind of name by which the client asked."""
    called: frozenset[str]
    """The names of the target that the client asked for, for allow rules. Empty if something else will be dialled."""
    aliases: tuple[Alias, ...]
    """Everything that is reached, for deny rules."""
    domain: str
    """The mesh domain, in which names of targets end."""
    address: Address | None
    """The address to be dialled, if known: at a relay for its own network and for address names, at a gateway always."""
    port: int
    """The port to be dialled. At a relay, for a service of another network, the port that was asked for."""
    asked_port: int
    """The port in the name, or in the service's record. Deny rules also apply to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule. Use `parse`."""

    action: Action
    clients: tuple[Network, ...] = ()
    from_networks: frozenset[str] = frozenset()
    networks: frozenset[str] = frozenset()
    patterns: tuple[NamePattern, ...] = ()
    """The names in `to`."""
    targets: TargetList | None = None
    ports: tuple[tuple[int, int], ...] = ()
    """Inclusive ranges. Empty: any port."""
    kinds: frozenset[NameKind] = frozenset()
    """Kinds of names by which the client must have asked (`names`). Empty: any."""

    @classmethod
    def parse(
        cls,
        *,
        action: str,
        sources: Iterable[str] = (),
        to: Iterable[str] = (),
        names: Iterable[str] = (),
        ports: Iterable[str | int] = (),
    ) -> "Rule":
        """Parse a rule from the configuration file. Raises BadRule for the first item that is wrong."""
        if action not in set(Action):
            raise BadRule("action", "allow or deny")
        clients, from_networks = _sources(_bounded("from", sources))
        networks, patterns, targets = _destinations(_bounded("to", to))
        return cls(
            action=Action(action),
            clients=clients,
            from_networks=from_networks,
            networks=networks,
            patterns=patterns,
            targets=targets,
            ports=tuple(_port_range(index, item) for index, item in enumerate(_bounded("ports", ports))),
            kinds=frozenset(_name_kind(index, item) for index, item in enumerate(_bounded("names", names))),
        )

    @property
    def is_for_all(self) -> bool:
        """Whether the rule applies to every destination."""
        return not self.networks and not self.patterns and self.targets is None

    @property
    def is_from_all(self) -> bool:
        """Whether the rule applies to every source."""
        return not self.clients and not self.from_networks

    def is_from(self, flow: Flow) -> bool:
        """Return whether the rule applies to the source of the flow."""
        if self.is_from_all:
            return True
        return flow.from_network in self.from_networks or any(flow.client in network for network in self.clients)

    def has_port(self, ports: Iterable[int]) -> bool:
        """Return whether the rule applies to one of these ports."""
        return not self.ports or any(low <= port <= high for port in ports for low, high in self.ports)

    def has_target(self, flow: Flow) -> bool:
        """Return whether the rule lists the dialled address and port; for a deny rule also as NAT64 or 6to4 address."""
        if self.targets is None or flow.address is None:
            return False
        addresses = (flow.address,) if self.action is Action.ALLOW else spellings(flow.address)
        return any(self.targets.allows(address, flow.port) for address in addresses)


class Decision(NamedTuple):
    """The decision about a flow."""

    allowed: bool
    rule: int | None
    """The index of the rule that decided, counted from 0; None if no rule matches."""


class _Named(NamedTuple):
    """The indices of the rules with names that match a flow."""

    called: frozenset[int]
    aliases: tuple[tuple[frozenset[int], frozenset[int]], ...]
    """For each alias the rules, and the ports that count."""

    def in_deny(self, index: int, rule: Rule) -> bool:
        return any(index in rules and rule.has_port(ports) for rules, ports in self.aliases)


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules of a relay or gateway, in order. Immutable: a reload replaces it by a new one.

    At most `max_known_sets` sets and `max_known_targets` targets are cached.
    """

    rules: tuple[Rule, ...] = ()
    max_known_sets: int = field(default=MAX_KNOWN_SETS, repr=False, compare=False, kw_only=True)
    max_known_targets: int = field(default=MAX_KNOWN_TARGETS, repr=False, compare=False, kw_only=True)
    _tree: NameTree = field(init=False, repr=False, compare=False, default_factory=NameTree)
    _by_names: dict[frozenset[str], frozenset[int]] = field(init=False, repr=False, compare=False, default_factory=dict)
    _by_target: dict[Target, frozenset[int]] = field(init=False, repr=False, compare=False, default_factory=dict)
    _by_targets: dict[frozenset[Target], frozenset[int]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if len(self.rules) > MAX_RULES:
            raise BadRule("rules", f"at most {MAX_RULES} rules")
        for index, rule in enumerate(self.rules):
            for pattern in rule.patterns:
                self._tree.add(pattern, index)

    def decide(self, flow: Flow) -> Decision:
        """Return whether this flow is allowed, and by which rule."""
        named = self._named(flow)
        for index, rule in enumerate(self.rules):
            if _concerns(index, rule, flow, named) and rule.is_from(flow):
                return Decision(rule.action is Action.ALLOW, index)
        return Decision(not self.rules, None)

    def refusal(self, flow: Flow) -> str | None:
        """Return why this flow is denied, None if it is allowed."""
        decision = self.decide(flow)
        if decision.allowed:
            return None
        return "no rule allows it" if decision.rule is None else f"rule {decision.rule + 1} denies it"

    def concerning(self, flow: Flow) -> list[int]:
        """Return the indices of the rules that apply to the destination of the flow, whatever its source."""
        named = self._named(flow)
        return [index for index, rule in enumerate(self.rules) if _concerns(index, rule, flow, named)]

    def is_hopeless(self, flow: Flow) -> bool:
        """Return whether a flow is denied whichever address and port are dialled; those in the flow are ignored."""
        named = self._named(flow)
        for index, rule in enumerate(self.rules):
            if not rule.is_from(flow) or (rule.kinds and flow.kind not in rule.kinds):
                continue
            is_general = rule.is_for_all or flow.network in rule.networks
            if rule.action is Action.ALLOW:
                if is_general or rule.targets is not None or index in named.called:
                    return False
            elif not rule.ports and (is_general or named.in_deny(index, rule)):
                return True
        return bool(self.rules)

    def _named(self, flow: Flow) -> _Named:
        called = self._by_names.get(flow.called)
        if called is None:
            if len(self._by_names) >= self.max_known_sets:
                self._by_names.clear()
            called = self._by_names[flow.called] = frozenset().union(*map(self._tree.find, flow.called))
        return _Named(called, tuple((self._naming(alias.targets, flow.domain), alias.ports) for alias in flow.aliases))

    def _naming(self, targets: frozenset[Target], domain: str) -> frozenset[int]:
        """Return the indices of the rules that may match one of these targets. Cached for each endpoint."""
        known = self._by_targets.get(targets)
        if known is None:
            if len(self._by_targets) >= self.max_known_sets:
                self._by_targets.clear()
            if len(self._by_target) >= self.max_known_targets:
                self._by_target.clear()
            for target in targets - self._by_target.keys():
                names = possible_names(target, domain)
                self._by_target[target] = frozenset().union(*map(self._tree.find, names))
            known = frozenset().union(*(self._by_target[target] for target in targets))
            self._by_targets[targets] = known
        return known


def _concerns(index: int, rule: Rule, flow: Flow, named: _Named) -> bool:
    if rule.kinds and flow.kind not in rule.kinds:
        return False
    is_general = rule.is_for_all or flow.network in rule.networks
    if rule.action is Action.ALLOW:
        return (is_general or index in named.called or rule.has_target(flow)) and rule.has_port((flow.port,))
    if named.in_deny(index, rule):
        return True
    return (is_general or rule.has_target(flow)) and rule.has_port((flow.port, flow.asked_port))


def _bounded(path: str, items: Iterable[T]) -> list[T]:
    given = list(items)
    if len(given) > MAX_ITEMS:
        raise BadRule(path, f"at most {MAX_ITEMS} items")
    return given


def _sources(items: list[str]) -> tuple[tuple[Network, ...], frozenset[str]]:
    clients: list[Network] = []
    networks = set()
    for index, item in enumerate(items):
        if is_ldh_label(item) and not item.isdigit():
            networks.add(item)
            continue
        try:
            clients += parse_cidrs([item])
        except BadAddress:
            raise BadRule(f"from[{index}]", "a CIDR of clients or a network id") from None
    return tuple(clients), frozenset(networks)


def _destinations(items: list[str]) -> tuple[frozenset[str], tuple[NamePattern, ...], TargetList | None]:
    networks, names, targets = set(), [], []
    for index, item in enumerate(items):
        if is_ldh_label(item) and not item.isdigit():
            networks.add(item)
        elif "/" in item or item.startswith("[") or item.rpartition(".")[2].partition(":")[0].isdigit():
            try:
                TargetList.parse([item])
            except BadAddress:
                raise BadRule(f"to[{index}]", "a target CIDR[:PORTS]") from None
            targets.append(item)
        else:
            try:
                names.append(NamePattern.parse(item))
            except ValueError as error:
                raise BadRule(f"to[{index}]", f"a network id, a name or a target ({error})") from None
    return frozenset(networks), tuple(names), TargetList.parse(targets) if targets else None


def _name_kind(index: int, item: str) -> NameKind:
    if item not in set(NameKind):
        raise BadRule(f"names[{index}]", "service or address")
    return NameKind(item)


def _port_range(index: int, item: str | int) -> tuple[int, int]:
    low, dash, high = str(item).partition("-")
    try:
        first = parse_port(low)
        last = parse_port(high) if dash else first
    except BadAddress:
        first, last = 1, 0
    if first > last:
        raise BadRule(f"ports[{index}]", "a port or a range such as 8000-8099")
    return first, last
