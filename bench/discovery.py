"""Discovery at scale: `python -m bench.discovery`.

A server process (`crossnet run`, SQLite or memory) is filled with NETWORKS × (1 network, RELAYS relays, 1 TURN server, SERVICES
services). Then, in JSON on stdout:

- the size of the snapshot, as a list and as a watch, and how long one reader waits for it; the same with the client
  that roles use, which decodes and indexes it; and its copy on disk;
- how long a change takes to reach WATCHERS open watches in one load process (50th and 99th percentile of
  all arrivals over CHANGES changes, and the last one), and the CPU time of the server for it;
- how long it takes until all watchers have the snapshot when they connect at once, as after a server's restart;
- the resident memory of the server with and without watchers.

Load and server share this machine: the work of one reader delays the next, so latencies are an upper bound.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop

from bench import machine
from discovery.client import snapshot_file
from discovery.client.client import DiscoveryClient
from discovery.client.config import DiscoveryClientConfig
from discovery.model.mesh import Kind, Mesh, NetworkSpec, RelaySpec, ServiceSpec, Spec, TurnSpec

START_TIMEOUT_S = 20.0
LIMIT_S = 300.0


def records(networks: int, relays: int, services: int) -> Iterator[tuple[str, Spec]]:
    """Yield the paths and specs of all records."""
    for number in range(networks):
        network = f"net-{number}"
        a, b = divmod(number, 250)
        yield f"{Kind.NETWORK}/{network}/{network}", NetworkSpec()
        yield (
            f"{Kind.TURN}/{network}/turn-1",
            TurnSpec(
                url=f"turn:203.0.{a}.{b}:3478?transport=tcp",
                relay_addresses=[f"10.{a}.{b}.7"],
                port_min=49152,
                port_max=65535,
            ),
        )
        for relay in range(relays):
            spec = RelaySpec(
                addresses=[f"10.{a}.{b}.{relay + 10}"], ports=[443], sources={"turn-1": [f"10.{a}.{b}.{relay + 10}"]}
            )
            yield f"{Kind.RELAY}/{network}/relay-{relay}", spec
        for service in range(services):
            name = f"service-{service}.team.svc.cluster.local"
            endpoints = [f"10.{a}.{b}.{100 + pod}:8443" for pod in range(3)]
            yield f"{Kind.SERVICE}/{network}/service-{service}", ServiceSpec(name=name, ports={"8443": endpoints})


class Server:
    """A `crossnet run` with a discovery server."""

    def __init__(self, folder: Path, store: str) -> None:
        config = folder / "server.yaml"
        config.write_text(
            "network: a\nadmin: 127.0.0.1:0\ndrain: 0\n"
            f"discovery_server: {{listen: '127.0.0.1:0', store: '{store}', requests_per_second: 100000, max_watchers: 20000,\n"
            "  max_connections: 30000, max_connections_per_address: 30000}\n"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "crossnet", "run", "-c", str(config)], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            event = json.loads(line)
            if event.get("event") == "started":
                self.url = f"http://{event['listening']['discovery_server'][0]}"
                break
        else:
            raise RuntimeError("the server has not started")

    def cpu_s(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Resident memory."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait(10)
        if self._process.stderr is not None:
            self._process.stderr.close()


@contextmanager
def serving(folder: Path, store: str) -> Iterator[Server]:
    """Run a server while the block runs."""
    server = Server(folder, store)
    try:
        yield server
    finally:
        server.end()


class Watcher:
    """One open watch that records when the lines of a change arrived."""

    def __init__(self) -> None:
        self.synced = asyncio.Event()
        self.read_bytes = 0
        self.seen: list[float] = []

    async def run(self, session: aiohttp.ClientSession, url: str) -> None:
        """Watch until cancelled."""
        async with session.get(f"{url}/v1/watch") as response:
            response.raise_for_status()
            tail = b""
            while data := await response.content.readany():
                now = time.perf_counter()
                self.read_bytes += len(data)
                if self.synced.is_set():
                    self.seen.extend([now] * data.count(b'"type":"put"'))
                elif b'"type":"sync"' in tail + data[-200:]:
                    self.synced.set()
                tail = data[-200:]


async def fill(url: str, items: Sequence[tuple[str, Spec]], session: aiohttp.ClientSession) -> float:
    """Write all records, eight at a time. Returns the seconds it took."""
    began = time.perf_counter()
    rest = iter(items)

    async def writer() -> None:
        for path, spec in rest:
            body = msgspec.json.encode({"spec": spec})
            async with session.put(f"{url}/v1/records/{path}", data=body) as answer:
                answer.raise_for_status()

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(writer())
    return time.perf_counter() - began


async def measure(server: Server, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all measurements."""
    items = list(records(arguments.networks, arguments.relays, arguments.services))
    connector = aiohttp.TCPConnector(limit=0)
    found: dict[str, Any] = {"records": len(items)}
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        seconds = await fill(server.url, items, session)
        found["writes_per_s"] = round(len(items) / seconds)
        found["server_rss_mb"] = round(server.rss_bytes() / 1e6, 1)
        cpu, began = server.cpu_s(), time.perf_counter()
        async with session.get(f"{server.url}/v1/records") as answer:
            found["list_mb"] = round(len(await answer.read()) / 1e6, 2)
        found["list_ms"] = round((time.perf_counter() - began) * 1e3)
        found["list_cpu_ms"] = round((server.cpu_s() - cpu) * 1e3)
        found |= await first_snapshot(server.url, folder)
        found |= await fan_out(server, arguments, session)
    return found


