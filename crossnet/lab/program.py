"""The lab's processes: started, waited for until they are ready, ended whatever happens."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

START_TIMEOUT_S = 20.0
"""A role starts in half a second; six at once on a small machine under load take a few."""

STOP_TIMEOUT_S = 5.0
LOOK_EVERY_S = 0.03
TAIL_LINES = 8


class ProgramError(Exception):
    """A process of the lab does not do what it must; the text has the end of its log."""


class Program:
    """One process. What it prints goes into a file of its own."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, *, stop_timeout_s: float = STOP_TIMEOUT_S
    ) -> None:
        """Prepare a process that runs `command` in `folder`, and logs there. It has `stop_timeout_s` to end after SIGTERM."""
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
        """Start it. Raises ProgramError if there is no such program."""
        # Killed with us, should we be killed: nobody else would end it.
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
        """Wait until it is ready. Raises ProgramError when it ends before, or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if self._process is not None and self._process.poll() is not None:
                raise ProgramError(f"{self.name} ended with exit code {self._process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ProgramError(f"{self.name}: {what} not within {START_TIMEOUT_S:g} s:\n{self.tail()}")
            time.sleep(LOOK_EVERY_S)

    def lines(self) -> list[str]:
        """Return what it has logged."""
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
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def end(self) -> None:
        """See that it is gone: SIGKILL for one that does not follow."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._stop_timeout_s)
        self.kill()
