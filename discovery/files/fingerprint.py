"""Detects changed files by their metadata in the file system."""

import os
from collections.abc import Iterable
from pathlib import Path

Fingerprint = tuple[int, int, int]
"""Inode, modification time in nanoseconds, and size of a file; links are followed."""


class FileFingerprint:
    """Detects whether files were written, replaced, removed, or linked to other files."""

    def __init__(self, paths: Iterable[Path | None]) -> None:
        """Note the current state of the files. None is ignored."""
        self._paths = [path for path in paths if path is not None]
        self._seen = self._read()
        self._moving: list[Fingerprint | None] | None = None

    def changed(self) -> bool:
        """Return whether they have changed since the last call, or since the object was created."""
        seen, self._seen = self._seen, self._read()
        return seen != self._seen

    def has_settled(self) -> bool:
        """Return whether they have changed and are as they were at the call before; to be called periodically.

        A file that is being written in place may be cut short and yet valid, such as a list of tokens without any.
        """
        found = self._read()
        if found == self._seen:
            self._moving = None
        elif found == self._moving:
            self._seen, self._moving = found, None
            return True
        else:
            self._moving = found
        return False

    def _read(self) -> list[Fingerprint | None]:
        return [fingerprint(path) for path in self._paths]


def fingerprint(path: Path) -> Fingerprint | None:
    """Return the current state of a file, None if it cannot be found."""
    try:
        found = os.stat(path)  # follows links, which mounted secrets consist of
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)
