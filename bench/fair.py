"""Fairness: how long a real client waits while attackers send faster than the process parses.

    python -m bench.fair --attackers 1 64 --only stun relay

Real `crossnet run` processes with default settings: one in network a (relay, embedded TURN server, discovery server) and one in
network b (gateway). For each flood, a real client of the flooded process repeats one operation: a stream by the local
route, a STUN Binding on a new connection, or a stream through the gateway. Reported are its p50 and p99, alone and during the
flood, and how long the flooded process takes to end after SIGTERM.

The goal: p99 during the flood is at most five times p99 alone, or 25 ms, whichever is more; the process ends within `drain`.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trustme

from bench import fair_dns, fair_http, machine
from bench.exchange import ECHO, READY, client_hello, request
from bench.fairness import DRAIN_S, FIRST, LIMIT_S, PAUSE_S, compared, free_port
from bench.floods import call, candidate, key_of, name_of, opened, opener
from bench.worker import ROOT, Worker
from sniproxy.transport.errors import DialError, ResetBeforeReady
from turnreg.stun.message import Message, MessageClass, Method

HOST = "127.0.0.1"
LOOPBACK = ["127.0.0.0/8"]


FLOODS = {
    "stun-bindings": ("local", "binding"),
    "stun-indications": ("local", "binding"),
    "tls-bindings": ("local", "binding"),
    "udp-bindings": ("local", "binding"),
    "relay-empty": ("local",),
    "relay-one-byte": ("local",),
    "relay-unknown": ("local",),
    "relay-received": ("local",),
    "gateway-empty": ("gateway",),
    "gateway-one-byte": ("gateway",),
    "gateway-unknown": ("gateway",),
    "warm-ping": ("gateway",),
}
"""Each flood, and the kinds of real clients that are measured during it: clients of the flooded process."""


@dataclass
class Mesh:
    """The processes of two networks on loopback."""

    folder: Path
    service: int
    sink: int
    """Port that the attackers' streams lead to: their data must not flood the real client's service."""
    near: subprocess.Popen[bytes] = field(init=False)
    far: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.ports = {
            name: free_port() for name in ("relay", "turn", "turns", "udp", "discovery", "gateway", "hostile")
        }
        self.keys = {pair: secrets.token_hex(32) for pair in ("ab", "ah", "cb")}
        for pair, text in self.keys.items():
            self._secret(f"{pair}.key", text)
        self._secret("password", "secret")
        certificate = trustme.CA().issue_cert("turn.example")
        certificate.private_key_pem.write_to_path(self.folder / "turn.key")
        certificate.cert_chain_pems[0].write_to_path(self.folder / "turn.pem")

    def start(self) -> None:
        """Start both processes."""
        at = {name: f"{HOST}:{port}" for name, port in self.ports.items()}
        mesh = {
            "networks": [{"id": network} for network in "abch"],
            "gateways": [
                {"network": "b", "id": "gw-1", "address": at["gateway"]},
                {"network": "h", "id": "gw-h", "address": at["hostile"]},
            ],
        }
        (self.folder / "mesh.yaml").write_text(json.dumps(mesh))
        self.near = self._run(
            "near",
            {
                "network": "a",
                "discovery": [f"http://{at['discovery']}", "mesh.yaml"],
                "discovery_server": {"listen": at["discovery"], "allow_addresses": LOOPBACK},
                "keys": self._key_section("ah"),
                "relay": {
                    "id": "relay-1",
                    "listen": at["relay"],
                    "deliver": [f"{HOST}/32"],
                    "direct": LOOPBACK,
                    "pool": 0,
                },
                "turn": {
                    "id": "turn-1",
                    "listen": at["turn"],
                    "tls": {"listen": at["turns"], "cert": "turn.pem", "key": "turn.key"},
                    "listen_udp": at["udp"],
                    "relay_address": HOST,
                    "users": {"u": {"file": "password"}},
                    "allow_peers": LOOPBACK,
                },
            },
        )
        gateway = {"id": "gw-1", "listen": at["gateway"], "allow": [f"{HOST}/32"], "max_streams_per_network": 200}
        self.far = self._run(
            "far",
            {"network": "b", "discovery": ["mesh.yaml"], "keys": self._key_section("ab", "cb"), "gateway": gateway},
        )

    def end(self) -> None:
        """Kill both processes, and wait for them."""
        for process in (self.near, self.far):
            process.kill()
            process.wait()

    def where(self) -> dict[str, Any]:
        """Return what the attackers need to know."""
        return {
            "turn": [HOST, self.ports["turn"]],
            "turns": [HOST, self.ports["turns"]],
            "udp": [HOST, self.ports["udp"]],
            "relay": [HOST, self.ports["relay"]],
            "gateway": [HOST, self.ports["gateway"]],
            "gateway_port": self.ports["hostile"],
            "key": self.keys["ab"],
            "service": self.sink,
        }

    def _key_section(self, *pairs: str) -> dict[str, Any]:
        return {f"{pair}-1": {"file": f"{pair}.key", "from": pair[0], "to": pair[1]} for pair in pairs}

    def _secret(self, file: str, text: str) -> None:
        path = self.folder / file
        path.touch(0o600)
        path.write_text(text)

    def _run(self, name: str, document: dict[str, Any]) -> subprocess.Popen[bytes]:
        config, log = self.folder / f"{name}.yaml", self.folder / f"{name}.log"
        # JSON is YAML without aliases.
        config.write_text(json.dumps({**document, "admin": f"{HOST}:0", "drain": f"{DRAIN_S}s"}))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "crossnet", "run", "-c", config.name],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        for _ in range(400):
            if '"event":"started"' in log.read_text():
                return process
            if process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(log.read_text())


class Client:
    """The real client, which repeats one kind of operation."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._relay = opener(key_of(mesh.keys["cb"], "c", "b"))
        self._hello = client_hello(name_of("a", mesh.service))
        self._asked = call(name_of("b", mesh.service))

    def took_ms(self, what: str, seconds: float) -> list[float]:
        """Repeat for this many seconds. Returns the sorted durations in milliseconds; a failure counts as LIMIT_S."""
        act: Callable[[], None] = {"local": self._local, "binding": self._binding, "gateway": self._gateway}[what]
        took = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.perf_counter()
            try:
                act()
                took.append((time.perf_counter() - began) * 1000)
            except (OSError, EOFError, DialError, ResetBeforeReady) as error:
                print(f"    {what}: {error!r}", file=sys.stderr)
                took.append(LIMIT_S * 1000)
            time.sleep(PAUSE_S)
        return sorted(took)

    def _local(self) -> None:
        with socket.create_connection((HOST, self._mesh.ports["relay"]), timeout=LIMIT_S) as sock:
            sock.sendall(self._hello + request(ECHO))
            if sock.recv(1) != READY:
                raise EOFError

    def _binding(self) -> None:
        with socket.create_connection((HOST, self._mesh.ports["turn"]), timeout=LIMIT_S) as sock:
            sock.sendall(Message(Method.BINDING, MessageClass.REQUEST, secrets.token_bytes(12)).pack())
            if not sock.recv(1):
                raise EOFError

    def _gateway(self) -> None:
        asyncio.run(self._stream())

    async def _stream(self) -> None:
        mesh = self._mesh
        way = candidate("b", "gw-1", (HOST, mesh.ports["gateway"]), f"{HOST}:{mesh.service}")
        asked = replace(self._asked, stream=secrets.token_bytes(16))
        async with asyncio.timeout(LIMIT_S):
            connection = await opened(self._relay, asked, way)
            try:
                await connection.send_data(request(ECHO))
                while not await connection.read():
                    pass
            finally:
                connection.stream.close()


