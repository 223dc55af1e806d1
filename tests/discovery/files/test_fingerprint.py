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


def test_a_file_that_is_being_written_has_not_settled(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("tokens: [a]")
    stamp = FileFingerprint([path])
    assert not stamp.has_settled()
    path.write_text("")
    assert not stamp.has_settled(), "cut short"
    path.write_text("tokens: [a, b]")
    assert not stamp.has_settled(), "it has just changed"
    assert stamp.has_settled()
    assert not stamp.has_settled(), "told once"


def test_a_file_that_is_as_it_was_has_not_changed(tmp_path: Path) -> None:
    path, aside = tmp_path / "tokens", tmp_path / "aside"
    path.write_text("1")
    stamp = FileFingerprint([path])
    path.rename(aside)
    assert not stamp.has_settled()
    aside.rename(path)
    assert not stamp.has_settled()
    assert not stamp.has_settled()
