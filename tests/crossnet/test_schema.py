"""Documents against dataclasses: every fault, in the order of the file, and rules only where their fields are right."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from crossnet.document import Plain
from crossnet.scalars import Count, Duration, Text
from crossnet.schema import OneOrMore, decode, encode, key, rule
from discovery.shape import Fault


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


def test_faults_at_every_depth_are_told_together() -> None:
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


def test_a_rule_speaks_beside_other_faults_and_never_of_wrong_fields() -> None:
    assert faults({"wait": 1, "inner": {"low": 5, "high": 1}}) == [
        "$.wait: expected a duration such as 5s, 250ms or 2m, got 1",
        "$.inner.high: expected 5 or more, got 1",
    ]
    assert faults({"inner": {"low": 5, "high": "x"}}) == ["$.inner.high: expected a whole number 0-1000000, got 'x'"]
