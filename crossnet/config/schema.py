"""Validates a document against dataclasses, and reports all of its errors, not only the first.

A section of the file is a frozen dataclass. The types of its fields say what is allowed: another dataclass, `tuple[T, ...]` for a
list, `dict[K, T]`, `T | None`, and for single values `Annotated[T, Leaf(...)]`. A field's key in the file is its name without the
suffix for seconds (`idle_timeout_s` is written `idle_timeout: 5s`), or the one given by `key(...)`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from discovery.files.yaml_file import Plain
from discovery.model.validation import Fault, child, shown

MadeT = TypeVar("MadeT")
T = TypeVar("T")

HIDDEN = "***"


class Mismatch(ValueError):
    """A single value is invalid. `expected` and `got` default to the leaf's; `below` is a path within the value."""

    def __init__(self, expected: str | None = None, got: str | None = None, below: str = "") -> None:
        super().__init__(expected, got, below)
        self.expected = expected
        self.got = got
        self.below = below


@dataclass(frozen=True, slots=True)
class Leaf:
    """How one type of single value is parsed and printed."""

    expected: str
    """What is allowed, for error messages."""
    parse: Callable[[Plain, Path], object]
    """Convert the value in the file; the second argument is the file's folder. Raises Mismatch."""
    show: Callable[[Any], Plain] = str
    """Convert back."""


@dataclass(frozen=True, slots=True)
class OneOrMore:
    """Marks a list that may be written without brackets if it has only one item."""


class _Live:
    """Marks a setting that a running process takes from a changed file. All others wait for a restart."""


LIVE = _Live()
Live: TypeAlias = Annotated[T, LIVE]
"""`Live[T]`: a T that may change while the process runs. Everything below it changes as a whole."""


def is_live(kind: Any) -> bool:
    """Whether a field of this type is marked as `Live`."""
    return LIVE in unwrapped(kind)[1]


def key(name: str) -> dict[str, str]:
    """Return the metadata for a field whose key in the file is `name`."""
    return {"key": name}


RuleT = TypeVar("RuleT", bound=Callable[[Any], Iterator[Fault]])


def rule(*fields: str) -> Callable[[RuleT], RuleT]:
    """Mark a section's method that yields errors of values that are valid by themselves.

    It reads the given fields and is called only if all of them are valid, so that no error is the consequence of another. The
    paths that it yields are relative to the section and begin with a dot.
    """

    def mark(method: RuleT) -> RuleT:
        method.__dict__[_READS] = frozenset(fields)
        return method

    return mark


_READS = "reads_fields"


def decode(kind: type[MadeT], value: Plain, folder: Path) -> tuple[MadeT | None, list[Fault]]:
    """Convert a document to a section. Returns the section, None if there are errors, and the errors."""
    reader = _Reader(folder)
    made = reader.read(kind, value, "$")
    return (None if reader.faults else made), reader.faults


def faults_of(made: object, path: str = "$") -> Iterator[Fault]:
    """Yield the errors that the rules of a section, and of the sections in it, find.

    `decode` applies the rules to a file; this is for a configuration that was merged from two.
    """
    if dataclasses.is_dataclass(made):
        for fault in _asked(made, frozenset()):
            yield Fault(path + fault.path, fault.expected, fault.got)
        for field in dataclasses.fields(made):
            name = field.metadata.get("key", field.name.removesuffix("_s"))
            yield from faults_of(getattr(made, field.name), child(path, name))
    elif isinstance(made, dict):
        for name, item in made.items():
            yield from faults_of(item, child(path, str(name)))
    elif isinstance(made, tuple):
        for index, item in enumerate(made):
            yield from faults_of(item, f"{path}[{index}]")


def _asked(made: object, wrong: AbstractSet[str]) -> Iterator[Fault]:
    """Apply the rules of a section, except those that read one of the `wrong` fields."""
    for method in vars(type(made)).values():
        reads = getattr(method, _READS, None)
        if reads is not None and reads.isdisjoint(wrong):
            yield from method(made)


