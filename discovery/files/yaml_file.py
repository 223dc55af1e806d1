"""YAML files that people write: of limited size, with only mappings, lists and plain values. Each error has its place.

YAML's surprising features are disabled, since they break configurations: `no` is the text "no", `10:30` and `017` are text,
`8443:` is the key "8443". Aliases are refused (a few lines can expand to gigabytes), and so are duplicate keys. The
configuration, tokens files and mesh.yaml are all read by this module.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import yaml

from discovery.model.validation import Fault, child, shown

MAX_FILE_BYTES = 1024 * 1024
"""A configuration of a thousand lines has 50 KiB; a file larger than this is the wrong one."""

MAX_NODES = 50_000

MAX_RECORDS_BYTES = 16 * 1024 * 1024
"""A mesh of ten thousand services has some 2 MB, a tokens file of a thousand networks less."""

MAX_RECORDS_NODES = 2_000_000

MAX_DEPTH = 32
"""The deepest path in our files has 6 steps. libyaml's composer crashes at a depth far beyond this limit."""

Plain: TypeAlias = "bool | int | str | list[Plain] | dict[str, Plain] | None"


class BadFile(ValueError):
    """A file that is refused, with all errors in it. `str()` has one line for each."""

    def __init__(self, path: str, faults: Sequence[Fault]) -> None:
        """`faults` are all errors of the file."""
        super().__init__("\n".join(f"{path}: {fault}" for fault in faults))
        self.path = path
        self.faults = tuple(faults)


def read_document(
    path: Path, *, max_bytes: int = MAX_FILE_BYTES, max_nodes: int = MAX_NODES
) -> tuple[Plain, list[Fault]]:
    """Read one YAML file. Returns its value, and the places that break the rules above but do not prevent reading the rest.

    Raises:
        BadFile: there is no value: the file cannot be read, is too large, or is not valid YAML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise BadFile(str(path), [Fault("$", "a readable file", error.strerror or str(error))]) from error
    if len(data) > max_bytes:
        raise BadFile(str(path), [Fault("$", f"at most {max_bytes // 1024} KiB", "more")])
    return parse_document(data, str(path), max_nodes=max_nodes)


def read_records(path: Path) -> Plain:
    """Read a YAML file that may be large. Returns None if it is empty. Raises BadFile with all errors in it."""
    value, faults = read_document(path, max_bytes=MAX_RECORDS_BYTES, max_nodes=MAX_RECORDS_NODES)
    if faults:
        raise BadFile(str(path), faults)
    return value


def parse_document(data: bytes, name: str, *, max_nodes: int = MAX_NODES) -> tuple[Plain, list[Fault]]:
    """Parse bytes as `read_document` does; `name` is used in errors."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadFile(name, [Fault("$", "UTF-8", f"byte 0x{data[error.start]:02x} at {error.start}")]) from error
    try:
        fault = _refused(text, max_nodes)
        node = yaml.compose(text, yaml.CSafeLoader) if fault is None else None
    except yaml.MarkedYAMLError as error:
        what = error.problem or error.context or "something else"
        raise BadFile(name, [Fault("$", "YAML", f"{what}{_place(error.problem_mark)}")]) from error
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # a control character, which has no line; a surrogate, which libyaml refuses
        raise BadFile(name, [Fault("$", "YAML", str(error).splitlines()[0][:200])]) from error
    if fault is not None:
        raise BadFile(name, [fault])
    faults: list[Fault] = []
    return (None if node is None else _value(node, "$", faults)), faults


def _refused(text: str, max_nodes: int) -> Fault | None:
    """Return what must not reach the composer, since it recurses and expands aliases; None if there is nothing."""
    depth = nodes = 0
    for event in yaml.parse(text, yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            return Fault("$", "no aliases", f"one{_place(event.start_mark)}")
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if not isinstance(event, yaml.NodeEvent):
            continue
        if event.tag is not None:  # type: ignore[attr-defined]
            return Fault("$", "no tags", f"{shown(event.tag)}{_place(event.start_mark)}")  # type: ignore[attr-defined]
        nodes += 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if depth > MAX_DEPTH:
            return Fault("$", f"at most {MAX_DEPTH} levels", "more")
        if nodes > max_nodes:
            return Fault("$", f"at most {max_nodes} values", "more")
    return None


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
    plain = isinstance(node, yaml.ScalarNode) and not node.style
    return _plain(text) if plain else text


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