def measure(what: str, attackers: int, seconds: float, folder: Path, service: int, *, first: bool) -> dict[str, Any]:
    """Measure one flood, with processes of its own."""
    result: dict[str, Any] = {"flood": what, "attackers": attackers}
    with serving() as sink:
        mesh = Mesh(folder, service, sink)
        mesh.start()
        try:
            result |= _flooded(what, attackers, seconds, mesh, first=first)
        finally:
            mesh.end()
    return result


def _flooded(what: str, attackers: int, seconds: float, mesh: Mesh, *, first: bool) -> dict[str, Any]:
    flooded = mesh.far if FLOODS[what] == ("gateway",) else mesh.near
    result: dict[str, Any] = {}
    floods = Worker("bench.floods")
    os.setpriority(os.PRIO_PROCESS, floods.pid, 0)
    try:
        if first:
            os.setpriority(os.PRIO_PROCESS, flooded.pid, FIRST)
        client = Client(mesh)
        for victim in FLOODS[what]:
            alone = client.took_ms(victim, seconds)
            floods.ask("flood", what=what, attackers=attackers, limit_s=10, **mesh.where())
            time.sleep(0.5)
            attacked = client.took_ms(victim, seconds)
            result[victim] = compared(alone, attacked) | floods.ask("stop", limit_s=60)
        floods.ask("flood", what=what, attackers=attackers, limit_s=10, **mesh.where())
        time.sleep(0.5)
        result["sigterm_s"] = _ended_after_s(flooded)
        result["ok"] = result["sigterm_s"] is not None and all(result[victim]["ok"] for victim in FLOODS[what])
        floods.ask("stop", limit_s=60)
    finally:
        floods.end()
    return result


