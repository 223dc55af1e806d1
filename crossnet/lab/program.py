"""A process of the lab: it is started, waited for until it is ready, and always ended."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

START_TIMEOUT_S = 20.0
"""A role starts in half a second; six at once take a few seconds on a small machine under load."""

STOP_TIMEOUT_S = 5.0
LOOK_EVERY_S = 0.03
TAIL_LINES = 8


class ProgramError(Exception):
    """A process of the lab does not work; the text contains the end of its log."""


class Program:
    """One process. Its output goes to a file of its own."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, *, stop_timeout_s: float = STOP_TIMEOUT_S
    ) -> None:
        """Describe a process that runs `command` in `folder` and logs there. `end` gives it `stop_timeout_s` before SIGKILL."""
        self.name = name
        self.command = list(command)
        self.log = folder / f"{name}.log"
        self._folder = folder
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it. Raises ProgramError if the program cannot be run."""
        # If we are killed, the kernel kills it, too: nobody else would end it.
        prefix = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        with self.log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    [*prefix, *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self._folder,
                )
            except OSError as error:
                raise ProgramError(f"{self.name}: {error}") from error

    def wait_until(self, what: str, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` is true. Raises ProgramError if the process ends first, or that takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if self._process is not None and self._process.poll() is not None:
                raise ProgramError(f"{self.name} ended with exit code {self._process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ProgramError(f"{self.name}: {what} not within {START_TIMEOUT_S:g} s:\n{self.tail()}")
            time.sleep(LOOK_EVERY_S)

    def lines(self) -> list[str]:
        """Return the lines that it has logged."""
        try:
            return self.log.read_text(errors="replace").splitlines()
        except OSError:
            return []

    def tail(self) -> str:
        """Return the last lines of its log."""
        last = [f"    {line[:400]}" for line in self.lines()[-TAIL_LINES:]]
        return "\n".join(last) or "    (it has logged nothing)"

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill it at once, as in a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def end(self) -> None:
        """Wait for it to end, and kill it if it does not in time."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._stop_timeout_s)
        self.kill()
