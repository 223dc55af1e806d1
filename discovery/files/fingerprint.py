"""Whether files have changed since they were last read, by what the file system says of them."""

import os
from collections.abc import Iterable
from pathlib import Path

Fingerprint = tuple[int, int, int]
"""Inode, time of the last change in nanoseconds, size: of the file behind a link."""


class FileFingerprint:
    """Detects changes of files: written, replaced, removed, or linked elsewhere."""

    def __init__(self, paths: Iterable[Path | None]) -> None:
        """Note the present state of the files; None stands for no file."""
        self._paths = [path for path in paths if path is not None]
        self._seen = self._read()

    def changed(self) -> bool:
        """Tell whether they have changed since the last call, or since the start."""
        seen, self._seen = self._seen, self._read()
        return seen != self._seen

    def _read(self) -> list[Fingerprint | None]:
        return [fingerprint(path) for path in self._paths]


def fingerprint(path: Path) -> Fingerprint | None:
    """Return the present state of a file, None if there is none."""
    try:
        found = os.stat(path)  # follows links, as mounted secrets have them
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)
