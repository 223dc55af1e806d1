"""Imports: which plain service names this network takes from which other networks.

A service name means something only where the using network imports it: no network can take over another's names.
Sans-IO. The one error is BadImport.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from discovery.model.names import BadName, is_ldh_label, is_service_name, normalise

MAX_RULES = 4096
MAX_PATTERNS = 1024  # in one rule


class BadImport(ValueError):
    """A rule that cannot be meant; `path` says where in the rule."""

    def __init__(self, path: str, expected: str) -> None:
        """Say where in the rule, and what was expected."""
        super().__init__(f"{path}: {expected}")
        self.path = path
        self.expected = expected


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRule:
    """One item of `import:`. Raises BadImport when made of anything but good patterns and network ids."""

    names: tuple[str, ...]
    """Service names; a label `*` stands for exactly one label."""

    sources: tuple[str, ...]
    """Networks, the preferred one first; the later ones are for failover."""

    prefer: Literal["local", "remote"] = "local"
    """`local`: upstream DNS is asked first and the import answers on NXDOMAIN or NODATA; `remote`: it is not asked."""

    def __post_init__(self) -> None:
        """Check every part."""
        if not 0 < len(self.names) <= MAX_PATTERNS:
            raise BadImport("names", f"expected 1 to {MAX_PATTERNS} names, got {len(self.names)}")
        for index, pattern in enumerate(self.names):
            # A `*` stands for a label, so the pattern is good when it is good with a label in its place.
            if not is_service_name(pattern.replace("*", "x")) or any(
                "*" in label and label != "*" for label in pattern.split(".")
            ):
                raise BadImport(
                    f"names[{index}]",
                    f"expected a lower-case name of two labels or more, each a label or '*', got {pattern[:253]!r}",
                )
        if not 0 < len(self.sources) <= MAX_PATTERNS:
            raise BadImport("from", f"expected 1 to {MAX_PATTERNS} networks, got {len(self.sources)}")
        for index, source in enumerate(self.sources):
            if not is_ldh_label(source):
                raise BadImport(f"from[{index}]", f"expected a network id, got {source[:63]!r}")
        if len(set(self.sources)) != len(self.sources):
            raise BadImport("from", "expected each network once")
        if self.prefer not in ("local", "remote"):
            raise BadImport("prefer", f"expected local or remote, got {str(self.prefer)[:63]!r}")


class Imports:
    """All rules of a network. The first rule that matches a name decides."""

    __slots__ = ("_exact", "_wild", "rules", "sources")

    def __init__(self, rules: Iterable[ImportRule] = ()) -> None:
        """Index the rules. Raises BadImport for more than 4096 of them."""
        self.rules = tuple(rules)
        if len(self.rules) > MAX_RULES:
            raise BadImport("import", f"expected at most {MAX_RULES} rules, got {len(self.rules)}")
        self.sources = frozenset(source for rule in self.rules for source in rule.sources)
        """Every network that anything is imported from."""
        self._exact: dict[str, int] = {}
        self._wild: dict[int, list[tuple[tuple[str, ...], int]]] = {}  # by count of labels, in the order of rules
        for index, rule in enumerate(self.rules):
            for pattern in rule.names:
                labels = tuple(pattern.split("."))
                if "*" in labels:
                    self._wild.setdefault(len(labels), []).append((labels, index))
                else:
                    self._exact.setdefault(pattern, index)

    def rule_for(self, name: str) -> ImportRule | None:
        """Find the rule that imports this name, in any case and with or without a trailing dot; None if none does."""
        try:
            name = normalise(name)
        except BadName:
            return None
        best = self._exact.get(name, len(self.rules))
        labels = name.split(".")
        for pattern, index in self._wild.get(len(labels), ()):
            if index >= best:
                break
            if all(part in ("*", label) for part, label in zip(pattern, labels, strict=True)):
                best = index
        return self.rules[best] if best < len(self.rules) else None

    def __bool__(self) -> bool:
        return bool(self.rules)
