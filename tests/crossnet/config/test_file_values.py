"""Secrets and certificates are read from files of their own, within bounds, and never printed."""

from pathlib import Path

import pytest

from crossnet.config.file_values import (
    MAX_CERTIFICATES_BYTES,
    MAX_SECRET_BYTES,
    Secret,
    certificates_file,
    key_file,
    secret_file,
)
from crossnet.config.schema import Mismatch


def test_a_secret_shows_itself_nowhere() -> None:
    secret = Secret(Path("token"), b"hush")
    assert "hush" not in f"{secret} {secret!r} {[secret]}"


def test_a_secret_is_one_line_of_text(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"hush\r\n")
    assert secret_file({"file": "token"}, tmp_path).text == "hush"
    for data in (b"", b"\n", b"two\nlines\n", "grüße".encode(), b"x" * (MAX_SECRET_BYTES + 1)):
        (tmp_path / "token").write_bytes(data)
        with pytest.raises(Mismatch) as error:
            secret_file({"file": "token"}, tmp_path)
        assert error.value.below == ".file"


@pytest.mark.parametrize("value", ["hush", {"file": "token", "more": 1}, None, ["token"]])
def test_what_is_written_in_place_of_a_file_is_never_repeated(tmp_path: Path, value: object) -> None:
    with pytest.raises(Mismatch) as error:
        secret_file(value, tmp_path)  # type: ignore[arg-type]
    assert error.value.got == "something else (not shown)"


def test_a_key_is_64_hexadecimal_digits(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("5A" * 32 + "\n")
    assert key_file("key", tmp_path).value == b"5A" * 32
    (tmp_path / "key").write_text("5a" * 31)
    with pytest.raises(Mismatch, match="64 hexadecimal digits"):
        key_file("key", tmp_path)


def test_certificates_are_bounded_and_comments_in_any_encoding_allowed(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes("# Zürich\nPEM\n".encode("latin-1"))
    assert certificates_file("ca.pem", tmp_path).pem == "# Zrich\nPEM\n"
    (tmp_path / "ca.pem").write_bytes(b"x" * (MAX_CERTIFICATES_BYTES + 1))
    with pytest.raises(Mismatch, match="at most"):
        certificates_file("ca.pem", tmp_path)
