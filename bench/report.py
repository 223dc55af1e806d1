"""Turns samples into figures: medians and ranges over the rounds, ratios within a round, a table and a JSON file."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench.questions import Question, Sample, Settings

BASE = ("direct",)
PEERS = ("haproxy", "haproxy-splice")
"""crossnet is compared with the better one of each round."""

FOREIGN_LIMIT = 0.1
"""If other processes use more than a tenth of the machine, rates mean little; CPU per unit is still roughly right."""

_CPU_UNITS = {
    "GB": ("s/GB", 1.0),
    "connection": ("us each", 1e6),
    "message": ("us each", 1e6),
    "stream": ("us each", 1e6),
}


def summary(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return a row for each question and way, with median, lowest and highest value over the rounds."""
    rows = []
    for question, way in dict.fromkeys((sample.question, sample.way) for sample in samples):
        found = _of(samples, question, way)
        row: dict[str, Any] = {
            "question": question,
            "way": way,
            "rounds": len(found),
            "rate": _spread(map(_rate, found)),
            "cpu_s": _spread(map(_cpu_s, found)),
            "cpu_s_of": {part: _spread(sample.cpu_s[part] for sample in found) for part in found[0].cpu_s},
            "foreign_cpu": _spread(sample.foreign_cpu for sample in found),
        }
        for name in found[0].values:
            row[name] = _spread(sample.values[name] for sample in found)
        for name in ("memory_kib", "descriptors"):
            if getattr(found[0], name):
                row[name] = {part: _spread(getattr(sample, name)[part] for sample in found) for part in found[0].cpu_s}
        row["rate_to_direct"] = _ratio(found, _of(samples, question, *BASE), _rate, best=max)
        row["rate_to_haproxy"] = _ratio(found, _of(samples, question, *PEERS), _rate, best=max)
        row["cpu_to_haproxy"] = _ratio(found, _of(samples, question, *PEERS), _cpu_s, best=min)
        rows.append(row)
    return rows


def _of(samples: Sequence[Sample], question: str, *ways: str) -> list[Sample]:
    return [sample for sample in samples if sample.question == question and sample.way in ways]


def _rate(sample: Sample) -> float:
    return sample.rate


def _cpu_s(sample: Sample) -> float:
    return sum(sample.cpu_s.values())


def _spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": median(ordered), "low": ordered[0], "high": ordered[-1]}


def _ratio(
    mine: Sequence[Sample],
    others: Sequence[Sample],
    value: Callable[[Sample], float],
    *,
    best: Callable[[Iterable[float]], float],
) -> float | None:
    """Return the median of the ratios within each round: interference in a round affects both values."""
    ratios = []
    for sample in mine:
        bases = [value(other) for other in others if other.round == sample.round]
        if bases and (base := best(bases)):
            ratios.append(value(sample) / base)
    return median(ratios) if ratios else None


def write(
    file: Path,
    samples: Sequence[Sample],
    settings: Settings,
    machine: dict[str, object],
    failures: Sequence[str],
) -> None:
    """Write all samples and the summary as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine,
        "settings": asdict(settings),
        "summary": summary(samples),
        "failures": list(failures),
        "samples": [asdict(sample) for sample in samples],
    }
    file.write_text(json.dumps(document, indent=1) + "\n")


def table(samples: Sequence[Sample], questions: Sequence[Question]) -> str:
    """Return the results as text."""
    rows = summary(samples)
    parts = []
    for question in questions:
        mine = [row for row in rows if row["question"] == question.name]
        if mine:
            of_memory = [row for row in mine if "memory_kib" in row]
            lines = _memory_lines(of_memory) if of_memory else _rate_lines(mine, question)
            parts.append("\n".join([f"{question.name}: {question.title}", *lines]))
    noisy = sorted({sample.round for sample in samples if sample.foreign_cpu > FOREIGN_LIMIT})
    if noisy:
        share = max(sample.foreign_cpu for sample in samples)
        parts.append(f"NOTE: other processes took up to {share:.0%} of this machine (rounds {noisy}).")
    return "\n\n".join(parts)


def _rate_lines(rows: Sequence[dict[str, Any]], question: Question) -> list[str]:
    unit, scale = _CPU_UNITS[question.unit]
    timed = "p50_us" in rows[0]
    head = ["", f"{question.unit}/s", "(range)", "x direct", "x haproxy", *(["p50 us", "p99 us"] if timed else [])]
    lines = [[*head, f"CPU {unit}", "(range)", "x haproxy", "of which"]]
    for row in rows:
        times = [f"{row[name]['median']:.0f}" for name in ("p50_us", "p99_us")] if timed else []
        shares = ", ".join(f"{part} {_number(cost['median'] * scale)}" for part, cost in row["cpu_s_of"].items())
        rate = [_number(row["rate"]["median"]), _range(row["rate"], 1.0)]
        cpu = [_number(row["cpu_s"]["median"] * scale), _range(row["cpu_s"], scale)] if shares else ["-", ""]
        ratios = [_times(row["rate_to_direct"]), _times(row["rate_to_haproxy"])]
        lines.append([row["way"], *rate, *ratios, *times, *cpu, _times(row["cpu_to_haproxy"] or None), shares])
    return _aligned(lines)


def _memory_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [["", "KiB each", "of which", "descriptors"]]
    for row in rows:
        memory, descriptors = row["memory_kib"], row["descriptors"]
        if memory:
            whole = sum(spread["median"] for spread in memory.values())
            shares = ", ".join(
                f"{part} {spread['median']:.1f} {_range(spread, 1.0)}" for part, spread in memory.items()
            )
            opened = ", ".join(f"{part} {spread['median']:.1f}" for part, spread in descriptors.items())
            lines.append([row["way"], f"{whole:.1f}", shares, opened])
    return _aligned(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _range(spread: dict[str, float], scale: float) -> str:
    return f"({_number(spread['low'] * scale)}-{_number(spread['high'] * scale)})"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
