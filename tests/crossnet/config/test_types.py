"""Durations and sizes survive a round trip; invalid ones are refused."""

import math
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossnet.config.schema import Leaf, Mismatch
from crossnet.config.types import (
    MAX_DURATION_S,
    DurationOrOff,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

(LIMIT,) = (mark for mark in get_args(DurationOrOff) if isinstance(mark, Leaf))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5s", 5.0),
        ("1d", 86400.0),
        ("0.5d", 43200.0),
        ("7d", MAX_DURATION_S),
        ("250ms", 0.25),
        ("2m", 120.0),
        ("1h", 3600.0),
        ("1.5s", 1.5),
        ("0s", 0.0),
        ("168h", MAX_DURATION_S),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value", ["5", "5 s", "-5s", "s", "5S", "5s ", "1e3s", "٣s", "169h", "8d", "off", "D", "", 5, True, None, [], {}]
)
def test_no_durations(value: object) -> None:
    with pytest.raises(Mismatch):
        parse_duration(value)  # type: ignore[arg-type]


@given(st.integers(0, int(MAX_DURATION_S * 1000)))
def test_a_duration_reads_back(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


@pytest.mark.parametrize(("text", "seconds"), [("off", math.inf), ("1d", 86_400.0), ("90m", 5400.0)])
def test_a_limit_that_may_be_off(text: str, seconds: float) -> None:
    assert LIMIT.parse(text, Path()) == seconds
    assert LIMIT.show(seconds) == text


@pytest.mark.parametrize("value", ["Off", "none", "0s", 0, False, None, "", "8d"])
def test_no_limit_that_may_be_off(value: object) -> None:
    with pytest.raises(Mismatch):
        LIMIT.parse(value, Path())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"), [("64KiB", 65536), ("1MiB", 1 << 20), ("2GiB", 2 << 30), ("7B", 7), ("7", 7), (7, 7), ("0", 0)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("value", ["64kb", "64 KiB", "1.5MiB", "-1", -1, True, None, [], ""])
def test_no_sizes(value: object) -> None:
    with pytest.raises(Mismatch):
        parse_size(value)  # type: ignore[arg-type]


@given(st.integers(0, 1 << 40))
def test_a_size_reads_back(size: int) -> None:
    assert parse_size(format_size(size)) == size
