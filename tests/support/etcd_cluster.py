"""Debian's etcd with one or more members, which are started for a test and ended by pid."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

START_TIMEOUT_S = 20.0


def free_ports(count: int) -> list[int]:
    """Return ports below the range of ephemeral ports, so that a restarted member gets its port again."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            port = random.randrange(20_000, 32_000)
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


class Member:
    """One etcd process."""

    def __init__(
        self,
        name: str,
        directory: Path,
        client_port: int,
        peer_port: int,
        extra: Sequence[str] = (),
        address: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._prefix = list(prefix)
        scheme = "https" if any("cert-file" in option for option in extra) else "http"
        self.url = f"{scheme}://{address}:{client_port}"
        self.peer_url = f"http://{address}:{peer_port}"
        self._directory = directory / name
        self._extra = extra
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, cluster: str) -> None:
        """Start it. After a restart it has its data again."""
        command = [*self._prefix, "etcd", "--name", self.name, "--data-dir", str(self._directory)]
        command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        command += ["--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url]
        command += ["--initial-cluster", cluster, "--heartbeat-interval", "50", "--election-timeout", "500"]
        command += ["--logger", "zap", "--log-level", "error", *self._extra]
        with (self._directory.parent / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: int) -> None:
        """Send it a signal, to stop or continue it."""
        assert self._process is not None
        self._process.send_signal(number)

    def ask(self, path: str, message: object, timeout_s: float = 2.0, token: str | None = None) -> dict[str, object]:
        """Call its JSON gateway. Raises OSError."""
        headers = {"Authorization": token} if token is not None else {}
        request = urllib.request.Request(f"{self.url}/v3/{path}", json.dumps(message).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            found: dict[str, object] = json.load(answer)
        return found

    def leads(self) -> bool:
        """Return whether it is the leader."""
        try:
            status = self.ask("maintenance/status", {}, 1.0)
        except OSError:
            return False
        return status.get("leader") == status["header"]["member_id"]  # type: ignore[index,no-any-return]


@contextlib.contextmanager
def etcd_cluster(directory: Path, count: int = 1, extra: Sequence[str] = ()) -> Iterator[list[Member]]:
    """Run members until the block ends."""
    ports = free_ports(2 * count)
    members = [Member(f"m{n}", directory, ports[2 * n], ports[2 * n + 1], extra) for n in range(count)]
    with _started(members, directory):
        yield members


@contextlib.contextmanager
def etcd_hosts(directory: Path) -> Iterator[tuple[list[Member], Callable[[bool], None]]]:
    """Run three members, each in its own network namespace on a bridge.

    Yields the members, and a function that cuts the third off from the other two (True) or reconnects it (False). All three
    can always be reached from here.
    """
    tag = f"{os.getpid() % 100_000}"
    bridge, hosts = f"xb{tag}", [f"xh{tag}-{number}" for number in (1, 2, 3)]
    addresses = [f"10.93.{int(tag) % 250}.{number}" for number in (1, 2, 3)]
    here = f"10.93.{int(tag) % 250}.254"

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True, timeout=10)

    def cut(away: bool) -> None:
        # In both directions: otherwise packets that need no answer would still arrive.
        for host, address in zip(hosts[:2], addresses[:2], strict=True):
            for at, other in ((hosts[2], address), (host, addresses[2])):
                ip("-n", at, "route", "add" if away else "del", "blackhole", f"{other}/32")

    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{here}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number, (host, address) in enumerate(zip(hosts, addresses, strict=True)):
            ip("netns", "add", host)
            ip("link", "add", f"xv{tag}-{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", f"xv{tag}-{number}", "master", bridge, "up")
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        members = [
            Member(host, directory, 2379, 2380, (), address, ["ip", "netns", "exec", host])
            for host, address in zip(hosts, addresses, strict=True)
        ]
        with _started(members, directory):
            yield members, cut
    finally:
        for host in hosts:
            ip("netns", "del", host, check=False)
        ip("link", "del", bridge, check=False)


@contextlib.contextmanager
def _started(members: Sequence[Member], directory: Path) -> Iterator[None]:
    names = ",".join(f"{member.name}={member.peer_url}" for member in members)
    try:
        for member in members:
            member.start(names)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _ready(members):
            if time.monotonic() > deadline:
                logs = "".join(path.read_text(errors="replace") for path in directory.glob("*.log"))
                raise TimeoutError(f"etcd does not start: {logs[-1000:]}")
            time.sleep(0.05)
        yield
    finally:
        for member in members:
            member.kill()


def _ready(members: Sequence[Member]) -> bool:
    if members[0].url.startswith("https"):
        port = int(members[0].url.rpartition(":")[2])
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0
    try:
        for member in members:
            member.ask("kv/range", {"key": "eA=="}, 1.0)
    except OSError:
        return False
    return True
