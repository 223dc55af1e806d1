"""`crossnet token`: what it prints where. That a server accepts such a token is tested in test_records.py."""

import json

import pytest

from crossnet.cli.tokens import ROLE_KINDS, new_command
from discovery.api.tokens import hash_token


def test_the_token_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert new_command(name="gw", network="b", kinds=["allocation"], names=[], admin=False) == 0
    captured = capsys.readouterr()
    (token,) = captured.out.split()
    assert hash_token(token) in captured.err
    assert token not in captured.err


def test_an_admin_needs_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert new_command(name="", network=None, kinds=[], names=[], admin=True) == 0
    assert '"admin":true' in capsys.readouterr().err


def test_a_certificate_has_an_entry_and_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    uri = "spiffe://mesh.example/b/gw"
    assert new_command(name="gw", network="b", kinds=["gateway"], names=[], admin=False, certificate=uri) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f'"certificate":"{uri}"' in captured.err
    assert "hash" not in captured.err


@pytest.mark.parametrize("role", ["relay", "gateway", "dns", "turn"])
def test_a_role_has_the_kinds_that_it_writes(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert new_command(name="", network="b", kinds=[], names=[], admin=False, roles=[role]) == 0
    entry = json.loads(capsys.readouterr().err.partition("\n- ")[2])
    assert entry["kinds"] == [str(kind) for kind in ROLE_KINDS[role]]


def test_several_roles_in_one_process_have_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    made = new_command(name="", network="b", kinds=["vip"], names=["*.b"], admin=False, roles=["relay", "publisher"])
    assert made == 0
    entry = json.loads(capsys.readouterr().err.partition("\n- ")[2])
    assert entry["kinds"] == ["vip", "relay", "turn", "service"]


@pytest.mark.parametrize(
    ("given", "words"),
    [({}, "it could write nothing"), ({"roles": ["publisher"]}, "no service"), ({"kinds": ["service"]}, "no service")],
)
def test_a_token_that_could_write_nothing_is_not_made(
    given: dict[str, list[str]], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new_command(**({"name": "", "network": "b", "kinds": [], "names": [], "admin": False} | given)) == 2  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
