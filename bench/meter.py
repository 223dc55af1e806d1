"""CPU seconds, memory and descriptors of processes, from /proc."""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

# Indexes of fields of proc_pid_stat(5), counted after the command's name, which may contain anything.
_PARENT, _UTIME, _CSTIME, _RSS = 1, 11, 14, 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a process and its descendants have used."""

    cpu_s: float
    rss_bytes: int
    descriptors: int

    def __sub__(self, earlier: "Cost") -> "Cost":
        return Cost(
            cpu_s=self.cpu_s - earlier.cpu_s,
            rss_bytes=self.rss_bytes - earlier.rss_bytes,
            descriptors=self.descriptors - earlier.descriptors,
        )


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _family(pid: int) -> dict[int, list[str]]:
    """Return the stat fields of a process and of all its live descendants."""
    stats = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))) is not None:
            stats[int(entry)] = fields
    family = {pid: stats[pid]} if pid in stats else {}
    parents = set(family)
    while parents:
        parents = {child for child, fields in stats.items() if int(fields[_PARENT]) in parents}
        family |= {child: stats[child] for child in parents}
    return family


def cost(pid: int) -> Cost:
    """Return what a process, its live descendants and the children it has waited for have used."""
    cpu, rss, descriptors = 0, 0, 0
    for member, fields in _family(pid).items():
        cpu += sum(map(int, fields[_UTIME : _CSTIME + 1]))
        rss += int(fields[_RSS]) * _PAGE
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            descriptors += len(os.listdir(f"/proc/{member}/fd"))
    return Cost(cpu_s=cpu / _TICKS, rss_bytes=rss, descriptors=descriptors)


def costs(pids: dict[str, int]) -> dict[str, Cost]:
    """Return the cost of each named process."""
    return {name: cost(pid) for name, pid in pids.items()}


def difference(later: dict[str, Cost], earlier: dict[str, Cost]) -> dict[str, Cost]:
    """Return what each named process has used between two measurements."""
    return {name: later[name] - earlier[name] for name in later}


def busy_s() -> float:
    """Return the CPU seconds that all CPUs of this machine have been busy, with any process."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS


def total_cpu_s(pids: Iterable[int]) -> float:
    """Return the sum of these processes' CPU seconds."""
    return sum(cost(pid).cpu_s for pid in pids)
