"""YAML files: plain data, bounded, and one clear place for what is wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.shape import Fault
from discovery.yamlfile import BadFile, load_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("{}", {}),
        ("a: 1", {"a": 1}),
        ("8443: [x]", {8443: ["x"]}),
        ('{"a": {"b": null}}', {"a": {"b": None}}),
    ],
)
def test_plain_data(text: str, value: object) -> None:
    assert parse_yaml(text, "F") == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3", "F: line 3, column 1: expected plain YAML, got 'a' stands twice"),
        ("a: {b: 1, b: 2}", "F: line 1, column 11: expected plain YAML, got 'b' stands twice"),
        ("a: &x [1]\nb: *x", "F: line 2, column 4: expected plain YAML, got an alias"),
        ("a: !!python/object:os.system x", "F: line 1, column 4: expected plain YAML, got a tag"),
        ("a: !!int x", "F: line 1, column 4: expected plain YAML, got a tag"),
        ("[" * 100_000, "F: line 1, column 33: expected plain YAML, got more than 32 levels"),
        ("- " * 100_000, "F: line 1, column 65: expected plain YAML, got more than 32 levels"),
        ("a: [", "F: line 2, column 1: expected plain YAML, got "),
        ("? [a]\n: 1", "F: line 1, column 3: expected plain YAML, got "),
        ("a: 2001-13-45", "F: $: expected plain YAML, got "),
        ("a: 1\n---\nb: 1", "F: line 2, column 1: expected plain YAML, got "),
        ("\x00", "F: $: expected plain YAML, got "),
    ],
)
def test_the_rest_is_refused_with_its_place(text: str, told: str) -> None:
    with pytest.raises(BadFile) as caught:
        parse_yaml(text, "F")
    assert str(caught.value).startswith(told)


@given(
    st.one_of(st.text(max_size=60), st.binary(max_size=60), st.text(alphabet="[]{}:,-?*&!|> \n'\"#ab1", max_size=60))
)
def test_garbage_gives_badfile_only(text: str | bytes) -> None:
    try:
        parse_yaml(text, "F")
    except BadFile:
        pass


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.yaml"
    with pytest.raises(BadFile, match=r"f.yaml: \$: expected a readable file, got No such file"):
        load_yaml(path)
    path.write_text("a: 1")
    assert load_yaml(path) == {"a": 1}
    monkeypatch.setattr("discovery.yamlfile.MAX_FILE", 3)
    with pytest.raises(BadFile, match="at most 3 bytes"):
        load_yaml(path)


def test_every_fault_has_a_line() -> None:
    error = BadFile("F", [Fault("$.a", "b", "c"), Fault("$.d", "e")])
    assert str(error) == "F: $.a: expected b, got c\nF: $.d: expected e"
