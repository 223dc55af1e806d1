"""Imports: which plain service names this network imports, and from which networks.

A plain service name is resolved only if the client's own network imports it, so no network can take over names of another.
Sans-IO. The only error is BadImport.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from discovery.model.names import BadName, is_ldh_label, is_service_name, normalise

MAX_RULES = 4096
MAX_PATTERNS = 1024  # in one rule


class BadImport(ValueError):
    """An invalid rule. `path` is the place in the rule."""

    def __init__(self, path: str, expected: str) -> None:
        """`expected` is a sentence that says what was expected at `path`."""
        super().__init__(f"{path}: {expected}")
        self.path = path
        self.expected = expected


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRule:
    """One item of `import:`. Raises BadImport for invalid patterns or network ids."""

    names: tuple[str, ...]
    """Service names; the label `*` matches exactly one label."""

    sources: tuple[str, ...]
    """Networks, the preferred one first; the others are for failover."""

    prefer: Literal["local", "remote"] = "local"
    """`local`: upstream DNS is asked first, and the import is used on NXDOMAIN or NODATA; `remote`: upstream is not asked."""

    def __post_init__(self) -> None:
        """Validate all fields."""
        if not 0 < len(self.names) <= MAX_PATTERNS:
            raise BadImport("names", f"expected 1 to {MAX_PATTERNS} names, got {len(self.names)}")
        for index, pattern in enumerate(self.names):
            # `*` stands for a label, so the pattern is valid if it is valid with a label instead of `*`.
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
    """All rules of a network. The first rule that matches a name is used."""

    __slots__ = ("_exact", "_wild", "rules", "sources")

    def __init__(self, rules: Iterable[ImportRule] = ()) -> None:
        """Index the rules. Raises BadImport for more than 4096 of them."""
        self.rules = tuple(rules)
        if len(self.rules) > MAX_RULES:
            raise BadImport("import", f"expected at most {MAX_RULES} rules, got {len(self.rules)}")
        self.sources = frozenset(source for rule in self.rules for source in rule.sources)
        """All networks from which names are imported."""
        self._exact: dict[str, int] = {}
        self._wild: dict[int, list[tuple[tuple[str, ...], int]]] = {}  # by number of labels, in the order of the rules
        for index, rule in enumerate(self.rules):
            for pattern in rule.names:
                labels = tuple(pattern.split("."))
                if "*" in labels:
                    self._wild.setdefault(len(labels), []).append((labels, index))
                else:
                    self._exact.setdefault(pattern, index)

    def rule_for(self, name: str) -> ImportRule | None:
        """Return the rule that imports this name, None if there is none. Case and a trailing dot do not matter."""
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
