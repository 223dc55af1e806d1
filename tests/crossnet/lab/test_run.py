"""The whole lab: every mode, TURN server and service; its error messages; and that it leaves nothing behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

LAB = [sys.executable, "-m", "crossnet", "lab"]
# Without these capabilities root is an ordinary user for the kernel, but can still read the interpreter.
AS_A_USER = ["setpriv", "--bounding-set", "-sys_admin,-net_admin,-net_bind_service"]
TIMEOUT_S = 50.0
GONE_TIMEOUT_S = 15.0


def environment_of(folder: Path, path: Path | None) -> dict[str, str]:
    """Return the environment of a lab that keeps its files under `folder`, with programs in `path` before the real ones."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return environment


def lab(
    folder: Path, *arguments: str, prefix: Sequence[str] = (), path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a lab to its end; everything of it is under `folder`."""
    try:
        return subprocess.run(
            [*prefix, *LAB, *arguments],
            env=environment_of(folder, path),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    finally:
        assert_gone(folder)


@contextlib.contextmanager
def lab_started(folder: Path, *arguments: str, path: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a lab while the block runs."""
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*LAB, *arguments], env=environment_of(folder, path), stdout=output, stderr=output, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def processes(folder: Path) -> list[str]:
    """Return the command lines of processes that a lab in this folder started and that are alive."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                if f"TMPDIR={folder}\0".encode() in (place / "environ").read_bytes():
                    found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def assert_gone(folder: Path) -> None:
    """Assert that no process, file or namespace of the lab is left, after a bounded time."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not processes(folder), GONE_TIMEOUT_S)
    assert processes(folder) == []
    assert [place.name for place in folder.iterdir() if place.name.startswith("crossnet-lab-")] == []
    if shutil.which("ip"):
        assert "crossnet-" not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=False).stdout


