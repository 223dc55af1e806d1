"""Reading a YAML file that a person wrote: bounded, with nothing in it but mappings, lists and plain values.

YAML's surprises are left out, since each has broken somebody's configuration: `no` stays the text "no", `10:30` and
`017` stay text, aliases are refused (a few lines of them unfold into gigabytes), and so is a key that is there twice.
"""

import re
from pathlib import Path
from typing import Protocol, TypeAlias

import yaml

from discovery.shape import Fault, child, shown

MAX_FILE_BYTES = 1024 * 1024
"""A configuration of a thousand lines has 50 KiB; more than this is the wrong file."""

MAX_DEPTH = 32
"""The deepest path of a configuration has 6 steps; PyYAML recurses once a step."""

MAX_NODES = 50_000

Plain: TypeAlias = "bool | int | str | list[Plain] | dict[str, Plain] | None"


class DocumentError(Exception):
    """Nothing can be said of what is in the file: it cannot be read, is too large, or is not YAML at all."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def read_document(path: Path) -> tuple[Plain, list[Fault]]:
    """Read one YAML file; the faults are the places where it is not of the kind above.

    Raises:
        DocumentError: there is no value to look at.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DocumentError(Fault("$", "a readable file", error.strerror or str(error))) from error
    return parse_document(data)


def parse_document(data: bytes) -> tuple[Plain, list[Fault]]:
    """As `read_document`, of bytes."""
    if len(data) > MAX_FILE_BYTES:
        raise DocumentError(Fault("$", f"at most {MAX_FILE_BYTES // 1024} KiB", "more"))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DocumentError(Fault("$", "UTF-8", f"byte 0x{data[error.start]:02x} at {error.start}")) from error
    try:
        composer = _Composer(text)
        try:
            node = composer.get_single_node()
        finally:
            composer.dispose()
    except yaml.MarkedYAMLError as error:
        what = error.problem or error.context or "something else"
        raise DocumentError(Fault("$", "YAML", f"{what}{_place(error.problem_mark)}")) from error
    except yaml.YAMLError as error:  # a control character, which has no line
        raise DocumentError(Fault("$", "YAML", str(error).splitlines()[0])) from error
    faults: list[Fault] = []
    return (None if node is None else _value(node, "$", faults)), faults


class _Composer(yaml.SafeLoader):
    """PyYAML up to its node tree, which still has every key; values are made of it below."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise DocumentError(Fault("$", "no aliases", f"one{_place(event.start_mark)}"))
        if getattr(event, "tag", None) is not None:
            raise DocumentError(Fault("$", "no tags", f"{shown(event.tag)}{_place(event.start_mark)}"))
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH:
            raise DocumentError(Fault("$", f"at most {MAX_DEPTH} levels", "more"))
        if self._nodes > MAX_NODES:
            raise DocumentError(Fault("$", f"at most {MAX_NODES} values", "more"))
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _value(node: yaml.Node, path: str, faults: list[Fault]) -> Plain:
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Plain] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                faults.append(Fault(path, "plain keys", f"a list or mapping as a key{_place(key_node.start_mark)}"))
                continue
            key = str(key_node.value)
            if key in mapping:
                faults.append(Fault(child(path, key), "each key once", f"it again{_place(key_node.start_mark)}"))
                continue
            mapping[key] = _value(value_node, child(path, key), faults)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, f"{path}[{index}]", faults) for index, item in enumerate(node.value)]
    text = str(node.value)
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return text if quoted else _plain(text)


def _plain(text: str) -> Plain:
    if text in {"", "~", "null"}:
        return None
    if text in {"true", "false"}:
        return text == "true"
    if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text):
        return int(text)
    return text


class _Mark(Protocol):
    line: int
    column: int


def _place(mark: _Mark | None) -> str:
    return "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
