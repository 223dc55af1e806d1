"""A worker: load generator or service in a process of its own, which gets commands and gives results as lines of JSON.

A worker ends when its standard input does, so none outlives the benchmark, however that ends.
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
    """A worker could not do what it was told, or died."""


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
        """Have a command carried out and return its result.

        Raises:
            WorkerError: it failed, or took longer than `limit_s`.
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
                raise WorkerError(f"{self.name} says nothing for {limit_s:g} s")
            data = os.read(descriptor, 65536)
            if not data:
                raise WorkerError(f"{self.name} ended, exit code {self._process.wait()}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def end(self) -> None:
        """See that it is gone."""
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
    """Let this process have as many descriptors as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve_commands(commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Carry out what standard input asks for, one command after the other, until it ends."""
    for line in sys.stdin:
        arguments = json.loads(line)
        answer(commands[arguments.pop("command")], arguments)


def answer(command: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> None:
    """Carry out one command and print its result, or what went wrong."""
    try:
        result = command(**arguments)
    except (OSError, EOFError, ValueError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)
