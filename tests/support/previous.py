"""The previous version, which the parts of a mesh must work with, since networks are upgraded on different days."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PREVIOUS = "878e1f296b04040764ee53dafb8295644b53bf8d"
"""The commit of the last release, 0.1.0. `make release` prints the next value."""

GIT_LIMIT_S = 30.0
INSTALL_LIMIT_S = 300.0


def interpreter(folder: Path) -> Path:
    """Install that version, with the libraries it pins, into an environment of its own; return its Python.

    Workers may share the folder: the first one installs, the others wait for it. Skips the test if the commit or the libraries
    are not available; with CI=true that is a failure.
    """
    folder.mkdir(exist_ok=True)
    python = folder / "environment" / "bin" / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").exists():
            try:
                _install(folder, python)
            except (OSError, subprocess.SubprocessError) as error:
                shutil.rmtree(folder / "environment", ignore_errors=True)
                _lacking(f"{error}\n{(getattr(error, 'stderr', None) or b'').decode(errors='replace')[-2000:]}")
            (folder / "installed").touch()
    return python


def _install(folder: Path, python: Path) -> None:
    source = folder / "source"
    source.mkdir(exist_ok=True)
    archive = ["git", "-C", str(ROOT), "archive", PREVIOUS]
    tree = subprocess.run(archive, capture_output=True, timeout=GIT_LIMIT_S, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=tree, capture_output=True, timeout=GIT_LIMIT_S, check=True)
    create = [sys.executable, "-m", "venv", str(python.parents[1])]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "--constraint", str(source / "constraints.txt"), str(source)]
    for command in (create, install):
        subprocess.run(command, capture_output=True, timeout=INSTALL_LIMIT_S, check=True)


def _lacking(reason: str) -> None:
    message = f"the previous version cannot be installed: {reason}"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)
