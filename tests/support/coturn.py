"""Debian's coturn, started for a test and ended by its pid.

    with coturn(user="u", password="p", extra=["--stale-nonce=5"]) as server:
        connect to server.address, server.port

Mark the test with `@pytest.mark.needs("turnserver")` (and `interop`), so that it is skipped, with the reason, where
coturn is missing. Each server has its own empty configuration, database, log and pid file in a directory of its own.
"""

import contextlib
import ipaddress
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.waiting import wait_until

START_TIMEOUT_S = 15.0
RELAY_PORTS = 100
"""Default size of the relay range, which lies below Linux's ephemeral ports (from 32768)."""


class Coturn:
    """One turnserver process. `start()` again after `stop()` or `kill()` gives a new process on the same ports."""

    def __init__(
        self,
        *,
        user: str = "u",
        password: str = "p",
        secret: str | None = None,
        realm: str = "lab",
        address: str = "127.0.0.1",
        relay_address: str | None = None,
        port: int = 0,
        relay_range: tuple[int, int] | None = None,
        extra: Sequence[str] = (),
        prefix: Sequence[str] = (),
        certificate: Path | None = None,
    ) -> None:
        """Make a server that `start` starts.

        Args:
            secret: REST secret; coturn then ignores user and password.
            port: 0 picks a free one (coturn also opens the one above it).
            extra: more options. One with a value needs the `=`: after a space coturn ignores it silently.
            prefix: what to run it with, such as ["ip", "netns", "exec", NAME]; it must exec, so that the pid is
                coturn's.
            certificate: a PEM file with certificate and key; coturn then speaks TLS too, on the same port.
        """
        self.user, self.password, self.secret, self.realm = user, password, secret, realm
        self.address, self.relay_address = address, relay_address or address
        self.port = port or _free_port_pair(address)
        self.relay_range = relay_range or _free_range(address)
        self._certificate = certificate
        self._extra, self._prefix = list(extra), list(prefix)
        self._directory = Path(tempfile.mkdtemp(prefix="crossnet-coturn-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """Everything that it has logged since its last start."""
        path = self._directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it and wait until it answers on its port. RuntimeError with its log if it does not."""
        assert self._process is None
        (self._directory / "empty.conf").touch()
        (self._directory / "log").unlink(missing_ok=True)
        with (self._directory / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [*self._prefix, "turnserver", *self._options()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
            )
        process = self._process

        def output_text() -> str:
            return f"coturn did not start:\n{(self._directory / 'output').read_text(errors='replace')}\n{self.log}"

        try:
            wait_until(
                lambda: process.poll() is not None or self._answers(),
                START_TIMEOUT_S,
                what="start",
                details=output_text,
            )
            assert process.poll() is None, output_text()
        except AssertionError:
            self.kill()
            raise

    def stop(self) -> None:
        """End it as an operator would (SIGTERM), at the latest after two seconds by SIGKILL."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            self.kill()

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End it and remove its directory."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _options(self) -> list[str]:
        credentials = ["--lt-cred-mech", f"--user={self.user}:{self.password}"]
        if self.secret is not None:
            credentials = ["--use-auth-secret", f"--static-auth-secret={self.secret}"]
        # Without --cli-password coturn refuses to allow loopback peers, even with the command line switched off.
        loopback = ["--allow-loopback-peers", "--cli-password=x"]
        return [
            "-c",
            str(self._directory / "empty.conf"),
            "-n",
            f"--listening-ip={self.address}",
            f"--relay-ip={self.relay_address}",
            f"--listening-port={self.port}",
            f"--min-port={self.relay_range[0]}",
            f"--max-port={self.relay_range[1]}",
            f"--realm={self.realm}",
            f"--pidfile={self._directory / 'pid'}",
            f"--userdb={self._directory / 'db.sqlite'}",
            f"--log-file={self._directory / 'log'}",
            "--simple-log",
            "--new-log-timestamp",
            "-v",
            "--no-cli",
            "--no-dtls",
            *(loopback if ipaddress.ip_address(self.relay_address).is_loopback else []),
            *(
                ["--no-tls"]
                if self._certificate is None
                else [f"--cert={self._certificate}", f"--pkey={self._certificate}"]
            ),
            *credentials,
            *self._extra,
        ]

    def _answers(self) -> bool:
        """Tell whether it answers a Binding request. With a prefix, check its log: it may run in another network namespace."""
        if self._prefix:
            return "TCP listener opened" in self.log
        request = bytes.fromhex("000100002112a442") + b"is it there?"
        with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), timeout=1) as probe:
            probe.sendall(request)
            return probe.recv(20)[8:20] == request[8:20]
        return False


@contextlib.contextmanager
def coturn(
    *,
    user: str = "u",
    password: str = "p",
    secret: str | None = None,
    realm: str = "lab",
    address: str = "127.0.0.1",
    extra: Sequence[str] = (),
) -> Iterator[Coturn]:
    """Run a coturn on loopback while the block runs; `Coturn` takes more."""
    server = Coturn(user=user, password=password, secret=secret, realm=realm, address=address, extra=extra)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _is_free(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _free_port_pair(address: str) -> int:
    while True:
        port = random.randrange(10_000, 20_000, 2)
        if _is_free(address, port) and _is_free(address, port + 1):
            return port


def _free_range(address: str) -> tuple[int, int]:
    """Pick a block whose first port is free. If another program takes a port of it meanwhile, coturn tries the next one."""
    while True:
        first = random.randrange(20_000, 32_000, RELAY_PORTS)
        if _is_free(address, first):
            return first, first + RELAY_PORTS - 1
