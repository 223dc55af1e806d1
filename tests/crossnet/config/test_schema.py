"""Documents against dataclasses: all errors, in the order of the file, and rules only if their fields are valid."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from hypothesis import given, settings
from hypothesis import strategies as st

from crossnet.config.schema import OneOrMore, decode, encode, key, rule
from crossnet.config.sections import Config
from crossnet.config.types import Count, Duration, Text
from discovery.files.yaml_file import Plain
from discovery.model.validation import Fault


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    low: Count = 0
    high: Count

    @rule("low", "high")
    def _order(self) -> Iterator[Fault]:
        if self.low > self.high:
            yield Fault(".high", f"{self.low} or more", str(self.high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    wait_s: Duration = 1.0
    sources: tuple[Text, ...] = dataclasses.field(default=(), metadata=key("from"))
    loose: Annotated[tuple[Count, ...], OneOrMore()] = ()
    inner: Inner | None = None
    named: dict[Text, Inner] = dataclasses.field(default_factory=dict)


def faults(document: Plain) -> list[str]:
    made, found = decode(Outer, document, Path())
    assert (made is None) == bool(found)
    return [str(fault) for fault in found]


def test_a_good_document_and_back() -> None:
    document: Plain = {
        "wait": "250ms",
        "from": ["a"],
        "loose": [3],
        "inner": {"low": 1, "high": 2},
        "named": {"x": {"low": 0, "high": 9}},
    }
    made, found = decode(Outer, document, Path())
    assert found == []
    assert made == Outer(
        wait_s=0.25, sources=("a",), loose=(3,), inner=Inner(low=1, high=2), named={"x": Inner(high=9)}
    )
    assert encode(Outer, made) == document


def test_one_item_needs_no_brackets_where_that_is_said() -> None:
    made, found = decode(Outer, {"loose": 3}, Path())
    assert (made, found) == (Outer(loose=(3,)), [])
    assert faults({"from": "a"}) == ["$.from: expected a list, got 'a'"]


def test_errors_at_every_depth_are_reported_together() -> None:
    assert faults({"wait": 1, "waitt": 2, "inner": {"low": -1}, "named": {"x": {"high": "y"}, "z": None}}) == [
        "$.waitt: expected a known key such as wait, got an unknown key",
        "$.wait: expected a duration such as 5s, 250ms or 2m, got 1",
        "$.inner.low: expected a whole number 0-1000000, got -1",
        "$.inner.high: expected a whole number 0-1000000, got nothing",
        "$.named.x.high: expected a whole number 0-1000000, got 'y'",
        "$.named.z: expected a mapping, got null",
    ]


def test_an_unknown_key_like_none_names_them_all() -> None:
    assert faults({"zzz": 1}) == ["$.zzz: expected one of wait, from, loose, inner, named, got an unknown key"]


def test_a_rule_applies_beside_other_errors_but_not_to_invalid_fields() -> None:
    assert faults({"wait": 1, "inner": {"low": 5, "high": 1}}) == [
        "$.wait: expected a duration such as 5s, 250ms or 2m, got 1",
        "$.inner.high: expected 5 or more, got 1",
    ]
    assert faults({"inner": {"low": 5, "high": "x"}}) == ["$.inner.high: expected a whole number 0-1000000, got 'x'"]


WORDS = st.sampled_from(
    [
        "network",
        "relay",
        "listen",
        "allow",
        "keys",
        "gateway",
        "turn",
        "dns",
        "token",
        "discovery",
        "file",
        "import",
        "id",
        "names",
        "from",
        "to",
        "turn_servers",
        "url",
        "discovery_server",
        "tokens",
        "tls",
        "cert",
        "log",
        "issue",
        "search",
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.sampled_from(
    ["a", "10.0.0.1:443", "10.0.0.0/8", "5s", "svc.mesh.internal", "http://127.0.0.1:1", "turn:h", "memory", "mesh.yaml"]
)  # fmt: skip
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=6),
    max_leaves=30,
)


@settings(max_examples=300)
@given(st.dictionaries(WORDS, DOCUMENTS, max_size=8))
def test_any_document_gives_a_configuration_or_errors_of_one_line(document: dict[str, Plain]) -> None:
    made, found = decode(Config, document, Path("/nowhere"))
    assert (made is None) == bool(found)
    for fault in found:
        assert str(fault).startswith("$")
        assert len(str(fault).splitlines()) == 1
    if made is not None:
        encode(Config, made)
