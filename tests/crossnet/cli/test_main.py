"""The command line as a person uses it: real processes, exit codes, one clear line each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def crossnet(*arguments: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crossnet", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_check_reports_a_typo_a_bad_cidr_and_a_bad_address_and_exits_2(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text("networks: []")
    (tmp_path / "x.yaml").write_text(
        "network: a\ndiscovery: mesh.yaml\nadmni: 127.0.0.1:1\n"
        "relay: {id: r, listen: ['10.0.0.300:443'], allow: ['10.0.0.0/40']}\n"
    )
    done = crossnet("check", "-c", "x.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "x.yaml: $.admni: expected a known key such as admin, got an unknown key",
        "x.yaml: $.relay.listen[0]: expected an IP address, got '10.0.0.300:443'",
        "x.yaml: $.relay.allow[0]: expected a CIDR such as 10.0.0.0/8, got '10.0.0.0/40'",
    ]


def test_check_prints_the_effective_configuration_of_a_good_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hush\n")
    (tmp_path / "x.yaml").write_text("network: a\ntoken: {file: token}\n")
    (tmp_path / "token").chmod(0o644)
    done = crossnet("check", "-c", "x.yaml", folder=tmp_path)
    assert done.returncode == 0
    assert "token: '***'" in done.stdout
    assert "hush" not in done.stdout + done.stderr
    assert done.stderr.startswith("x.yaml: warning: $.token: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["check"],
        ["run"],
        ["check", "-c", "absent.yaml"],
        ["run", "-c", "absent.yaml"],
        ["name", "encode"],
    ],
)
def test_wrong_usage_exits_2(tmp_path: Path, arguments: list[str]) -> None:
    done = crossnet(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr


def test_run_names_the_role_that_the_file_lacks(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("network: a\n")
    done = crossnet("run", "-c", "x.yaml", "relay", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "x.yaml: $: expected a section relay, got nothing\n")
    done = crossnet("run", "-c", "x.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "at least one role" in done.stderr
    assert crossnet("run", "-c", "x.yaml", "relya", folder=tmp_path).returncode == 2


def test_version() -> None:
    done = crossnet("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "crossnet")


def test_name_takes_the_domain_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("network: a\ndomain: mesh.example\n")
    done = crossnet("name", "encode", "10.1.0.5:8443", "-n", "b", "-c", "x.yaml", folder=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "p8443-10-1-0-5.b.mesh.example")


def test_a_closed_pipe_causes_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m crossnet name decode --json {'a.b ' * 20000} | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stderr == ""
