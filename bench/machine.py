"""The machine and the versions that a benchmark ran with, without which its figures mean nothing."""

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
    """Return everything that the figures depend on."""
    pool = PipePool()
    pipes = []
    while (pipe := pool.take()) is not None:
        pipes.append(pipe)
    for pipe in pipes:
        pool.give_back(pipe)
    pool.close()
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "git": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed": bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")),
        "kernel": platform.release(),
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "uvloop": version("uvloop"),
        "crossnet": version("crossnet"),
        "haproxy": _output("haproxy", "-v").partition("\n")[0],
        "coturn": _output("turnserver", "--version").strip().rpartition("\n")[2],
        "pipes_of_1_mib": len(pipes),
        "user": "root" if os.geteuid() == 0 else "ordinary",
    }


def _output(*command: str) -> str:
    """Return the output of a command, or an empty string if it is not installed."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip()