def assert_whole(done: subprocess.CompletedProcess[str], mode: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert mode in done.stdout.splitlines()[0]
    assert "FAILED" not in done.stdout
    assert "in 9 of 9 requests" in done.stdout
    assert "ok      curl is refused" in done.stdout
    assert "What this does not prove" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("ok: ")


@pytest.mark.netns
@pytest.mark.interop
@pytest.mark.needs("namespaces", "nft", "ip", "turnserver", "nginx", "curl", "openssl")
@pytest.mark.parametrize("turn", ["embedded", "coturn"])
def test_in_namespaces(tmp_path: Path, turn: str) -> None:
    done = lab(tmp_path, "--check", "--mode", "netns", "--turn", turn, "--service", "nginx")
    assert_whole(done, "two network namespaces")
    assert "ok      network b is behind NAT" in done.stdout
    assert "ok      network a cannot reach" in done.stdout


@pytest.mark.interop
@pytest.mark.needs("turnserver", "curl", "openssl")
@pytest.mark.parametrize(("turn", "service"), [("embedded", "python"), ("coturn", "openssl")])
def test_on_loopback_addresses(tmp_path: Path, turn: str, service: str) -> None:
    done = lab(tmp_path, "--check", "--mode", "loopback", "--turn", turn, "--service", service)
    assert_whole(done, "loopback addresses")
    assert "isolation: both networks are this machine's loopback interface" in done.stdout


@pytest.mark.netns
@pytest.mark.interop
@pytest.mark.needs("userns", "setpriv", "nft", "ip", "turnserver", "nginx", "curl", "openssl")
def test_in_namespaces_of_an_ordinary_user(tmp_path: Path) -> None:
    done = lab(tmp_path, "--check", "--turn", "coturn", prefix=AS_A_USER if os.geteuid() == 0 else ())
    assert_whole(done, "as an ordinary user, in a user namespace")


@pytest.mark.needs("setpriv", "curl", "openssl")
def test_on_high_ports_of_an_ordinary_user(tmp_path: Path) -> None:
    done = lab(tmp_path, "--check", "--mode", "loopback", prefix=AS_A_USER if os.geteuid() == 0 else ())
    assert_whole(done, "loopback addresses")
    assert "on port 5353, for them" in done.stdout


def fake(folder: Path, name: str, script: str) -> Path:
    """Make a program that shadows the real one on PATH."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / name).write_text(f"#!/bin/sh\n{script}\n")
    (programs / name).chmod(0o755)
    return programs


FORBIDDEN = {
    "unshare": ("echo 'unshare: unshare failed: Operation not permitted' >&2; exit 1", "Operation not permitted"),
    "ip": ("echo 'RTNETLINK answers: Operation not permitted' >&2; exit 2", "RTNETLINK answers"),
    "nft": ("echo 'Error: Could not process rule: Operation not supported' >&2; exit 1", "nft -f -: Error: Could not"),
}


@pytest.mark.needs("namespaces", "unshare", "ip", "nft")
@pytest.mark.parametrize("program", FORBIDDEN)
def test_forced_namespaces_fail_with_the_kernels_reason(tmp_path: Path, program: str) -> None:
    script, told = FORBIDDEN[program]
    done = lab(tmp_path, "--mode", "netns", path=fake(tmp_path, program, script))
    assert done.returncode == 1
    assert "crossnet lab: no network namespaces" in done.stderr
    assert told in done.stderr


@pytest.mark.needs("namespaces", "unshare", "ip", "nft", "curl", "openssl")
def test_if_namespaces_fail_late_the_lab_falls_back_and_says_so(tmp_path: Path) -> None:
    done = lab(tmp_path, "--check", path=fake(tmp_path, "nft", FORBIDDEN["nft"][0]))
    assert_whole(done, "loopback addresses")
    assert "they could not be built" in done.stdout.splitlines()[0]


def test_a_part_that_does_not_start_is_reported_with_its_log(tmp_path: Path) -> None:
    path = fake(tmp_path, "nginx", "echo 'bind() failed, says nginx' >&2; exit 1")
    done = lab(tmp_path, "--mode", "loopback", "--service", "nginx", path=path)
    assert done.returncode == 1
    assert "service ended with exit code 1" in done.stderr
    assert "bind() failed, says nginx" in done.stderr


@pytest.mark.needs("namespaces", "nft", "ip")
@pytest.mark.parametrize("built", [1, 3, 6])
def test_a_signal_during_construction_leaves_nothing_behind(tmp_path: Path, built: int) -> None:
    """The whole lab has more processes than that: the signal comes while it is being built."""
    with lab_started(tmp_path) as process:
        wait_until(lambda: len(processes(tmp_path)) >= built, TIMEOUT_S)
        process.send_signal(signal.SIGTERM)
        assert process.wait(GONE_TIMEOUT_S) in {
            143,
            -signal.SIGTERM,
        }  # the latter before Python has installed its handler
    assert_gone(tmp_path)


def wait_for_account(folder: Path) -> str:
    def output() -> str:
        return (folder / "output").read_text()

    with contextlib.suppress(TimeoutError):
        wait_until(lambda: "\nok: " in output() or "FAILED" in output(), TIMEOUT_S)
        return output()
    raise AssertionError(output())


@pytest.mark.netns
@pytest.mark.needs("namespaces", "nft", "ip", "nsenter", "curl", "openssl")
def test_staying_it_can_be_entered_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    # Slow, as on a busy machine: the pid must be printed only when the process is inside the network.
    slow = fake(tmp_path, "mount", f'sleep 0.2; exec {shutil.which("mount")} "$@"')
    with lab_started(tmp_path, "--stay", "--mode", "netns", path=slow) as process:
        text = wait_for_account(tmp_path)
        (entrance,) = (line for line in text.splitlines() if "be a client in network a: " in line)
        enter = entrance.partition(": ")[2].removesuffix(" bash").split()
        done = subprocess.run(
            [*enter, "cat", "/etc/resolv.conf"], capture_output=True, text=True, timeout=10, check=True
        )
        assert "nameserver 10.80.0.53" in done.stdout
        assert len(processes(tmp_path)) > 6
        process.send_signal(signal.SIGINT)
        assert process.wait(GONE_TIMEOUT_S) == 0
    assert_gone(tmp_path)


@pytest.mark.netns
@pytest.mark.needs("namespaces", "nft", "ip", "setpriv", "curl", "openssl")
def test_killed_it_takes_its_processes_along(tmp_path: Path) -> None:
    with lab_started(tmp_path, "--stay", "--mode", "netns") as process:
        wait_for_account(tmp_path)
        process.kill()
        process.wait()
        assert_gone(tmp_path)
