"""The cost of processes, from /proc."""

import os
import subprocess
import sys
import time

from bench import meter

BURN = "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass\nprint(flush=True); input()"


def test_running_and_ended_children_count() -> None:
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()  # the child has used its CPU time
        alive = meter.cost(process.pid)
        assert alive.cpu_s >= 0.1
        assert alive.rss_bytes > meter.cost(os.getpid()).rss_bytes / 100
        assert alive.descriptors >= 6
        own = meter.cost(os.getpid()).cpu_s
        process.stdin.write("\n")
        process.stdin.close()
        process.wait()
    assert meter.cost(os.getpid()).cpu_s >= own
    assert meter.cost(process.pid) == meter.Cost(cpu_s=0, rss_bytes=0, descriptors=0)


def test_differences_are_taken_by_name() -> None:
    earlier = {"relay": meter.Cost(cpu_s=1.0, rss_bytes=100, descriptors=5)}
    later = {"relay": meter.Cost(cpu_s=1.5, rss_bytes=300, descriptors=4)}
    assert meter.difference(later, earlier) == {"relay": meter.Cost(cpu_s=0.5, rss_bytes=200, descriptors=-1)}


def test_the_machine_is_at_least_as_busy_as_this_process() -> None:
    busy, ours = meter.busy_s(), time.process_time()
    while time.process_time() < ours + 0.1:
        pass
    assert meter.busy_s() >= busy + 0.05
