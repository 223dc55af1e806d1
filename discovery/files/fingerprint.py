"""Whether files have changed since they were last read, by what the file system says of them."""

import os
from collections.abc import Iterable
from pathlib import Path

Fingerprint = tuple[int, int, int]
"""Inode, time of the last change in nanoseconds, size: of the file behind a link."""


class FileFingerprint:
    """What some files looked like. A file that is written anew, replaced, removed or linked elsewhere looks different."""

    def __init__(self, paths: Iterable[Path | None]) -> None:
        """Look at files now; None stands for no file."""
        self._paths = [path for path in paths if path is not None]
        self._seen = self._look()

    def changed(self) -> bool:
        """Tell whether they look otherwise than the last time; asked again, it tells of later changes only."""
        seen, self._seen = self._seen, self._look()
        return seen != self._seen

    def _look(self) -> list[Fingerprint | None]:
        return [fingerprint(path) for path in self._paths]


def fingerprint(path: Path) -> Fingerprint | None:
    """Return what a file looks like now, None where there is none."""
    try:
        found = os.stat(path)  # follows links, as mounted secrets have them
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)
