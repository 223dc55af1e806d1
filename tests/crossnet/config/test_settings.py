"""Every setting has one declaration, with a docstring, and is used somewhere."""

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import crossnet
from crossnet.app.role_configs import adapted
from crossnet.config.reference import meanings, render, sections
from crossnet.config.sections import Config
from discovery.api import DiscoveryServerConfig
from discovery.publisher import PublisherConfig
from dnsgw.config import DnsConfig
from sniproxy.relay.relay import RelayConfig
from turnreg.gateway.gateway import GatewayConfig
from turnreg.registrar.config import RegistrarConfig
from turnreg.server.config import TurnServerConfig

ROOT = Path(crossnet.__file__).parent
COPIED = {
    "RelaySection": (RelayConfig,),
    "DnsSection": (DnsConfig,),
    "GatewaySection": (GatewayConfig, RegistrarConfig),
    "TurnSection": (TurnServerConfig,),
    "DiscoveryServerSection": (DiscoveryServerConfig,),
    "PublisherSection": (PublisherConfig,),
}
"""What copies the fields of a section by their names (`adapted`)."""


@functools.cache
def read_names() -> set[str]:
    """Every attribute that is read anywhere in crossnet."""
    trees = (ast.parse(path.read_text()) for path in ROOT.rglob("*.py"))
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def fields() -> Iterator[tuple[type, str]]:
    for kind in dict.fromkeys(section.kind for section in sections()):
        for field in dataclasses.fields(kind):
            yield kind, field.name


@pytest.mark.parametrize(("kind", "name"), list(fields()), ids=lambda value: getattr(value, "__name__", value))
def test_something_goes_by_it(kind: type, name: str) -> None:
    copied = {field.name for made in COPIED.get(kind.__name__, ()) for field in dataclasses.fields(made)}
    assert name in copied or name in read_names()


@pytest.mark.parametrize(("kind", "name"), list(fields()), ids=lambda value: getattr(value, "__name__", value))
def test_every_setting_has_a_docstring(kind: type, name: str) -> None:
    assert meanings(kind).get(name, "").endswith((".", "…")), f"a docstring below {kind.__name__}.{name}"


def test_the_reference_is_up_to_date() -> None:
    there = (ROOT.parent / "docs" / "configuration.md").read_text()
    assert there == render(Config), "run `make docs`"


def test_a_missing_field_of_a_role_is_an_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Section:
        pool: int = 3
        other: int = 4

    @dataclasses.dataclass(frozen=True)
    class Needs:
        pool: int
        network: str
        kept: int = 1

    assert adapted(Needs, Section(), network="a") == Needs(pool=3, network="a")
    with pytest.raises(TypeError, match="network"):
        adapted(Needs, Section())
    with pytest.raises(TypeError, match="misspelt"):
        adapted(Needs, Section(), network="a", misspelt=1)
