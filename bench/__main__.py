"""The command: `python -m bench`."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bench import machine, report
from bench.questions import QUESTIONS, Question, Sample, Settings, measure, probe
from bench.ways import SBIN, WAYS, Way, missing
from bench.worker import ROOT, Worker, WorkerError
from crossnet.lab.program import ProgramError

DEFAULT_ROUNDS = 5
DEFAULT_WAYS = tuple(way for way in WAYS if way != "gateway")


class Bench:
    """One run: every round asks every way the same questions, in turn."""

    def __init__(self, questions: Sequence[Question], ways: Sequence[str], settings: Settings, folder: Path) -> None:
        self._questions = questions
        self._ways = ways
        self._settings = settings
        self._folder = folder
        self.samples: list[Sample] = []
        self.failures: list[str] = []

    def run(self, rounds: int) -> None:
        """Measure. Failures are recorded, and the other measurements continue."""
        with contextlib.ExitStack() as stack:
            service = Worker("bench.service")
            stack.callback(service.end)
            port = service.ask("port", limit_s=10)["port"]
            load = Worker("bench.load")
            stack.callback(load.end)
            for number in range(1, rounds + 1):
                with self._started(number, load, port) as ways:
                    for question in self._questions:
                        # Every other round runs backwards, so that no way always follows the heaviest one.
                        for way in ways if number % 2 else reversed(ways):
                            self._measure(question, load, way, number, rounds)

    @contextlib.contextmanager
    def _started(self, number: int, load: Worker, port: int) -> Iterator[list[Way]]:
        """Start every way anew, so that the memory layout and ports of one round do not affect all rounds."""
        ways = []
        with contextlib.ExitStack() as stack:
            for name in self._ways:
                way = Way(name, self._folder / f"{number}-{name}", port)
                stack.callback(way.end)
                try:
                    way.start()
                    probe(load, way)
                except (ProgramError, WorkerError) as error:
                    self._failed(f"round {number}: {name} does not start: {error}{way.complaints()}")
                else:
                    ways.append(way)
            yield ways

    def _measure(self, question: Question, load: Worker, way: Way, number: int, rounds: int) -> None:
        try:
            sample = measure(question, load, way, self._settings, number)
        except WorkerError as error:
            self._failed(f"round {number}: {question.name} by {way.name}: {error}{way.complaints()}")
            return
        self.samples.append(sample)
        cpu = f", CPU {sum(sample.cpu_s.values()):.3g} s each" if sample.cpu_s else ""
        say(f"round {number}/{rounds}  {question.name:<10}  {way.name:<14}  {sample.rate:.3g} {question.unit}/s{cpu}")

    def _failed(self, text: str) -> None:
        self.failures.append(text)
        say(f"FAILED {text}")


def say(text: str) -> None:
    """Print progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(question.name for question in QUESTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure crossnet against a direct connection and against HAProxy, on loopback, in one run.",
        epilog=f"questions: {names}; ways: {', '.join(WAYS)} (gateway only when named). bench/README.md explains "
        "the figures and their limits.",
    )
    parser.add_argument("--rounds", type=_positive, default=DEFAULT_ROUNDS, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=Settings().seconds, help="duration of each measurement (default: %(default)s)"
    )
    parser.add_argument("--bytes", type=_positive, default=0, help="move this many bytes per bulk stream instead")
    parser.add_argument(
        "--idle", type=_positive, default=Settings().idle_streams, help="idle streams for memory (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="questions (`connect` means connect-1 and connect-16) and ways",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/TIME.json")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected a number of at least 1")
    return number


def choose(only: Sequence[str]) -> tuple[list[Question], list[str]]:
    """Return the questions and ways that these names select. `direct` is always included for comparison.

    Raises:
        ValueError: a name is unknown.
    """
    asked = [question for question in QUESTIONS if {question.name, question.name.partition("-")[0]} & set(only)]
    ways = [way for way in WAYS if way in only]
    known = {*WAYS, *(name for question in asked for name in (question.name, question.name.partition("-")[0]))}
    for name in only:
        if name not in known:
            raise ValueError(f"{name!r} is neither a question nor a way")
    if ways and "direct" not in ways:
        ways.insert(0, "direct")
    return asked or list(QUESTIONS), ways or list(DEFAULT_WAYS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table and write the JSON file. Returns 1 if a measurement failed."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        questions, ways = choose(given.only)
    except ValueError as error:
        parser.error(str(error))
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{SBIN}"
    for way in ways[:]:
        if (program := missing(way)) is not None:
            say(f"without {way}: {program} is not installed")
            ways.remove(way)
    settings = replace(Settings(), seconds=given.seconds, bytes=given.bytes, idle_streams=given.idle)
    # A signal must not leave processes behind: it becomes an exception, which stops everything that was started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    began = datetime.now(UTC)
    described = {"began": began.isoformat(timespec="seconds"), **machine.describe(), "rounds": given.rounds}
    with tempfile.TemporaryDirectory(prefix="crossnet-bench-") as folder:
        bench = Bench(questions, ways, settings, Path(folder))
        try:
            bench.run(given.rounds)
        except KeyboardInterrupt:
            bench.failures.append("interrupted")
    if bench.samples:
        print("\n".join(f"{name}: {value}" for name, value in described.items()) + "\n")
        print(report.table(bench.samples, questions))
    file = given.json or ROOT / "bench" / "results" / f"{began:%Y%m%dT%H%M%SZ}.json"
    report.write(file, bench.samples, settings, described, bench.failures)
    say(f"written: {file}")
    for failure in bench.failures:
        say(f"FAILED {failure}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