def encode(kind: Any, value: object) -> Plain:
    """Convert a section back to a document, with all defaults, and secrets hidden."""
    kind, marks = unwrapped(kind)
    if value is None:
        return None
    for mark in marks:
        if isinstance(mark, Leaf):
            return mark.show(value)
    if dataclasses.is_dataclass(kind):
        return {
            name: encode(field_kind, getattr(value, field.name))
            for name, field, field_kind in fields_of(kind)
            if getattr(value, field.name) is not None
        }
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, tuple):
        return [encode(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(name): encode(arguments[1], item) for name, item in value.items()}
    raise TypeError(f"{kind} has no place in a section")


class _Reader:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[Fault] = []

    def wrong(self, path: str, expected: str, got: str) -> Any:
        self.faults.append(Fault(path, expected, got))

    def read(self, kind: Any, value: Plain, path: str) -> Any:
        kind, marks = unwrapped(kind)
        for mark in marks:
            if isinstance(mark, Leaf):
                return self.leaf(mark, value, path)
        if dataclasses.is_dataclass(kind):
            return self.section(kind, value, path)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is tuple:
            if isinstance(value, list):
                return tuple(self.read(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
            if value is not None and any(isinstance(mark, OneOrMore) for mark in marks):
                return (self.read(arguments[0], value, path),)
            return self.wrong(path, "a list", shown(value))
        if origin is dict:
            if not isinstance(value, dict):
                return self.wrong(path, "a mapping", shown(value))
            return {
                self.read(arguments[0], name, child(path, name)): self.read(arguments[1], item, child(path, name))
                for name, item in value.items()
            }
        raise TypeError(f"{kind} has no place in a section")

    def leaf(self, leaf: Leaf, value: Plain, path: str) -> Any:
        try:
            return leaf.parse(value, self.folder)
        except Mismatch as error:
            return self.wrong(path + error.below, error.expected or leaf.expected, error.got or shown(value))

    def section(self, kind: Any, value: Plain, path: str) -> Any:
        if not isinstance(value, dict):
            return self.wrong(path, "a mapping", shown(value))
        fields = {key: (field, field_kind) for key, field, field_kind in fields_of(kind)}
        renamed = getattr(kind, "RENAMED", {})
        for name in value:
            if name in renamed:
                self.wrong(
                    child(path, name), f"{renamed[name]}, which has taken its place", "a key of an earlier version"
                )
            elif name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                self.wrong(
                    child(path, name), f"a known key such as {near[0]}" if near else _one_of(fields), "an unknown key"
                )
        arguments: dict[str, object] = {}
        wrong = set()
        for name, (field, field_kind) in fields.items():
            before = len(self.faults)
            if name in value:
                arguments[field.name] = self.read(field_kind, value[name], child(path, name))
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                arguments[field.name] = self.wrong(child(path, name), _expected(field_kind), "nothing")
            if len(self.faults) > before:
                wrong.add(field.name)
        made = kind(**arguments)
        self.faults.extend(Fault(path + fault.path, fault.expected, fault.got) for fault in _asked(made, wrong))
        return made


def fields_of(kind: Any) -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Yield the fields of a section: key in the file, field, type."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        yield field.metadata.get("key", field.name.removesuffix("_s")), field, hints[field.name]


def unwrapped(kind: Any) -> tuple[Any, tuple[object, ...]]:
    """Return the T of `T | None` and `Annotated[T, ...]`, and all annotations."""
    marks: tuple[object, ...] = ()
    while True:
        origin = typing.get_origin(kind)
        if origin is Annotated:
            marks += kind.__metadata__
            kind = kind.__origin__
        elif origin in {typing.Union, types.UnionType}:
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        else:
            return kind, marks


def _expected(kind: Any) -> str:
    kind, marks = unwrapped(kind)
    for mark in marks:
        if isinstance(mark, Leaf):
            return mark.expected
    return "a list" if typing.get_origin(kind) is tuple else "a mapping"


def _one_of(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"
