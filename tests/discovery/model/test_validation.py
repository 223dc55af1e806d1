"""Validation: all errors of plain data, with their paths."""

from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.validation import Fault, child, shape_faults, shown


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    port: int
    names: list[str] = []


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    one: Inner
    many: dict[str, list[Inner]] = {}
    maybe: str | None = None
    flag: bool = False
    choice: bool | Literal["v1", "v2"] = False


def faults(value: object) -> list[str]:
    return [str(fault) for fault in shape_faults(value, Outer)]


def test_all_errors_are_reported() -> None:
    value = {
        "one": {"port": "x", "names": ["a", 1, None], "prot": 1},
        "many": {"a b": [{"port": True}, 3], 7: []},
        "flag": 1,
        "maybe": [],
        "choice": "v3",
        3: 4,
    }
    assert faults(value) == [
        "$.one.port: expected an integer, got 'x'",
        "$.one.names[1]: expected a string, got 1",
        "$.one.names[2]: expected a string, got null",
        "$.one.prot: expected one of port, names, got an unknown key",
        '$.many["a b"][0].port: expected an integer, got true',
        '$.many["a b"][1]: expected a mapping, got 3',
        "$.many[7]: expected a string as key, got 7",
        "$.flag: expected true or false, got 1",
        "$.maybe: expected a string, got a list",
        "$.choice: expected true or false or v1 or v2, got 'v3'",
        "$[3]: expected one of one, many, maybe, flag, choice, got an unknown key",
    ]
    assert faults({"one": {}}) == ["$.one.port: expected a value, got nothing"]
    assert faults(None) == ["$: expected a mapping, got null"]
    assert faults({"one": {"port": 1}, "many": []}) == ["$.many: expected a mapping, got a list"]
    assert faults({"one": {"port": 1, "names": "ab"}}) == ["$.one.names: expected a list, got 'ab'"]


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["one", "port", "x", "v1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["one", "port", "names", "many", "maybe", "flag", "choice", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(plain)
def test_a_value_is_valid_exactly_if_msgspec_accepts_it(value: object) -> None:
    found = list(shape_faults(value, Outer))
    try:
        msgspec.convert(value, Outer)
    except msgspec.ValidationError:
        assert found
    else:
        assert not found


@pytest.mark.parametrize("value", ["x" * 1000, "a\nb", 1.5, {}, [], b"x", object(), "\u202e"])
def test_values_are_shown_short_on_one_line(value: object) -> None:
    assert shown(10**5000) == "a huge number"
    text = shown(value)
    assert len(text) <= 80
    assert text.isprintable()


def test_paths() -> None:
    assert child("$", "a_b1") == "$.a_b1"
    assert child("$", "a-b") == '$["a-b"]'
    assert child("$", "") == '$[""]'
    assert str(Fault("$.a", "b")) == "$.a: expected b"
