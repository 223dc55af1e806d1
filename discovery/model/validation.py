"""The shape of plain data: what JSON or YAML gave, held against a Struct, with every fault found rather than the first.

A fault names a path and what was expected there. Sans-IO.
"""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

MAX_SHOWN = 80  # characters of a bad value that a fault repeats


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: where, what was expected, and what stands there."""

    path: str
    expected: str
    got: str = ""

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}" + (f", got {self.got}" if self.got else "")


def shown(value: object) -> str:
    """Show a value in a message: short, on one line, whatever it holds."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            text = repr(value[: MAX_SHOWN + 1])
        case int() | float():
            # An integer of a million digits would take Python a second and a refusal to print.
            text = str(value) if not isinstance(value, int) or value.bit_length() < 256 else "a huge number"
        case dict():
            text = "a mapping"
        case list() | tuple():
            text = "a list"
        case _:
            text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def child(path: str, key: object) -> str:
    """Name a member of what `path` names: `$.a` for plain keys, `$["a b"]` for the rest."""
    if isinstance(key, str) and key and key.replace("_", "a").isalnum() and key.isascii():
        return f"{path}.{key}"
    return f'{path}["{shown(key)[1:-1]}"]' if isinstance(key, str) else f"{path}[{shown(key)}]"


def shape_faults(value: object, expected: Any, path: str = "$") -> Iterator[Fault]:
    """Hold a value against str, int, bool, Literal, list[T], dict[str, T], T | None, unions of plain ones, or a Struct.

    Yields every fault.

    A value without faults can be given to msgspec.convert(value, expected).
    """
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        options = get_args(expected)
        if value is None and type(None) in options:
            return
        expected, *others = (option for option in options if option is not type(None))
        if others:
            if all(any(shape_faults(value, option)) for option in (expected, *others)):
                yield Fault(path, " or ".join(map(_words, (expected, *others))), shown(value))
            return
        origin = get_origin(expected)
    if isinstance(expected, type) and issubclass(expected, msgspec.Struct):
        yield from _struct_faults(value, expected, path)
    elif origin is list:
        if not isinstance(value, list | tuple):
            yield Fault(path, "a list", shown(value))
            return
        for index, item in enumerate(value):
            yield from shape_faults(item, get_args(expected)[0], f"{path}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield Fault(path, "a mapping", shown(value))
            return
        for key, item in value.items():
            if not isinstance(key, str):
                yield Fault(child(path, key), "a string as key", shown(key))
            yield from shape_faults(item, get_args(expected)[1], child(path, key))
    elif origin is Literal:
        if not isinstance(value, str) or value not in get_args(expected):
            yield Fault(path, _words(expected), shown(value))
    elif not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        yield Fault(path, _words(expected), shown(value))


def _words(expected: Any) -> str:
    """Say what a plain value has to be."""
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
