"""Choosing how the two networks are made, and going into namespaces of our own.

Whether the kernel lets us is found out by doing: some let a user namespace be made and strip it of its rights.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

PROBE_TIMEOUT_S = 10.0
IMPOSSIBLE = 75
"""Exit code of a lab whose topology could not be built (EX_TEMPFAIL of sysexits.h): another mode may do."""

_PR_SET_PDEATHSIG = 1


def entrance() -> tuple[list[str], str]:
    """Return the command that runs another in namespaces of its own, and in words as whom.

    Raises:
        OSError: no way is open; the text says why.
    """
    for program in ("unshare", "ip", "nft", "mount"):
        if shutil.which(program) is None:
            raise OSError(f"{program} is not installed")
    ways = [(["unshare", "--user", "--map-root-user", "--net", "--mount"], "as an ordinary user, in a user namespace")]
    if os.geteuid() == 0:
        ways.insert(0, (["unshare", "--net", "--mount"], "as root"))
    said = ""
    for command, words in ways:
        try:
            done = subprocess.run(
                [*command, "ip", "link", "set", "lo", "up"],
                capture_output=True,
                text=True,
                timeout=PROBE_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            said = f"{' '.join(command)} does not end"
            continue
        if done.returncode == 0:
            return command, words
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    raise OSError(said)


def run_within(command: Sequence[str], arguments: Sequence[str]) -> int:
    """Run `crossnet` with these arguments in namespaces of its own, hand signals on, and return its exit code."""
    child = subprocess.Popen([*command, sys.executable, "-m", "crossnet", *arguments], process_group=0)
    # A group of its own: Ctrl-C at a terminal reaches it once, through us, and not a second time while it cleans up.
    previous = {
        number: signal.signal(number, lambda got, _: child.send_signal(got))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def end_with_parent() -> None:
    """Have the kernel end us when who started us is gone, even killed; what we started has the same from `Program`."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
