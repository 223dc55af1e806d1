"""YAML files as people write them: bounded, plain data only, and every fault told with its place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from discovery.shape import Fault, shown

MAX_FILE = 16 * 1024 * 1024  # a mesh of ten thousand services has some 2 MB
MAX_DEPTH = 32  # our files nest five deep


class BadFile(ValueError):
    """A file that is refused, with every fault in it; `str()` has one line for each."""

    def __init__(self, path: str, faults: Sequence[Fault]) -> None:
        """Hold all faults of a file."""
        super().__init__("\n".join(f"{path}: {fault}" for fault in faults))
        self.path = path
        self.faults = tuple(faults)


class _Loader(yaml.CSafeLoader):
    """Plain data only; a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice, which YAML forbids and PyYAML lets through."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                if key in seen:
                    raise yaml.MarkedYAMLError(problem=f"{shown(key)} stands twice", problem_mark=key_node.start_mark)
                seen.add(key)
            except TypeError:
                pass  # told below by PyYAML: a mapping or a list is no key
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> Any:
    """Read a YAML file as plain data; None if it is empty. Raises BadFile."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise BadFile(str(path), [Fault("$", "a readable file", error.strerror or str(error))]) from None
    if len(data) > MAX_FILE:
        raise BadFile(str(path), [Fault("$", f"at most {MAX_FILE} bytes", "more")])
    return parse_yaml(data, str(path))


def parse_yaml(data: bytes | str, name: str) -> Any:
    """Read YAML text as plain data; `name` says whose it is. Raises BadFile."""
    try:
        _check_events(data, name)
        return yaml.load(data, _Loader)  # noqa: S506 - a safe loader, with less in it
    except yaml.MarkedYAMLError as error:
        place = _place(error.problem_mark or error.context_mark)
        raise BadFile(name, [Fault(place, "plain YAML", error.problem or "something else")]) from None
    except BadFile:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise BadFile(name, [Fault("$", "plain YAML", str(error).partition("\n")[0][:200])]) from None


def _check_events(data: bytes | str, name: str) -> None:
    """Refuse what must not reach the loader.

    Deep nesting crashes libyaml's composer, nine aliases can mean a billion values, and a tag makes a constructor read
    what it does not expect.
    """
    depth = 0
    for event in yaml.parse(data, yaml.CSafeLoader):
        what = None
        if isinstance(event, yaml.AliasEvent):
            what = "an alias"
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag not in (None, "!"):
            what = "a tag"
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                what = f"more than {MAX_DEPTH} levels"
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if what is not None:
            raise BadFile(name, [Fault(_place(event.start_mark), "plain YAML", what)])


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else "$"
