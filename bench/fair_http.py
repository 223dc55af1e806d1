"""Fairness of HTTP: how long real clients of the discovery and admin servers wait under attack.

    python -m bench.fair_http --seconds 5 --attackers 64

For each attack, a `crossnet run` with a discovery server, a relay and an admin server is started anew. Five real clients ask ten
times a second each, on one connection as our own clients do, first alone and then during the attack. The attackers have a
process of their own at the lowest priority. Then SIGTERM is sent while the attack continues. Reported for each attack: p50 and
p99 alone and under attack, and how long the process took to end. Exit code 1: the p99 exceeds both five times the p99 alone and
25 ms, or the process did not end in time.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench.fairness import FACTOR, FLOOR_MS
from discovery.api.tokens import format_entry, make_entry, make_token

END_LIMIT_S = 8.0
"""For a shutdown without streams: releasing records, allocations and the lease may take 5 s."""

START_LIMIT_S = 20.0
PAUSE_S = 0.1
CLIENTS = 5
REQUEST_LIMIT_S = 10.0
RECORDS = 3000
BATCH = 200
"""Requests per write of a client that pipelines."""

CONFIG = """
network: a
discovery: "http://127.0.0.1:{port}"
token: {{file: operator.token}}
admin: 127.0.0.1:0
drain: 0
discovery_server:
  listen: 127.0.0.1:{port}
  tokens: {{file: tokens.yaml}}
relay: {{id: relay-1, listen: "127.0.0.1:0", advertise: [10.0.0.9]}}
"""

HANDOVER_CONFIG = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
handover: {folder}/handover.sock
relay: {{id: relay-1, listen: "127.0.0.1:0", advertise: [10.0.0.9]}}
"""


