"""Chooses how the two networks are built, and enters namespaces of our own.

Whether the kernel allows that is found out by trying: some kernels allow a user namespace but remove its capabilities.
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
"""Exit code of a lab whose topology could not be built (EX_TEMPFAIL of sysexits.h); another mode may work."""

_PR_SET_PDEATHSIG = 1


def entrance() -> tuple[list[str], str]:
    """Return the command that runs another one in namespaces of its own, and in words as which user.

    Raises:
        OSError: there is no way to do that; the text says why.
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
    """Run `crossnet` with these arguments in namespaces of its own, forward signals, and return its exit code."""
    child = subprocess.Popen([*command, sys.executable, "-m", "crossnet", *arguments], process_group=0)
    # A process group of its own, so that Ctrl-C reaches it only once, through us, and not again while it cleans up.
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
    """Have the kernel terminate us when our parent ends, even if it is killed. `Program` does the same for our children."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
