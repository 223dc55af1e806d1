"""Access rules, and imports of other networks' services."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from crossnet.config.schema import OneOrMore, key, rule
from crossnet.config.types import (
    ImportName,
    NetworkId,
    Prefer,
    RuleAction,
    RuleDestination,
    RuleName,
    RulePort,
    RuleSource,
)
from discovery.model.imports import BadImport, ImportRule
from discovery.model.validation import Fault
from sniproxy.access.rules import BadRule, Policy, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSection:
    """Plain service names that this network imports from others."""

    names: tuple[ImportName, ...]
    """Service names; `*` matches one label, and a leading `**` one or more."""
    sources: tuple[NetworkId, ...] = dataclasses.field(metadata=key("from"))
    """The networks that offer them, in order of preference."""
    prefer: Prefer = "local"
    """Precedence if this network has the name, too: `local` asks our own resolvers first, `remote` never does."""

    def as_rule(self) -> ImportRule:
        """Convert to discovery's rule. Raises BadImport."""
        return ImportRule(names=self.names, sources=self.sources, prefer=self.prefer)

    @rule("names", "sources", "prefer")
    def _meant(self) -> Iterator[Fault]:
        try:
            self.as_rule()
        except BadImport as error:
            expected, _, got = error.expected.removeprefix("expected ").rpartition(", got ")
            yield Fault(f".{error.path}", expected or got, got if expected else "something else")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSection:
    """One access rule. The first rule that matches decides; streams that no rule matches are denied."""

    sources: Annotated[tuple[RuleSource, ...], OneOrMore()] = dataclasses.field(default=(), metadata=key("from"))
    """Clients, and at a gateway also networks; by default all."""
    to: Annotated[tuple[RuleDestination, ...], OneOrMore()] = ()
    """Networks, names (`*` matches one label, a leading `**` one or more), or targets; by default all."""
    names: Annotated[tuple[RuleName, ...], OneOrMore()] = ()
    """The kind of name that the client used: `service`, `address`; by default any."""
    ports: Annotated[tuple[RulePort, ...], OneOrMore()] = ()
    """Ports and ranges such as `8000-8999`; by default all."""
    action: RuleAction
    """What happens to a matching stream."""

    def as_rule(self) -> Rule:
        """Convert to the rule that relays and gateways apply. Raises BadRule."""
        return Rule.parse(action=self.action, sources=self.sources, to=self.to, names=self.names, ports=self.ports)

    @rule("sources", "to", "names", "ports", "action")
    def _bounded(self) -> Iterator[Fault]:
        try:
            self.as_rule()
        except BadRule as error:
            yield Fault(f".{error.path}", error.expected, "more")


def policy(rules: Iterable[RuleSection]) -> Policy:
    """Make a policy of a list of rules. Raises BadRule."""
    return Policy(tuple(section.as_rule() for section in rules))


def faults_of_rules(rules: Iterable[RuleSection]) -> Iterator[Fault]:
    """Yield what is wrong with a list of rules as a whole."""
    try:
        policy(rules)
    except BadRule as error:
        yield Fault(f".{error.path}", error.expected, "more")
