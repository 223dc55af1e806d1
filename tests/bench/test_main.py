"""The benchmark, run as a user runs it, with sizes so small that its figures mean nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import choose
from bench.worker import ROOT
from tests.support.waiting import wait_until

COMMAND = [sys.executable, "-m", "bench"]
TINY = ["--rounds", "1", "--seconds", "0.05", "--idle", "4"]
ONE_OF_EACH_KIND = ["idle", "up-16", "down-1", "connect-16", "echo-1"]


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=55, check=False
    )


def processes(folder: Path) -> list[str]:
    """Return the command lines of running processes that have this folder as TMPDIR."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                if f"TMPDIR={folder}\0".encode() in (place / "environ").read_bytes():
                    found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def assert_all_measured(done: subprocess.CompletedProcess[str], file: Path, parts: dict[str, list[str]]) -> None:
    """Check that every question was measured for every way, including the cost of its processes."""
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert document["failures"] == []
    assert {"git", "kernel", "cpu", "cores", "python", "uvloop", "pipes_of_1_mib", "rounds"} <= document[
        "machine"
    ].keys()
    rows = {(row["question"], row["way"]): row for row in document["summary"]}
    assert rows.keys() == {(question, way) for question in ONE_OF_EACH_KIND for way in parts}
    for (question, way), row in rows.items():
        assert sorted(row["cpu_s_of"]) == sorted(parts[way])
        assert row["rate"]["low"] > 0
        assert row["rate_to_direct"] > 0
        if question.startswith(("connect", "echo")):
            assert 0 < row["p50_us"]["median"] <= row["p99_us"]["median"]
        if question == "idle" and way != "direct":
            assert all(spread["median"] == 2 for spread in row["descriptors"].values())
        assert f"{way} " in done.stdout


@pytest.mark.slow
def test_our_own_ways_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "results" / "it.json"
    done = bench(tmp_path, *TINY, "--only", *ONE_OF_EACH_KIND, "relay", "gateway", "embedded", "--json", str(file))
    parts = {
        "direct": [],
        "relay": ["relay"],
        "gateway": ["relay", "gateway"],
        "embedded": ["relay", "turn", "gateway"],
    }
    assert_all_measured(done, file, parts)
    assert processes(tmp_path) == []


@pytest.mark.slow
@pytest.mark.interop
@pytest.mark.needs("haproxy", "turnserver")
def test_peers_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    arguments = ["haproxy", "haproxy-splice", "coturn", "--json", str(file)]
    done = bench(tmp_path, *TINY, "--bytes", "300000", "--only", *ONE_OF_EACH_KIND, *arguments)
    haproxy, coturn = ["haproxy"], ["relay", "coturn", "gateway"]
    assert_all_measured(done, file, {"direct": [], "haproxy": haproxy, "haproxy-splice": haproxy, "coturn": coturn})
    for row in json.loads(file.read_text())["samples"]:
        if row["question"] == "up-16":
            assert row["count"] == 16 * 300_000 / 1e9
    assert processes(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["--seconds", "30", "--only", "up-1", "relay", "--json", str(tmp_path / "it.json")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        wait_until(lambda: any("crossnet run" in command for command in processes(tmp_path)), what="a role runs")
        assert process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=20)
    wait_until(
        lambda: not processes(tmp_path), what="no process is left", details=lambda: "\n".join(processes(tmp_path))
    )


def test_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    done = bench(tmp_path, "--only", "teleport")
    assert done.returncode == 2
    assert "'teleport' is neither a question nor a way" in done.stderr


def test_names_choose_questions_and_ways() -> None:
    questions, ways = choose(["connect", "up-16", "relay"])
    assert [question.name for question in questions] == ["up-16", "connect-1", "connect-16"]
    assert ways == ["direct", "relay"]
    questions, ways = choose([])
    assert [question.name for question in questions][:2] == ["idle", "up-1"]
    assert len(questions) == 9
    assert "gateway" not in ways
