"""Who may go where: ordered rules, asked alike by relays and gateways.

    rules:
      - {from: ["10.1.0.0/16"], to: ["b"], ports: ["8443"], action: allow}
      - {from: ["10.0.0.0/8"], to: ["*.shop.svc.cluster.local"], action: deny}

The first rule that matches decides; once there is any rule, what none matches is denied. An item of `from` is a client CIDR, or
(at a gateway) the network that the stream comes from. An item of `to` is a network, a name in which a label `*` stands for exactly
one label and a leading `**` for one or more, or a target `CIDR[:PORTS]`. A list that is left out matches everything.

Sans-IO. The one error is BadRule.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from discovery.addresses import Address, BadAddress, Network, TargetList, parse_cidrs, parse_port
from discovery.names import is_ldh_label

T = TypeVar("T")

MAX_RULES = 1024
"""A relay asks them for each stream, one after the other: a thousand cost less than one connect."""

MAX_ITEMS = 1024
MAX_PATTERN = 253


class BadRule(ValueError):
    """A rule that cannot be meant; `path` says where in it."""

    def __init__(self, path: str, expected: str) -> None:
        super().__init__(f"{path}: expected {expected}")
        self.path = path
        self.expected = expected


class Action(StrEnum):
    """What a rule that matches says."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What is asked about: one stream on its way to one place."""

    client: Address
    from_network: str | None
    """None at a gateway where nothing proves it: then no rule that names a network matches."""
    network: str
    name: str
    """The server name, lower case."""
    address: Address | None
    """What will be dialled, where it is known: at a relay for address names, at a gateway always."""
    port: int


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A name in which `*` is one label and a leading `**` is one or more."""

    labels: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "NamePattern":
        """Read a pattern of two labels or more. ValueError if it is none."""
        labels = tuple(text.split("."))
        if len(text) > MAX_PATTERN or len(labels) < 2:
            raise ValueError("a pattern has two labels or more, 253 characters at most")
        for index, label in enumerate(labels):
            # Labels of mangled names begin with an underscore; the rest is what a host name has.
            plain = is_ldh_label(label.removeprefix("_"))
            if not (plain or label == "*" or (label == "**" and index == 0)):
                raise ValueError("a label is lower-case letters, digits and inner hyphens, or '*', or '**' in front")
        return cls(labels)

    def matches(self, name: str) -> bool:
        """Tell whether a name, lower case and without trailing dot, is meant."""
        labels, given = self.labels, name.split(".")
        if labels[0] == "**":
            labels = labels[1:]
            if len(given) <= len(labels):
                return False
            given = given[len(given) - len(labels) :]
        return len(labels) == len(given) and all(
            pattern in ("*", label) for pattern, label in zip(labels, given, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule, read. Use `parse`."""

    action: Action
    clients: tuple[Network, ...] = ()
    from_networks: frozenset[str] = frozenset()
    networks: frozenset[str] = frozenset()
    names: tuple[NamePattern, ...] = ()
    targets: TargetList | None = None
    ports: tuple[tuple[int, int], ...] = ()
    """Inclusive ranges; none: any port."""

    @classmethod
    def parse(
        cls, *, action: str, sources: Iterable[str] = (), to: Iterable[str] = (), ports: Iterable[str | int] = ()
    ) -> "Rule":
        """Read a rule as the configuration file holds it. BadRule at the first item that is wrong."""
        if action not in set(Action):
            raise BadRule("action", "allow or deny")
        clients, from_networks = _sources(_bounded("from", sources))
        networks, names, targets = _destinations(_bounded("to", to))
        return cls(
            action=Action(action),
            clients=clients,
            from_networks=from_networks,
            networks=networks,
            names=names,
            targets=targets,
            ports=tuple(_port_range(index, item) for index, item in enumerate(_bounded("ports", ports))),
        )

    def matches(self, flow: Flow) -> bool:
        """Tell whether the rule speaks of this flow."""
        return self._has_source(flow) and self._has_destination(flow) and self._has_port(flow.port)

    def judges(self, flow: Flow) -> bool | None:
        """Tell what is certain of a flow whose address and port are to come: it matches, or it does not; None if that depends."""
        if not self._has_source(flow):
            return False
        if not self._has_destination(flow):
            return None if self.targets is not None else False
        return None if self.ports else True

    def _has_source(self, flow: Flow) -> bool:
        if not self.clients and not self.from_networks:
            return True
        return flow.from_network in self.from_networks or any(flow.client in network for network in self.clients)

    def _has_destination(self, flow: Flow) -> bool:
        if not self.networks and not self.names and self.targets is None:
            return True
        if flow.network in self.networks or any(pattern.matches(flow.name) for pattern in self.names):
            return True
        return self.targets is not None and flow.address is not None and self.targets.allows(flow.address, flow.port)

    def _has_port(self, port: int) -> bool:
        return not self.ports or any(low <= port <= high for low, high in self.ports)


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules of a relay or gateway, in order. Immutable: a reload makes a new one and swaps it."""

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rules) > MAX_RULES:
            raise BadRule("rules", f"at most {MAX_RULES} rules")

    def refusal(self, flow: Flow) -> str | None:
        """Say why this flow is denied, None if it may go."""
        for index, rule in enumerate(self.rules):
            if rule.matches(flow):
                return None if rule.action is Action.ALLOW else f"rule {index + 1} denies it"
        return "no rule allows it" if self.rules else None

    def is_hopeless(self, flow: Flow) -> bool:
        """Tell whether a flow is denied at whatever address and port it will come to; what stands there of them is not asked."""
        for rule in self.rules:
            judged = rule.judges(replace(flow, address=None))
            if judged is not False and rule.action is Action.ALLOW:
                return False
            if judged:
                return True
        return bool(self.rules)


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
