"""`crossnet token`: what it prints where. That a server takes such a token is in test_records.py."""

import pytest

from crossnet.tokens import new_command
from discovery.tokens import hash_token


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
