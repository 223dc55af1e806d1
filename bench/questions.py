"""The measurements that are made of every way, including the cost of the processes that carry the bytes."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench import meter
from bench.ways import Way
from bench.worker import Worker, WorkerError

SLACK_S = 60.0
"""Added to a measurement's own duration: for its start, its end and its own timeouts."""

SETTLE_S = 0.1
"""Pause before the cost is read, so that processes can finish, for example by logging the last stream."""

MESSAGE_BYTES = 64

PROBE_TIMEOUT_S = 20.0
"""Until an allocation is made, published and permitted: well under a second, longer on a loaded machine."""
PROBE_EVERY_S = 0.05
WARM_UP_STREAMS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Duration and size of the measurements."""

    seconds: float = 2.0
    bytes: int = 0
    """Bytes that each bulk stream moves, however long it takes; 0: as many as possible in `seconds`."""
    idle_streams: int = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement. `cpu_s`, `memory_kib` and `descriptors` are per unit moved, by process."""

    question: str
    way: str
    round: int
    count: float
    """Units moved: GB, connections, messages or streams."""
    seconds: float
    rate: float
    values: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    memory_kib: dict[str, float] = field(default_factory=dict)
    descriptors: dict[str, float] = field(default_factory=dict)
    foreign_cpu: float = 0.0
    """Share of this machine's CPU time that other processes used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One kind of measurement."""

    name: str
    title: str
    unit: str
    ask: Callable[[Worker, Way, Settings], dict[str, Any]]


def _bulk(direction: str, streams: int) -> Question:
    def ask(load: Worker, way: Way, settings: Settings) -> dict[str, Any]:
        arguments = {"streams": streams, "direction": direction, "seconds": settings.seconds, "count": settings.bytes}
        result = _command(load, "bulk", way, settings, **arguments)
        return {**result, "count": result["bytes"] / 1e9}

    path = "client to service" if direction == "up" else "service to client"
    title = f"bulk, {path}, {_streams(streams)}"
    return Question(name=f"{direction}-{streams}", title=title, unit="GB", ask=ask)


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


def _connections(streams: int) -> Question:
    def ask(load: Worker, way: Way, settings: Settings) -> dict[str, Any]:
        return _command(load, "connections", way, settings, streams=streams, seconds=settings.seconds)

    title = f"connections: open, hello, first byte, close, {streams} at a time"
    return Question(name=f"connect-{streams}", title=title, unit="connection", ask=ask)


def _round_trips(streams: int) -> Question:
    def ask(load: Worker, way: Way, settings: Settings) -> dict[str, Any]:
        arguments = {"streams": streams, "seconds": settings.seconds, "size": MESSAGE_BYTES}
        return _command(load, "round_trips", way, settings, **arguments)

    title = f"round trips of {MESSAGE_BYTES} bytes, {_streams(streams)}"
    return Question(name=f"echo-{streams}", title=title, unit="message", ask=ask)


def _idle(load: Worker, way: Way, settings: Settings) -> dict[str, Any]:
    began = time.monotonic()
    _command(load, "hold", way, settings, streams=settings.idle_streams)
    time.sleep(SETTLE_S)
    held = meter.costs(way.pids)
    load.ask("release", limit_s=SLACK_S)
    return {"count": settings.idle_streams, "seconds": time.monotonic() - began, "held": held}


def _command(load: Worker, command: str, way: Way, settings: Settings, **arguments: object) -> dict[str, Any]:
    limit_s = settings.seconds + SLACK_S
    return load.ask(command, limit_s=limit_s, address=way.address, name=way.asked, **arguments)


QUESTIONS = (
    # Memory first: memory that other measurements have used and freed would be reused.
    Question(name="idle", title="idle streams", unit="stream", ask=_idle),
    *(_bulk(direction, streams) for streams in (1, 16) for direction in ("up", "down")),
    *(_connections(streams) for streams in (1, 16)),
    *(_round_trips(streams) for streams in (1, 16)),
)


def probe(load: Worker, way: Way) -> None:
    """Wait until streams get through, and open a few, so that every process is warmed up. Raises WorkerError."""
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    done = 0
    while done < WARM_UP_STREAMS:
        try:
            load.ask("probe", limit_s=PROBE_TIMEOUT_S, address=way.address, name=way.asked)
            done += 1
        except WorkerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PROBE_EVERY_S)


def measure(question: Question, load: Worker, way: Way, settings: Settings, round_: int) -> Sample:
    """Make one measurement of one way.

    Raises:
        WorkerError: a stream was refused, cut or stalled.
    """
    before, ours, busy, began = meter.costs(way.pids), meter.cost(os.getpid()).cpu_s, meter.busy_s(), time.monotonic()
    result = question.ask(load, way, settings)
    time.sleep(SETTLE_S)
    used = meter.difference(meter.costs(way.pids), before)
    foreign = (meter.busy_s() - busy) - (meter.cost(os.getpid()).cpu_s - ours)
    available = (time.monotonic() - began) * (os.cpu_count() or 1)
    count = result["count"]
    held = meter.difference(result["held"], before) if "held" in result else {}
    return Sample(
        question=question.name,
        way=way.name,
        round=round_,
        count=count,
        seconds=result["seconds"],
        rate=count / result["seconds"],
        values={name: result[name] for name in ("p50_us", "p99_us") if name in result},
        cpu_s={part: cost.cpu_s / count for part, cost in used.items()},
        memory_kib={part: cost.rss_bytes / 1024 / count for part, cost in held.items()},
        descriptors={part: cost.descriptors / count for part, cost in held.items()},
        foreign_cpu=max(0.0, foreign / available),
    )