async def first_snapshot(url: str, folder: Path) -> dict[str, Any]:
    """Measure how long the client that roles use takes to its first mesh."""
    times = []
    for _ in range(5):
        client = DiscoveryClient(DiscoveryClientConfig(urls=[url], network="net-0"))
        synced = asyncio.Event()

        def seen(_: Mesh, synced: asyncio.Event = synced) -> None:
            synced.set()

        client.subscribe(seen)
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(client.run())
            await synced.wait()
            times.append(time.perf_counter() - began)
            task.cancel()
    path = folder / "snapshot"
    began = time.perf_counter()
    await asyncio.to_thread(
        snapshot_file.save, path, "net-0", "e", tuple(client.mesh), client.mesh.revision, time.time()
    )
    saved, began = time.perf_counter() - began, time.perf_counter()
    await asyncio.to_thread(snapshot_file.load, path, "net-0")
    return {
        "client_first_mesh_ms": round(statistics.median(times) * 1e3),
        "disk_copy_mb": round(path.stat().st_size / 1e6, 2),
        "disk_save_ms": round(saved * 1e3),
        "disk_load_ms": round((time.perf_counter() - began) * 1e3),
    }


async def fan_out(server: Server, arguments: argparse.Namespace, session: aiohttp.ClientSession) -> dict[str, Any]:
    """Open all watchers at once, then change one record after the other."""
    watchers = [Watcher() for _ in range(arguments.watchers)]
    async with asyncio.TaskGroup() as group:
        cpu, began = server.cpu_s(), time.perf_counter()
        tasks = [group.create_task(watcher.run(session, server.url)) for watcher in watchers]
        async with asyncio.timeout(LIMIT_S):
            for watcher in watchers:
                await watcher.synced.wait()
        all_synced, sync_cpu = time.perf_counter() - began, server.cpu_s() - cpu
        resident = server.rss_bytes()
        delays: list[float] = []
        cpu = server.cpu_s()
        for number in range(arguments.changes):
            body = {"spec": {"addresses": [f"10.0.{number % 250}.9"], "ports": [443]}}
            began = time.perf_counter()
            async with session.put(f"{server.url}/v1/records/relay/net-0/relay-0", json=body) as answer:
                answer.raise_for_status()
            async with asyncio.timeout(LIMIT_S):
                while any(len(watcher.seen) <= number for watcher in watchers):
                    await asyncio.sleep(0.002)
            delays += [watcher.seen[number] - began for watcher in watchers]
        change_cpu = (server.cpu_s() - cpu) / arguments.changes
        for task in tasks:
            task.cancel()
    delays.sort()
    return {
        "watchers": len(watchers),
        "watch_snapshot_mb": round(watchers[0].read_bytes / 1e6, 2),
        "all_watchers_synced_s": round(all_synced, 2),
        "all_watchers_synced_cpu_s": round(sync_cpu, 2),
        "server_rss_with_watchers_mb": round(resident / 1e6, 1),
        "change_p50_ms": round(delays[len(delays) // 2] * 1e3, 1),
        "change_p99_ms": round(delays[len(delays) * 99 // 100] * 1e3, 1),
        "change_last_ms": round(delays[-1] * 1e3, 1),
        "change_cpu_ms": round(change_cpu * 1e3, 1),
    }


def main() -> int:
    """Run the measurements and print the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.discovery", description="Discovery at scale.")
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--relays", type=int, default=3)
    parser.add_argument("--services", type=int, default=5)
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--store", choices=["memory", "sqlite"], default="sqlite")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crossnet-bench-") as name:
        folder = Path(name)
        store = "memory" if arguments.store == "memory" else f"sqlite:{folder / 'discovery.db'}"
        with serving(folder, store) as server:
            found = uvloop.run(measure(server, arguments, folder))
    print(
        json.dumps({"settings": vars(arguments), "result": found, "machine": machine.describe()}, indent=1, default=str)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
