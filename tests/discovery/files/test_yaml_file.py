"""YAML files of users, and of attackers."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from discovery.files.yaml_file import MAX_FILE_BYTES, BadFile, parse_document, read_document, read_records
from discovery.model.validation import Fault


def values(text: str) -> object:
    value, faults = parse_document(text.encode(), "F")
    assert faults == []
    return value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("a: no", {"a": "no"}),
        ("a: 10:30", {"a": "10:30"}),
        ("a: 017", {"a": "017"}),
        ("a: 0x10", {"a": "0x10"}),
        ("a: 1_000", {"a": "1_000"}),
        ("a: 1.5", {"a": "1.5"}),
        ("a: 2026-11-22", {"a": "2026-11-22"}),
        ("a: [1, -2, 0, true, false, null, ~, ]", {"a": [1, -2, 0, True, False, None, None]}),
        ("a: ['1', \"true\", '~']", {"a": ["1", "true", "~"]}),
        ("8443: [x]", {"8443": ["x"]}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)
def test_plain_values_are_what_they_look_like(text: str, expected: object) -> None:
    assert values(text) == expected


def test_duplicate_keys_are_reported() -> None:
    value, faults = parse_document(b"a: 1\nb: {c: 1, c: 2}\na: 3\n", "F")
    assert value == {"a": 1, "b": {"c": 1}}
    assert [str(fault) for fault in faults] == [
        "$.b.c: expected each key once, got it again in line 2, column 11",
        "$.a: expected each key once, got it again in line 3, column 1",
    ]


def test_a_list_is_not_a_valid_key() -> None:
    _, faults = parse_document(b"? [1]\n: 2", "F")
    assert [str(fault) for fault in faults] == [
        "$: expected plain keys, got a list or mapping as a key in line 1, column 3"
    ]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"a: [1", "$: expected YAML, got "),
        (b"a: \x00", "$: expected YAML, got unacceptable character"),
        (b"\xff", "$: expected UTF-8, got byte 0xff at 0"),
        (b"a: &x 1\nb: *x", "$: expected no aliases, got one in line 2, column 4"),
        (b"a: !!python/object:os.system [1]", "$: expected no tags, got "),
        (b"a\n---\nb", "$: expected YAML, got "),
        (b"[" * 100_000, "$: expected at most 32 levels, got more"),
        (b"- " * 100_000, "$: expected at most 32 levels, got more"),
        (b"- 1\n" * 60_000, "$: expected at most 50000 values, got more"),
    ],
)
def test_invalid_yaml_is_refused_with_its_place(data: bytes, told: str) -> None:
    with pytest.raises(BadFile) as refused:
        parse_document(data, "F")
    assert str(refused.value).startswith(f"F: {told}")
    assert "\n" not in str(refused.value)


def test_an_alias_bomb_is_refused_before_it_is_expanded() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(BadFile, match="no aliases"):
        parse_document(bomb.encode(), "F")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"\$: expected a readable file, got No such file or directory"):
        read_document(tmp_path / "absent.yaml")


@given(st.binary(max_size=200) | st.text(alphabet="ab:-?![]{}&*#'\"\n \t|>%@", max_size=80).map(str.encode))
@example(b"%YAML 9.9\n--- a")
@example(b"? ? ?")
@example(b"!<x> a")
def test_any_input_gives_a_value_or_badfile(data: bytes) -> None:
    told = ""
    try:
        parse_document(data, "F")
    except BadFile as error:
        told = str(error)
    assert "\n" not in told


def test_records_may_be_larger_than_configurations(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(BadFile, match="at most 1024 KiB"):
        read_document(path)
    assert read_records(path) is None
    path.write_text("- 1\n" * 60_000)
    with pytest.raises(BadFile, match="at most 50000 values"):
        read_document(path)
    assert read_records(path) == [1] * 60_000


def test_every_error_has_a_line(tmp_path: Path) -> None:
    error = BadFile("F", [Fault("$.a", "b", "c"), Fault("$.d", "e")])
    assert str(error) == "F: $.a: expected b, got c\nF: $.d: expected e"
    path = tmp_path / "f.yaml"
    path.write_text("a: 1\na: 2\nb: {c: 1, c: 2}")
    with pytest.raises(BadFile) as refused:
        read_records(path)
    assert [fault.path for fault in refused.value.faults] == ["$.a", "$.b.c"]
