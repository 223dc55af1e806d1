"""Medians, ratios within a round, and the text for people."""

import json
from pathlib import Path

from bench import report
from bench.questions import QUESTIONS, Sample, Settings

CONNECT = next(question for question in QUESTIONS if question.name == "connect-1")


def sample(way: str, round_: int, rate: float, cpu_s: float = 0.0, *, foreign: float = 0.0) -> Sample:
    return Sample(
        question="connect-1",
        way=way,
        round=round_,
        count=rate,
        seconds=1.0,
        rate=rate,
        values={"p50_us": 1e6 / rate, "p99_us": 2e6 / rate},
        cpu_s={way: cpu_s} if cpu_s else {},
        foreign_cpu=foreign,
    )


def test_ratios_are_taken_within_a_round() -> None:
    # A round in which everything was ten times slower changes no ratio.
    samples = [
        *(sample("direct", round_, rate) for round_, rate in ((1, 100), (2, 10), (3, 120))),
        *(sample("relay", round_, rate) for round_, rate in ((1, 50), (2, 5), (3, 60))),
    ]
    row = report.summary(samples)[1]
    assert row["way"] == "relay"
    assert row["rate"] == {"median": 50, "low": 5, "high": 60}
    assert row["rate_to_direct"] == 0.5
    assert row["rate_to_haproxy"] is None


def test_crossnet_is_compared_with_the_better_haproxy_of_each_round() -> None:
    samples = [
        *(sample("haproxy", round_, 100, 1.0) for round_ in (1, 2)),
        *(sample("haproxy-splice", round_, 200, 0.5) for round_ in (1, 2)),
        *(sample("relay", round_, 100, 1.0) for round_ in (1, 2)),
    ]
    row = next(row for row in report.summary(samples) if row["way"] == "relay")
    assert row["rate_to_haproxy"] == 0.5
    assert row["cpu_to_haproxy"] == 2.0


def test_a_way_that_failed_in_a_round_has_fewer() -> None:
    samples = [sample("direct", 1, 100), sample("direct", 2, 100), sample("relay", 2, 40)]
    row = report.summary(samples)[1]
    assert row["rounds"] == 1
    assert row["rate_to_direct"] == 0.4


def test_the_table_notes_when_other_processes_were_busy() -> None:
    quiet = report.table([sample("direct", 1, 100)], [CONNECT])
    assert "NOTE" not in quiet
    noisy = report.table([sample("direct", 1, 100, foreign=0.5)], [CONNECT])
    assert "other processes took up to 50% of this machine" in noisy


def test_the_file_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.json"
    report.write(file, [sample("relay", 1, 100, 1.0)], Settings(), {"git": "abc"}, ["it broke"])
    document = json.loads(file.read_text())
    assert document["machine"] == {"git": "abc"}
    assert document["failures"] == ["it broke"]
    assert document["samples"][0]["cpu_s"] == {"relay": 1.0}
    assert document["settings"]["seconds"] > 0
