"""`crossnet name`: both forms of a target, and what a name means."""

import json

import pytest

from crossnet.cli.names import decode_command, encode_command

D = "svc.mesh.internal"


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("10.1.0.5:8443", [f"p8443-10-1-0-5.b.{D}", f"_8443._10-1-0-5._b.{D}"]),
        ("[fd00::5]:443", [f"p443-xfd000000000000000000000000000005.b.{D}", f"_443._fd00--5._b.{D}"]),
        ("orders.shop:8443", [f"p8443-orders.shop.b.{D}", f"_8443.orders.shop._b.{D}"]),
        (f"{'x' * 60}.shop:8443", [f"_8443.{'x' * 60}.shop._b.{D}"]),
    ],
)
def test_both_forms_are_printed_and_read_back(
    capsys: pytest.CaptureFixture[str], target: str, names: list[str]
) -> None:
    assert encode_command(target, "b", D) == 0
    assert capsys.readouterr().out.splitlines() == names
    assert decode_command(names, D, as_json=True) == 0
    meanings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [meaning["mangled"] for meaning in meanings] == [names[-1]] * len(names)
    assert {meaning["network"] for meaning in meanings} == {"b"}


@pytest.mark.parametrize(
    "target", ["10.1.0.5", "10.1.0.5:0", "10.1.0:80", "orders:80", "fd00::5:80", "a.b:x", "", "a b.c:1"]
)
def test_an_invalid_target_fails_with_one_line(capsys: pytest.CaptureFixture[str], target: str) -> None:
    assert encode_command(target, "b", D) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_each_name_gets_its_meaning_and_one_bad_one_fails_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_command(["orders.example", f"b.{D}"], D, as_json=False) == 1
    captured = capsys.readouterr()
    assert "plain" in captured.out
    assert captured.err.startswith("crossnet name: incomplete: ")