class Target:
    """A process under attack."""

    def __init__(self, folder: Path, config: str) -> None:
        """Write its configuration and start it. Raises RuntimeError."""
        self.tokens = {name: make_token() for name in ("operator", "victim", "attacker")}
        entries = [
            make_entry(self.tokens["operator"], name="operator", admin=True),
            make_entry(self.tokens["victim"], name="victim", network="b", kinds=["relay"]),  # type: ignore[list-item]
            make_entry(self.tokens["attacker"], name="attacker", network="c", kinds=["service"], names=["**"]),  # type: ignore[list-item]
        ]
        (folder / "tokens.yaml").write_text("\n".join(map(format_entry, entries)))
        (folder / "operator.token").write_text(self.tokens["operator"])
        (folder / "operator.token").chmod(0o600)
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.discovery = probe.getsockname()[1]
        (folder / "x.yaml").write_text(config.format(port=self.discovery, folder=folder))
        (folder / "mesh.yaml").write_text("networks: [{id: a}]")
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crossnet", "run", "-c", "x.yaml"],
            cwd=folder,
            stderr=self.log,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        deadline = time.monotonic() + START_LIMIT_S
        self.admin = 0
        while not self.admin:
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.end()
                raise RuntimeError(f"the process has not started:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
            for line in (folder / "log").read_text().splitlines():
                if '"event":"started"' in line:
                    self.admin = int(json.loads(line)["listening"]["admin"][0].rpartition(":")[2])

    def terminate(self) -> float:
        """Send SIGTERM. Returns the seconds until the process ended, or infinity if it did not in time."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            return float("inf")
        return time.monotonic() - begun

    def end(self) -> None:
        """Kill the process if it still runs, and close its log."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


class Client:
    """One persistent connection, with one request at a time."""

    def __init__(self, port: int, token: str | None) -> None:
        """`port` is on loopback. Without a token, requests have no Authorization header."""
        self._port = port
        self._token = f"Authorization: Bearer {token}\r\n" if token is not None else ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request and return the status of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        reader, writer = self._streams
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{self._token}Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                await reader.readexactly(int(value))
        return int(head.split(b" ", 2)[1])

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def latencies(client: Client, what: tuple[str, str, bytes], seconds: float) -> list[float]:
    """Ask for this many seconds. Returns the milliseconds of each answer; a failed request counts as REQUEST_LIMIT_S."""
    found = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        await asyncio.sleep(random.uniform(0, 2 * PAUSE_S))
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                status = await client.ask(*what)
        except (TimeoutError, OSError, EOFError):
            client.close()
            status = 0
        good = 200 <= status < 300
        found.append((time.perf_counter() - begun) * 1000 if good else REQUEST_LIMIT_S * 1000)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def fill(port: int, token: str) -> None:
    """Write the records that make answers large."""
    client = Client(port, token)
    spec = {"name": "s.x", "ports": {"443": [f"10.9.0.{last}:8443" for last in range(1, 6)]}}
    for number in range(RECORDS):
        body = json.dumps({"spec": spec | {"name": f"s{number}.x"}}).encode()
        assert await client.ask("PUT", f"/v1/records/service/a/s{number}", body) == 201
    client.close()


# The attacks. Each runs repeatedly, from an address of its own.


async def _connected(place: dict[str, Any], port: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", place[port], local_addr=(place["address"], 0))


def _request(place: dict[str, Any], path: str, *, token: bool, method: str = "GET", more: str = "") -> bytes:
    authorization = f"Authorization: Bearer {place['token']}\r\n" if token else ""
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{authorization}{more}\r\n".encode()


async def _pipeline(place: dict[str, Any], port: str, data: bytes) -> None:
    reader, writer = await _connected(place, port)
    try:
        async with asyncio.TaskGroup() as group:

            async def read() -> None:
                while await reader.read(1 << 18):
                    pass
                raise ConnectionResetError

            group.create_task(read())
            while True:
                writer.write(data)
                await writer.drain()
    finally:
        writer.transport.abort()


async def pipelined(place: dict[str, Any]) -> None:
    """Pipeline requests without a token."""
    await _pipeline(place, "discovery", _request(place, "/v1/records/relay/b/r", token=False) * BATCH)


async def pipelined_token(place: dict[str, Any]) -> None:
    """Pipeline requests with another network's token."""
    await _pipeline(place, "discovery", _request(place, "/v1/records/relay/b/r", token=True) * BATCH)


async def lists(place: dict[str, Any]) -> None:
    """List all records repeatedly."""
    await _pipeline(place, "discovery", _request(place, "/v1/records", token=True) * 4)


async def endless_body(place: dict[str, Any]) -> None:
    """Send a write with an endless body."""
    head = _request(place, "/v1/records/service/c/s", token=True, method="PUT", more="Transfer-Encoding: chunked\r\n")
    _, writer = await _connected(place, "discovery")
    try:
        writer.write(head)
        while True:
            writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
            await writer.drain()
    finally:
        writer.transport.abort()


async def unread_watch(place: dict[str, Any]) -> None:
    """Open a watch and read nothing."""
    _, writer = await _connected(place, "discovery")
    try:
        writer.write(_request(place, "/v1/watch", token=True))
        await asyncio.sleep(2)
    finally:
        writer.transport.abort()


async def connects(place: dict[str, Any]) -> None:
    """Connect and abort."""
    _, writer = await _connected(place, "discovery")
    writer.transport.abort()


async def halves(place: dict[str, Any]) -> None:
    """Hold connections with incomplete requests."""
    held = [await _connected(place, "discovery") for _ in range(50)]
    for _, writer in held:
        writer.write(b"GET / HTTP/1.1\r\nHost: ")
    await asyncio.sleep(3)
    for _, writer in held:
        writer.transport.abort()


async def admin_pipelined(place: dict[str, Any]) -> None:
    """Pipeline requests for the metrics, from the address of the real clients."""
    await _pipeline(place | {"address": "127.0.0.1"}, "admin", _request(place, "/metrics", token=False) * BATCH)


async def admin_mesh(place: dict[str, Any]) -> None:
    """Request the whole mesh repeatedly, from the address of the real clients."""
    await _pipeline(place | {"address": "127.0.0.1"}, "admin", _request(place, "/mesh", token=False) * 4)


async def handover(place: dict[str, Any]) -> None:
    """Connect to the handover socket and abort."""
    _, writer = await asyncio.open_unix_connection(place["handover"])
    writer.transport.abort()


ATTACKS: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
    each.__name__: each
    for each in (
        *(pipelined, pipelined_token, lists, endless_body, unread_watch, connects, halves),
        *(admin_pipelined, admin_mesh, handover),
    )
}


async def attack(place: dict[str, Any]) -> None:
    """Run the attackers until the process is killed."""

    async def one(number: int) -> None:
        mine = place | {"address": f"127.0.{1 + number // 250}.{1 + number % 250}"}
        while True:
            try:
                await ATTACKS[place["attack"]](mine)
            except* (OSError, EOFError):
                await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as group:
        for number in range(place["attackers"]):
            group.create_task(one(number))


def measure(name: str, seconds: float, attackers: int) -> dict[str, Any]:
    """Measure one attack."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        target = Target(Path(folder), HANDOVER_CONFIG if name == "handover" else CONFIG)
        stack.callback(target.end)
        place = {"attack": name, "attackers": attackers, "discovery": target.discovery, "admin": target.admin}
        place |= {"token": target.tokens["attacker"], "handover": f"{folder}/handover.sock"}

        async def run() -> tuple[list[float], list[float]]:
            if name in ("lists", "unread_watch", "admin_mesh"):
                await fill(target.discovery, target.tokens["operator"])
            if name.startswith("admin") or name == "handover":
                clients = [Client(target.admin, None) for _ in range(CLIENTS)]
                what = "GET", "/readyz", b""
            else:
                spec = {"spec": {"addresses": ["10.0.0.1"], "ports": [443]}}
                clients = [Client(target.discovery, target.tokens["victim"]) for _ in range(CLIENTS)]
                what = "PUT", "/v1/records/relay/b/r", json.dumps(spec).encode()

            async def all_ask(seconds: float) -> list[float]:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(latencies(client, what, seconds)) for client in clients]
                return [value for task in tasks for value in task.result()]

            await all_ask(0.5)
            alone = await all_ask(seconds)
            worker = subprocess.Popen(  # noqa: ASYNC220 - starting it does not block
                ["nice", "-n", "19", sys.executable, "-m", "bench.fair_http", "--worker", json.dumps(place)],
                cwd=Path(__file__).parents[1],
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            await asyncio.sleep(2)
            return alone, await all_ask(seconds)

        alone, attacked = uvloop.run(run())
        end_s = target.terminate()
        found = {
            "attack": name,
            "attackers": attackers,
            **{f"p{share}_alone_ms": round(percentile(alone, share / 100), 2) for share in (50, 99)},
            **{f"p{share}_ms": round(percentile(attacked, share / 100), 2) for share in (50, 99)},
            "samples": len(attacked),
            "end_s": round(end_s, 2),
        }
        bound = max(FACTOR * percentile(alone, 0.99), FLOOR_MS)
        return found | {"holds": percentile(attacked, 0.99) <= bound and end_s <= END_LIMIT_S}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print one JSON object per line. Returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.fair_http", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement (%(default)s)")
    parser.add_argument("--attackers", type=int, default=1)
    parser.add_argument("--attack", action="append", choices=[*ATTACKS], help="run only this attack; repeatable")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.worker is not None:
        uvloop.run(attack(json.loads(given.worker)))
        return 0
    good = True
    for name in given.attack or ATTACKS:
        found = measure(name, given.seconds, given.attackers)
        good &= bool(found["holds"])
        print(json.dumps(found), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
