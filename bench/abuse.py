"""What abuse costs: idle streams by the thousand, and clients that send a byte a second, while real clients come.

    python -m bench.abuse --idle 10000 --slow 5000

Answers two questions of one relay (`crossnet run`, default settings but for the limits of one client, since all clients here have
one address): how much resident memory an idle stream takes, and what a real client's connect (TCP, ClientHello, first byte of the
answer) takes alone, beside the idle streams, and beside the slow clients too. Relay, service, idle, slow and real clients are
processes of their own. Slow clients are cut by the ClientHello's deadline and come back at once, so their number stays.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from bench import machine
from bench.exchange import client_hello

SPARE_FILES = 200
AT_ONCE = 64
"""Connects of a part under way at the same time."""

CONFIG = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
relay: {{id: relay-1, listen: "127.0.0.1:0", deliver: ["127.0.0.1/32"], max_streams: {streams}, max_streams_per_client: 0,
         new_streams_per_second: 0}}
"""


def _name(port: int) -> str:
    return f"p{port}-127-0-0-1.a.svc.mesh.internal"


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def service() -> None:
    """Echo; say the port; end with standard input."""
    server = await asyncio.start_server(_echo, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await _told_to_end()


async def _told_to_end() -> None:
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # thousands of connections: what they have to say at their end interests nobody


async def _open(relay: int, hello: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", relay)
    writer.write(hello)
    await reader.readexactly(len(hello))
    return reader, writer


async def idle(relay: int, port: int, count: int) -> None:
    """Open streams and leave them; say how many there are; end with standard input."""
    hello = client_hello(_name(port))
    held = []
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with gate:
            held.append(await _open(relay, hello))

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
    print(len(held), flush=True)
    await _told_to_end()


async def slow(relay: int, port: int, count: int) -> None:
    """Keep so many clients that send a byte of their ClientHello a second; say so; end with standard input."""
    hello = client_hello(_name(port))
    gate = asyncio.Semaphore(AT_ONCE)
    begun = 0
    ready = asyncio.Event()

    async def one() -> None:
        nonlocal begun
        while True:
            try:
                async with gate:
                    reader, writer = await asyncio.open_connection("127.0.0.1", relay)
                begun += 1
                if begun >= count:
                    ready.set()
                try:
                    for byte in hello:
                        if reader.at_eof() or writer.is_closing():
                            break
                        writer.write(bytes([byte]))
                        await asyncio.sleep(1)
                finally:
                    writer.close()
            except OSError:  # reset, or no port left for a moment
                await asyncio.sleep(1)

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
        await ready.wait()
        print(begun, flush=True)
        await _told_to_end()


async def real(relay: int, port: int, count: int) -> None:
    """Connect so many times, one after the other with a pause; print the milliseconds each took, as JSON."""
    hello = client_hello(_name(port))
    took = []
    for _ in range(count):
        began = time.perf_counter()
        _, writer = await _open(relay, hello)
        took.append((time.perf_counter() - began) * 1000)
        writer.close()
        await asyncio.sleep(0.01)
    print(json.dumps(took), flush=True)


PARTS = {"idle": idle, "slow": slow, "real": real}


class Part:
    """A process of this file that is told to end by the end of its input."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "bench.abuse", "--part", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        """The next line it says. RuntimeError if it ends instead."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            raise RuntimeError("a part of the benchmark ended")
        return text

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def _connects(relay: int, port: int, count: int) -> dict[str, float]:
    part = Part("real", relay, port, count)
    took = sorted(json.loads(part.line()))
    part.end()
    return {
        "p50_ms": round(statistics.median(took), 2),
        "p99_ms": round(took[min(len(took) - 1, len(took) * 99 // 100)], 2),
        "max_ms": round(took[-1], 2),
    }


def measure(idle_streams: int, slow_clients: int, connects: int, folder: Path) -> dict[str, object]:
    """Run it all once."""
    (folder / "mesh.yaml").write_text("networks: [{id: a}]\n")
    (folder / "relay.yaml").write_text(CONFIG.format(streams=idle_streams + slow_clients + 1000))
    log = folder / "relay.log"
    parts: list[Part] = []
    with log.open("wb") as output:
        command = [sys.executable, "-m", "crossnet", "run", "-c", str(folder / "relay.yaml")]
        relay = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        port = _part(parts, "service")
        relay_port = _listening(log)
        result: dict[str, object] = {"alone": _connects(relay_port, int(port), connects)}
        before = _rss_kib(relay.pid)
        began = time.perf_counter()
        held = int(_part(parts, "idle", relay_port, port, idle_streams))
        result["idle_streams"], result["opened_per_s"] = held, round(held / (time.perf_counter() - began))
        result["rss_kib_per_idle_stream"] = round((_rss_kib(relay.pid) - before) / held, 2)
        result["beside_idle"] = _connects(relay_port, int(port), connects)
        result["slow_clients"] = slow_clients
        _part(parts, "slow", relay_port, port, slow_clients)
        result["beside_idle_and_slow"] = _connects(relay_port, int(port), connects)
        result["rss_mib"] = round(_rss_kib(relay.pid) / 1024, 1)
        return result
    finally:
        for part in reversed(parts):
            part.end()
        relay.terminate()
        relay.wait(30)


def _part(parts: list[Part], *arguments: object) -> str:
    parts.append(Part(*arguments))
    return parts[-1].line().strip()


def _listening(log: Path) -> int:
    for _ in range(400):
        for line in log.read_text().splitlines():
            if '"event":"started"' in line:
                return int(json.loads(line)["listening"]["relay"][0].rpartition(":")[2])
        time.sleep(0.05)
    raise RuntimeError(log.read_text())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or be a part of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.abuse", description="What abuse costs a relay.")
    parser.add_argument("--idle", type=int, default=10_000, help="idle streams")
    parser.add_argument("--slow", type=int, default=5000, help="clients that send a byte a second")
    parser.add_argument("--connects", type=int, default=500, help="connects of a real client, each time")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.part:
        name, *numbers = given.part
        uvloop.run(service() if name == "service" else PARTS[name](*map(int, numbers)))
        return 0
    wanted = 2 * given.idle + given.slow + SPARE_FILES
    try:
        hard = max(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        print(f"needs {wanted} open files: raise the limit (ulimit -Hn), or ask for less", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="crossnet-abuse-") as folder:
        result = measure(given.idle, given.slow, given.connects, Path(folder))
    print(json.dumps({"machine": machine.describe(), "result": result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
