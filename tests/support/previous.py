"""The version before this one: what the parts of a mesh must still work with, since networks are upgraded on different days."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PREVIOUS = "878e1f296b04040764ee53dafb8295644b53bf8d"
"""The commit of the last release, 0.1.0. `make release` says to move it on."""

PACKAGES = ("crossnet", "discovery", "dnsgw", "sniproxy", "turnreg")


def unpacked(folder: Path) -> Path:
    """Put that version's packages into a folder, which is returned. Skips where the history is not there."""
    archive = ["git", "-C", str(ROOT), "archive", PREVIOUS, *PACKAGES]
    try:
        done = subprocess.run(archive, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the history of this repository is not there: {error}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=done.stdout, timeout=30, check=True)
    return folder
