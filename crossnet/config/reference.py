"""Generates the reference of the configuration file from its sections: `docs/configuration.md`.

python -m crossnet.config.reference > docs/configuration.md
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from crossnet.config.schema import Leaf, OneOrMore, encode, fields_of, is_live, unwrapped
from crossnet.config.sections import Config

_HEAD = """\
# Configuration

One YAML file configures any set of roles. `crossnet check -c FILE` reports every error in it, or prints it with all defaults.
Durations are written `300ms`, `5s`, `10m`, `1h`, `1d`; sizes `64KiB`, `1MiB`. Secrets and keys are kept in files of their own:
`{file: PATH}`. Relative paths start at the folder of the configuration file.

**Live** settings are taken from the file while the process runs: on SIGHUP, or within two seconds of a change of the file or of a
secret in it. The others wait for a restart, and the log and `crossnet status` list them. A file with an error changes nothing.

This page is made from the code (`make docs`).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section and its place in the file."""

    place: str
    kind: type
    is_live: bool
    """The whole section can change without a restart."""


def sections(kind: type = Config, place: str = "", *, live: bool = False) -> Iterator[Section]:
    """Yield this section, and all sections in it."""
    yield Section(place=place, kind=kind, is_live=live)
    for key, _, field_kind in fields_of(kind):
        below, shape = _section_in(field_kind)
        if below is not None:
            at = f"{place}.{key}{shape}".removeprefix(".")
            yield from sections(below, at, live=live or is_live(field_kind))


def meanings(kind: type) -> dict[str, str]:
    """Return the docstrings below a section's fields, by field."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(made, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(made.body, made.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                found[name] = " ".join(said.split())
    return found


def render(kind: type = Config) -> str:
    """Return the whole page, as Markdown."""
    return "\n".join([_HEAD, *(line for section in sections(kind) for line in _lines(section))])


def _lines(section: Section) -> Iterator[str]:
    kind = section.kind
    yield f"## `{section.place}`\n" if section.place else "## The file\n"
    yield f"{' '.join((inspect.getdoc(kind) or '').split())}\n"
    yield "| key | value | default | live | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    said = meanings(kind)
    for key, field, field_kind in fields_of(kind):
        cells = (
            f"`{key}`",
            _value(field_kind),
            _default(field, field_kind),
            "yes" if section.is_live or is_live(field_kind) else "",
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, said.get(field.name, ""))) + " |"
    yield ""


def _section_in(kind: Any) -> tuple[type | None, str]:
    """Return the section in a field, and the suffix of its place: none, `[]` for a list, `.NAME` for a mapping."""
    kind, marks = unwrapped(kind)
    if any(isinstance(mark, Leaf) for mark in marks):
        return None, ""
    if dataclasses.is_dataclass(kind):
        return typing.cast("type", kind), ""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    shape = {tuple: "[]", dict: ".NAME"}.get(origin)
    if shape is None:
        return None, ""
    below, more = _section_in(arguments[0 if origin is tuple else 1])
    return below, shape + more


def _value(kind: Any) -> str:
    """Describe the allowed values."""
    kind, marks = unwrapped(kind)
    for mark in marks:
        if isinstance(mark, Leaf):
            return mark.expected
    if dataclasses.is_dataclass(kind):
        return "a section, see below"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return f"a mapping: {_value(arguments[0])} → {_value(arguments[1])}"
    item = _value(arguments[0])
    return f"one or a list of: {item}" if any(isinstance(mark, OneOrMore) for mark in marks) else f"a list of: {item}"


def _default(field: "dataclasses.Field[Any]", kind: Any) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "**required**"
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    shown = encode(kind, value)
    if shown is None or shown in ([], {}) or isinstance(shown, dict):
        return ""
    text = yaml.safe_dump(shown, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    return f"`{text}`"


if __name__ == "__main__":
    sys.stdout.write(render())
