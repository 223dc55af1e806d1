"""Workers: load generator and service run in processes of their own, with commands and results as lines of JSON.

A worker ends when its standard input does, so none outlives the benchmark, however the benchmark ends.
"""

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

END_TIMEOUT_S = 5.0


class WorkerError(Exception):
    """A command failed, or the worker ended."""


class Worker:
    """The benchmark's side of one worker."""

    def __init__(self, module: str) -> None:
        """Start `python -m MODULE`."""
        self.name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._rest = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, command: str, *, limit_s: float, **arguments: object) -> dict[str, Any]:
        """Run a command and return its result.

        Raises:
            WorkerError: the command failed, or took longer than `limit_s`.
        """
        assert self._process.stdin is not None
        line = json.dumps({"command": command, **arguments}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
        except OSError as error:
            raise WorkerError(f"{self.name} is gone: {error}") from error
        result: dict[str, Any] = json.loads(self._line(limit_s))
        if "error" in result:
            raise WorkerError(f"{self.name}: {command}: {result['error']}")
        return result

    def _line(self, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([descriptor], [], [], limit_s)[0]:
                raise WorkerError(f"{self.name} does not answer within {limit_s:g} s")
            data = os.read(descriptor, 65536)
            if not data:
                raise WorkerError(f"{self.name} ended, exit code {self._process.wait()}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def end(self) -> None:
        """End it, and wait for it; kill it if it takes too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def allow_open_files() -> None:
    """Raise the limit of open files of this process to its maximum."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve_commands(commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Run the commands on standard input, one after the other, until it ends."""
    for line in sys.stdin:
        arguments = json.loads(line)
        answer(commands[arguments.pop("command")], arguments)


def answer(command: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> None:
    """Run one command and print its result, or its error."""
    try:
        result = command(**arguments)
    except (OSError, EOFError, ValueError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)
