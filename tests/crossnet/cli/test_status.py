"""`crossnet status` against a running process, and its tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crossnet.cli import status
from tests.support.running import free_port, running

CONFIG = "network: a\ndiscovery: mesh.yaml\nadmin: 127.0.0.1:0\ndrain: 0\nrelay: {id: relay-1, listen: '127.0.0.1:0'}\n"


def test_it_shows_a_running_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}]")
    with running(tmp_path, CONFIG) as process:
        admin = process.started()["admin"][0]
        done = subprocess.run(
            [sys.executable, "-m", "crossnet", "status", "--admin", f"http://{admin}/"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        assert status.status_command(admin, watch=False, as_json=True) == 0
    assert done.stdout.startswith("network a: relay; crossnet ")
    assert "\n  ready\n" in done.stdout
    assert "relay: 0 streams" in done.stdout
    assert json.loads(capsys.readouterr().out)["streams"] == {"relay": []}


def test_no_answer_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert status.status_command(f"127.0.0.1:{free_port()}", watch=False, as_json=False) == 1
    told = capsys.readouterr().err
    assert told.startswith("crossnet status: no answer from http://127.0.0.1:")
    assert len(told.splitlines()) == 1


def test_tables_are_aligned_and_show_nothing_unprintable() -> None:
    state = {
        "version": "0", "network": "b", "roles": ["gateway"], "seconds": 61.0, "waiting_for": ["a first allocation"],
        "listening": {"admin": ["127.0.0.1:1"]},
        "discovery": {"synced": True, "connected": False, "age_s": 7.0, "revision": 3, "records": 4, "networks": ["a"]},
        "registrations": [{"via": "a", "turn": None, "state": "no_turn_record"}],
        "gateway_endpoints": [{"endpoint": "10.1.0.5:1", "failures": 3, "left_out_s": 7.9, "why": "refused"}],
    }  # fmt: skip
    streams = {"gateway": [{"stream": "ab", "sni": "x\x1b[31m" + "y" * 99, "bytes_up": 12345, "ms_total": 1.5}]}
    text = "\n".join(status.plain(*status.report(state, streams)))
    assert "\x1b" not in text
    assert "waits for a first allocation" in text
    assert "not confirmed for 7 s" in text
    assert "a/-" in text
    assert "gateway  10.1.0.5:1  3         8               refused" in text
    assert "no_turn_record" in text
    header, row = text.splitlines()[-2:]
    assert header.index("up") + 2 == row.index("12345") + 5
