"""Real `crossnet run` processes and a real mutual-TLS service for tests. Each is killed by its pid."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossnet.lab.certificates import Authority
from crossnet.lab.service import command as service_command
from tests.support.waiting import listens, wait_until

START_TIMEOUT_S = 20.0
END_TIMEOUT_S = 20.0


class Running:
    """One `crossnet run`, which logs JSON lines to a file."""

    def __init__(self, folder: Path, config: str, *roles: str, name: str = "crossnet") -> None:
        self.folder = folder
        self.log = folder / f"{name}.log"
        (folder / f"{name}.yaml").write_text(config)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "crossnet", "run", "-c", f"{name}.yaml", *roles],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return its log events, or those of one name. Every line of the log must be a JSON object."""
        read = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [event for event in read if name is None or event.get("event") == name]

    def wait_for(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait until it has logged `count` events of this name, and return the last one."""

        def found() -> dict[str, Any] | None:
            ended = self.process.poll() is not None  # asked first: what it logged at its end still counts
            with contextlib.suppress(ValueError):  # the last line is not complete yet
                if len(events := self.events(name)) >= count:
                    return events[-1]
            assert not ended, f"the process ended without event {name}:\n{self.log.read_text()}"
            return None

        return wait_until(found, START_TIMEOUT_S, what=f"event {name}", details=self.log.read_text)

    def started(self) -> dict[str, list[str]]:
        """Wait until it has started, and return the addresses where it listens, by role."""
        listening = self.wait_for("started")["listening"]
        assert isinstance(listening, dict)
        return listening

    def ask(self, path: str, host: str | None = None) -> tuple[int, str]:
        """Get a path from its admin server. Returns status and body."""
        admin = self.started()["admin"][0]
        request = urllib.request.Request(f"http://{admin}{path}", headers={"Host": host or admin})
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait until it ends, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(END_TIMEOUT_S)

    def kill(self) -> None:
        """Kill it, as in a crash."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(folder: Path, config: str, *roles: str, name: str = "crossnet") -> Iterator[Running]:
    """Run these roles, by default all of the configuration, while the block runs."""
    process = Running(folder, config, *roles, name=name)
    try:
        yield process
    finally:
        process.kill()


@contextlib.contextmanager
def mutual_tls_service(folder: Path, *names: str) -> Iterator[tuple[int, list[str]]]:
    """Run a service for these names. Yields its port and curl's options for its CA and the client certificate."""
    authority = Authority(folder)
    server = authority.server("service", "a service", names)
    client = authority.client("client", "a client")
    port = free_port()
    with (folder / "service.log").open("wb") as output:
        process = subprocess.Popen(
            service_command("python", "127.0.0.1", port, server, authority.path, folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        log = folder / "service.log"
        wait_until(
            lambda: listens("127.0.0.1", port) or process.poll() is not None,
            START_TIMEOUT_S,
            what="the service listens",
            details=log.read_text,
        )
        assert process.poll() is None, log.read_text()
        trust = ["--cacert", str(authority.path), "--cert", str(client.certificate), "--key", str(client.key)]
        yield port, trust
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def curl(name: str, relay: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Request a name with curl through a relay."""
    return subprocess.run(
        [
            "curl",
            "-sS",
            "--max-time",
            "10",
            "--noproxy",
            "*",
            "--connect-to",
            f"{name}:443:{relay}",
            *options,
            f"https://{name}/",
        ],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
