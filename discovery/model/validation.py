"""Validates data decoded from JSON or YAML against a Struct, and reports all errors, not only the first.

An error has a path and what was expected there. Sans-IO.
"""

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

MAX_SHOWN = 80
"""Characters of an invalid value that an error repeats."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One error in the data: its path, what was expected there, and what was found."""

    path: str
    expected: str
    got: str = ""

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}" + (f", got {self.got}" if self.got else "")


def shown(value: object) -> str:
    """Format any value for a message: short, and on one line."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            text = repr(value[: MAX_SHOWN + 1])
        case int() | float():
            # Python needs a second to convert an integer of a million digits, and may refuse to.
            text = str(value) if not isinstance(value, int) or value.bit_length() < 256 else "a huge number"
        case dict():
            text = "a mapping"
        case list() | tuple():
            text = "a list"
        case _:
            text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def child(path: str, key: object) -> str:
    """Return the path of a member: `$.a` for plain keys, `$["a b"]` for others."""
    if isinstance(key, str) and key and key.replace("_", "a").isalnum() and key.isascii():
        return f"{path}.{key}"
    return f'{path}["{shown(key)[1:-1]}"]' if isinstance(key, str) else f"{path}[{shown(key)}]"


def shape_faults(value: object, expected: Any, path: str = "$") -> Iterator[Fault]:
    """Yield all errors of a value. `expected` is str, int, bool, Literal, list[T], dict[str, T], T | None, a union of plain types,
    or a Struct.

    A value without errors can be passed to msgspec.convert(value, expected).
    """
    if isinstance(expected, type) and issubclass(expected, msgspec.Struct):
        return _struct_faults(value, expected, path)
    return _CHECKERS.get(get_origin(expected), _plain_faults)(value, expected, path)


def _words(expected: Any) -> str:
    """Describe a plain type."""
    if get_origin(expected) is Literal:
        return " or ".join(get_args(expected))
    return {str: "a string", int: "an integer", bool: "true or false"}.get(expected, str(expected))


def _struct_faults(value: object, struct: type[msgspec.Struct], path: str) -> Iterator[Fault]:
    if not isinstance(value, dict):
        yield Fault(path, "a mapping", shown(value))
        return
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    for key, item in value.items():
        field = fields.get(key) if isinstance(key, str) else None
        if field is None:
            yield Fault(child(path, key), f"one of {', '.join(fields) or 'no keys at all'}", "an unknown key")
        else:
            yield from shape_faults(item, field.type, child(path, key))
    for name, field in fields.items():
        if field.required and name not in value:
            yield Fault(child(path, name), "a value", "nothing")


def _union_faults(value: object, expected: Any, path: str) -> Iterator[Fault]:
    options = get_args(expected)
    if value is None and type(None) in options:
        return
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        yield from shape_faults(value, options[0], path)
    elif all(any(shape_faults(value, option)) for option in options):
        yield Fault(path, " or ".join(map(_words, options)), shown(value))


def _list_faults(value: object, expected: Any, path: str) -> Iterator[Fault]:
    if not isinstance(value, list | tuple):
        yield Fault(path, "a list", shown(value))
        return
    (item_type,) = get_args(expected)
    for index, item in enumerate(value):
        yield from shape_faults(item, item_type, f"{path}[{index}]")


def _mapping_faults(value: object, expected: Any, path: str) -> Iterator[Fault]:
    if not isinstance(value, dict):
        yield Fault(path, "a mapping", shown(value))
        return
    _, item_type = get_args(expected)
    for key, item in value.items():
        if not isinstance(key, str):
            yield Fault(child(path, key), "a string as key", shown(key))
        yield from shape_faults(item, item_type, child(path, key))


def _literal_faults(value: object, expected: Any, path: str) -> Iterator[Fault]:
    if not isinstance(value, str) or value not in get_args(expected):
        yield Fault(path, _words(expected), shown(value))


def _plain_faults(value: object, expected: Any, path: str) -> Iterator[Fault]:
    # bool is a subclass of int, but `true` is not an integer in JSON or YAML.
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        yield Fault(path, _words(expected), shown(value))


_CHECKERS: Mapping[Any, Callable[[object, Any, str], Iterator[Fault]]] = {
    Union: _union_faults,
    types.UnionType: _union_faults,
    list: _list_faults,
    dict: _mapping_faults,
    Literal: _literal_faults,
}
"""By the origin of the expected type. Types without an origin are plain."""
