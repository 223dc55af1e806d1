"""Detection of changed files."""

from pathlib import Path

from discovery.files.fingerprint import FileFingerprint


def test_every_kind_of_change_is_seen_once(tmp_path: Path) -> None:
    path, other, link = tmp_path / "a", tmp_path / "b", tmp_path / "link"
    path.write_text("1")
    link.symlink_to(path)
    stamp = FileFingerprint([path, None, link])
    assert not stamp.changed()
    path.write_text("22")
    assert stamp.changed()
    assert not stamp.changed()
    other.write_text("22")
    other.replace(path)
    assert stamp.changed()
    link.unlink()
    assert stamp.changed()
    link.symlink_to(tmp_path / "missing")
    assert not stamp.changed()
    path.unlink()
    assert stamp.changed()