def _ended_after_s(process: subprocess.Popen[bytes]) -> float | None:
    """Send SIGTERM. Returns the seconds until the process ended, or None if it did not within its drain and 10 s."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        # A relay keeps accepting while resolvers may still return its address: for the TTL and 2 s.
        process.wait(DRAIN_S + 10)
    except subprocess.TimeoutExpired:
        return None
    return round(time.monotonic() - began, 2)


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """Run the service that streams lead to while the block runs. Yields its port."""
    worker = Worker("bench.service")
    try:
        yield worker.ask("port", limit_s=10)["port"]
    finally:
        worker.end()


def _others(part: str, given: argparse.Namespace) -> int:
    """Run the benchmark of the resolver or of the HTTP servers. Returns 1 if it misses a goal."""
    first = ["--first"] * given.first
    if part == "dns":
        numbers = ["--connections", *map(str, given.attackers)]
        return fair_dns.main(["--seconds", str(given.seconds), *numbers, *first])
    runs = [fair_http.main(["--seconds", str(given.seconds), "--attackers", str(each)]) for each in given.attackers]
    return max(runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print JSON. Returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fair", description="How long a real client waits during floods."
    )
    parser.add_argument(
        "--attackers", type=int, nargs="+", default=[1, 64], help="numbers of flooding connections (1 64)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=[], help=f"floods, or prefixes of them: {', '.join(FLOODS)}, dns, http (all)"
    )
    parser.add_argument(
        "--first", action="store_true", help="take priority over all other processes of a busy machine (root)"
    )
    given = parser.parse_args(arguments)
    if given.first:
        os.setpriority(os.PRIO_PROCESS, 0, FIRST)
    chosen = [what for what in FLOODS if not given.only or any(what.startswith(only) for only in given.only)]
    results = []
    with serving() as service:
        for what in chosen:
            for attackers in given.attackers:
                with tempfile.TemporaryDirectory(prefix="crossnet-fair-") as folder:
                    results.append(measure(what, attackers, given.seconds, Path(folder), service, first=given.first))
                print(json.dumps(results[-1]), flush=True)
    failed = [part for part in ("dns", "http") if (not given.only or part in given.only) and _others(part, given)]
    missed = [f"{each['flood']} x {each['attackers']}" for each in results if not each["ok"]] + failed
    print(json.dumps({"machine": machine.describe(), "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
