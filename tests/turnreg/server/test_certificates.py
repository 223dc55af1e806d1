"""A certificate that is renewed while the server runs."""

import shutil
from pathlib import Path

import pytest
import trustme

from turnreg.server.certificates import Certificates

CA = trustme.CA()


def write(directory: Path) -> tuple[Path, Path]:
    issued = CA.issue_cert("turn.test")
    cert, key = directory / "cert.pem", directory / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    return cert, key


def test_is_read_again_when_it_changes(tmp_path: Path) -> None:
    certificates = Certificates(*write(tmp_path))
    first = certificates.context
    assert not certificates.look()
    write(tmp_path)
    assert certificates.look()
    assert certificates.context is not first
    assert not certificates.look()


def test_half_a_renewal_leaves_the_last_good_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = write(tmp_path)
    certificates = Certificates(cert, key)
    first = certificates.context
    (tmp_path / "next").mkdir()
    new_cert, new_key = write(tmp_path / "next")
    shutil.copy(new_cert, cert)
    assert not certificates.look()  # the key of the one before
    assert certificates.context is first
    assert "not renewed" in caplog.text
    shutil.copy(new_key, key)
    assert certificates.look()
    assert certificates.context is not first


def test_files_that_vanish_leave_the_last_good_one(tmp_path: Path) -> None:
    cert, key = write(tmp_path)
    certificates = Certificates(cert, key)
    cert.unlink()
    assert not certificates.look()


def test_what_cannot_be_read_is_an_error_at_the_start(tmp_path: Path) -> None:
    cert, key = write(tmp_path)
    key.write_text("no key")
    with pytest.raises(OSError, match=r"PEM|SSL"):
        Certificates(cert, key)
