"""Loads and prints the configuration file: one YAML file, any set of roles. `load` reports all of its errors."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from crossnet.config.file_values import Secret
from crossnet.config.schema import decode, encode
from crossnet.config.sections import Config
from crossnet.config.sections.policy import RuleSection
from discovery.files.yaml_file import BadFile, read_document
from discovery.model.names import BadName, is_under
from discovery.model.names import decode as decode_name
from discovery.model.validation import Fault, child


class ConfigError(Exception):
    """A configuration file cannot be used; `faults` has all reasons."""

    def __init__(self, path: Path, faults: list[Fault]) -> None:
        super().__init__("\n".join(f"{path}: {fault}" for fault in faults))
        self.path = path
        self.faults = faults


def load(path: Path) -> Config:
    """Read a configuration file.

    Raises:
        ConfigError: the file has errors; all of them are listed.
    """
    try:
        document, faults = read_document(path)
    except BadFile as error:
        raise ConfigError(path, [*error.faults]) from error
    config, more = decode(Config, document, path.absolute().parent)
    if faults or more or config is None:
        raise ConfigError(path, [*faults, *more])
    return config


def warnings(config: Config) -> list[str]:
    """Return warnings about settings that are allowed but probably not intended. Each begins with a path in the file."""
    found = [
        f"{where}: {secret.path} is readable by every user of this machine"
        for where, secret in _secrets(config, "$")
        if secret.readable_by_all
    ]
    ours = [section.source for section in config.keys.values()]
    if config.relay is not None and config.static_mesh is None and config.network not in ours:
        found.append(f"$.keys: none is from {config.network!r}: the relay can reach no other network")
    if config.gateway is not None and config.network not in [section.to for section in config.keys.values()]:
        found.append(f"$.keys: none is to {config.network!r}: the gateway can take no stream")
    for role, section in (("relay", config.relay), ("gateway", config.gateway)):
        found += _names_of_nothing(role, section.rules if section is not None else (), config.domain)
    if config.insecure:
        found.append("$.insecure: discovery may be spoken to without TLS; tokens and records travel in the clear")
    return found


def _names_of_nothing(role: str, rules: Iterable[RuleSection], domain: str) -> Iterator[str]:
    """Yield a warning for each name in rules that is below the mesh domain but cannot be the name of a target."""
    for index, section in enumerate(rules):
        for number, item in enumerate(section.to):
            if "*" not in item and is_under(item, domain):
                try:
                    decode_name(item, domain)
                except BadName as error:
                    yield f"$.{role}.rules[{index}].to[{number}]: matches nothing: {error.detail}"


def effective(config: Config) -> str:
    """Return the whole configuration as YAML, with all defaults, and secrets as ***."""
    return yaml.safe_dump(encode(Config, config), sort_keys=False, default_flow_style=None, width=120)


def _secrets(value: object, path: str) -> Iterator[tuple[str, Secret]]:
    if isinstance(value, Secret):
        yield path, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            name = field.metadata.get("key", field.name)
            yield from _secrets(getattr(value, field.name), child(path, name))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _secrets(item, child(path, name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _secrets(item, f"{path}[{index}]")
