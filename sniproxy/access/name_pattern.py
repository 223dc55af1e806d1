"""Patterns of names in rules, and a tree of them in which a name is looked up. Sans-IO."""

from dataclasses import dataclass

from discovery.model.names import is_service_label

MAX_PATTERN = 253
"""Characters in a pattern, as in a name of the DNS."""


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A name pattern: `*` matches one label, a leading `**` one or more."""

    labels: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "NamePattern":
        """Parse a pattern of two labels or more. Raises ValueError."""
        labels = tuple(text.split("."))
        if len(text) > MAX_PATTERN or len(labels) < 2:
            raise ValueError("a pattern has two labels or more, 253 characters at most")
        for index, label in enumerate(labels):
            # Labels of mangled names begin with an underscore; the rest must be as in a service name.
            plain = is_service_label(label.removeprefix("_"))
            if not (plain or label == "*" or (label == "**" and index == 0)):
                raise ValueError("a label is lower-case letters, digits and inner '-' or '_', or '*', or '**' in front")
        return cls(labels)

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches a name, which is in lower case and without trailing dot."""
        labels, given = self.labels, name.split(".")
        if labels[0] == "**":
            labels = labels[1:]
            if len(given) <= len(labels):
                return False
            given = given[len(given) - len(labels) :]
        return len(labels) == len(given) and all(
            pattern in ("*", label) for pattern, label in zip(labels, given, strict=True)
        )


class NameTree:
    """The patterns of all rules as a tree of labels, from the last one, so that the cost of a look-up depends only on the name."""

    __slots__ = ("_below", "_ending", "_longer")

    def __init__(self) -> None:
        self._below: dict[str, NameTree] = {}
        self._ending: set[int] = set()
        self._longer: set[int] = set()
        """Rules with a pattern that has `**` at this place."""

    def add(self, pattern: NamePattern, rule: int) -> None:
        """Add a pattern of the rule with this index."""
        node = self
        for label in reversed(pattern.labels):
            if label == "**":
                node._longer.add(rule)
                return
            node = node._below.setdefault(label, NameTree())
        node._ending.add(rule)

    def find(self, name: str) -> set[int]:
        """Return the indices of the rules with a pattern that matches this name."""
        found: set[int] = set()
        nodes = [self]
        for label in reversed(name.split(".")):
            for node in nodes:
                found |= node._longer
            nodes = [below for node in nodes for key in (label, "*") if (below := node._below.get(key)) is not None]
        for node in nodes:
            found |= node._ending
        return found
