"""Where and with what a benchmark ran: figures without that mean nothing."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from bench.worker import ROOT
from sniproxy.engine import PipePool


def describe() -> dict[str, object]:
    """Return what figures depend on."""
    pool = PipePool()
    pipes = []
    while (pipe := pool.take()) is not None:
        pipes.append(pipe)
    for pipe in pipes:
        pool.give_back(pipe)
    pool.close()
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "git": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed": bool(_said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")),
        "kernel": platform.release(),
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "uvloop": version("uvloop"),
        "crossnet": version("crossnet"),
        "haproxy": _said("haproxy", "-v").partition("\n")[0],
        "coturn": _said("turnserver", "--version").strip().rpartition("\n")[2],
        "pipes_of_1_mib": len(pipes),
        "user": "root" if os.geteuid() == 0 else "ordinary",
    }


def _said(*command: str) -> str:
    """Return what a command prints; nothing if it is not here."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip()
