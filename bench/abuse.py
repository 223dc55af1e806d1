"""What abuse costs: thousands of idle streams, and clients that send one byte a second, while real clients connect.

    python -m bench.abuse --idle 10000 --slow 5000

The relays run as users run them (`crossnet run`, default settings except the limits per client, since all clients here share one
address). Measured are the resident memory of an idle stream, and the time of a real client's connect (TCP, ClientHello, first byte
of the answer) in four cases: alone, with the idle streams, with slow clients that arrived one after the other (as clients do),
and with slow clients that all arrive, send and are cut at the same moment. Slow clients that were cut reconnect in their next
second, so their number stays the same. A process has two descriptors per stream: if the idle streams exceed its limit, several
relays share them on one port.
"""

import argparse
import asyncio
import contextlib
import enum
import json
import os
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvloop

from bench import machine
from bench.exchange import client_hello
from bench.fairness import share
from bench.meter import total_cpu_s
from bench.slow import Slow

SPARE_FILES = 500
AT_ONCE = 64
"""Connects of a part that run at the same time."""

PAUSE_S = 0.01
"""Between two connects of the real client."""

ROOM = 0.8
"""Share of a relay's descriptors to plan for: the kernel distributes clients at random."""

_given = argparse.Namespace(first=False)
"""The parsed command line. `first`: the benchmark's processes have priority over all others of the machine."""

CONFIG = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
relay: {{id: relay-{number}, listen: "127.0.0.1:{port}", reuse_port: {shared}, deliver: ["127.0.0.1/32"], max_streams: {streams},
         max_streams_per_client: 0, new_streams_per_second: 0}}
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
    """Print the port, then echo until standard input ends."""
    server = await asyncio.start_server(_echo, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await _wait_for_end()


async def _wait_for_end() -> None:
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # closing thousands of connections in order would only take time


async def idle(relay: int, port: int, count: int) -> None:
    """Open streams, print how many there are, and hold them until standard input ends."""
    hello = client_hello(_name(port))
    held = []
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", relay)
            writer.write(hello)
            await reader.readexactly(len(hello))
            held.append(writer)

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
    print(len(held), flush=True)
    await _wait_for_end()


def slow(relay: int, port: int, count: int, *, lockstep: bool) -> None:
    """Run `count` slow clients. Prints the count when as many cuts have happened, and statistics when standard input ends."""
    clients = Slow(relay, client_hello(_name(port)), count, lockstep=lockstep)
    clients.run(until=lambda: clients.cut >= count)
    print(count, flush=True)
    clients.begin()
    clients.run(until=lambda: bool(select.select([0], [], [], 0)[0]))
    print(json.dumps(clients.done()), flush=True)
    os._exit(0)


def real(relay: int, port: int, count: int) -> None:
    """Connect `count` times, one after the other with a pause. Prints the milliseconds of each as JSON."""
    hello = client_hello(_name(port))
    took = []
    for _ in range(count):
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", relay)) as client:
            client.sendall(hello)
            if not client.recv(1):
                raise RuntimeError("a real client was refused")
            took.append((time.perf_counter() - began) * 1000)
        time.sleep(PAUSE_S)
    print(json.dumps(took), flush=True)


class Precedence(enum.IntEnum):
    """SCHED_FIFO priorities on a busy machine: the relays first, then the measuring client, then the abusive clients."""

    RELAY = 30
    MEASURING = 20
    ABUSE = 10

    def give(self, pid: int) -> None:
        """Give a process priority over all others of the machine. Relays get a core that the benchmark does not use."""
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            os.sched_setaffinity(pid, cores[-1:] if self is Precedence.RELAY else cores[:-1])
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(self.value))


class Part:
    """A child process that runs a part of this file and ends when its standard input does."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "bench.abuse", "--part", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if _given.first:
            abuse = arguments[0] in ("spread", "lockstep", "idle")
            (Precedence.ABUSE if abuse else Precedence.MEASURING).give(self.process.pid)

    def line(self) -> str:
        """Read its next line. RuntimeError if it ends instead."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            raise RuntimeError("a part of the benchmark ended")
        return text.strip()

    def ask_to_end(self) -> None:
        """Ask it to end."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> None:
        """Ask it to end, and wait for it; after 20 s, kill it."""
        self.ask_to_end()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def part(*arguments: object) -> Iterator[Part]:
    """Run a part of the benchmark while the block runs."""
    running = Part(*arguments)
    try:
        yield running
    finally:
        running.end()


@contextlib.contextmanager
def relays(folder: Path, count: int, streams: int) -> Iterator[tuple[list[int], int]]:
    """Run relays on one port while the block runs. Yields their process ids and the port."""
    (folder / "mesh.yaml").write_text("networks: [{id: a}]\n")
    running: list[subprocess.Popen[bytes]] = []
    port = 0
    try:
        for number in range(1, count + 1):
            config, log = folder / f"relay-{number}.yaml", folder / f"relay-{number}.log"
            shared = "true" if count > 1 else "false"
            config.write_text(CONFIG.format(number=number, port=port, shared=shared, streams=streams))
            with log.open("wb") as output:
                command = [sys.executable, "-m", "crossnet", "run", "-c", str(config)]
                running.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
                )
            if _given.first:
                Precedence.RELAY.give(running[-1].pid)
            port = _listening(log)
        yield [process.pid for process in running], port
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(60)


def _listening(log: Path) -> int:
    for _ in range(400):
        for line in log.read_text().splitlines():
            if '"event":"started"' in line:
                return int(json.loads(line)["listening"]["relay"][0].rpartition(":")[2])
        time.sleep(0.05)
    raise RuntimeError(log.read_text())


def _rss_kib(pids: Sequence[int]) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total


class Measurement:
    """One run. `result` has the figures so far."""

    def __init__(self, pids: Sequence[int], relay: int, connects: int) -> None:
        self._pids = pids
        self._relay = relay
        self._connects = connects
        self.result: dict[str, object] = {"relays": len(pids)}

    def connect(self, what: str, port: int) -> None:
        """Measure the connects of a real client, and store them as `what`."""
        cpu_s, began = total_cpu_s(self._pids), time.perf_counter()
        with part("real", self._relay, port, self._connects) as client:
            took = sorted(json.loads(client.line()))
        seconds = time.perf_counter() - began
        p99 = share(took, 0.99)
        alone = self.result.get("alone")
        figures = {
            "p50_ms": round(share(took, 0.5), 2),
            "p99_ms": round(p99, 2),
            "p99_x_alone": round(p99 / alone["p99_ms"], 2) if isinstance(alone, dict) else 1.0,
            "max_ms": round(took[-1], 2),
            "relay_cores": round((total_cpu_s(self._pids) - cpu_s) / seconds, 3),
        }
        self.result[what] = figures

    def hold(self, held: int, before_kib: int, seconds: float) -> None:
        """Store the figures of the idle streams."""
        self.result |= {
            "idle_streams": held,
            "opened_per_s": round(held / seconds),
            "rss_kib_per_idle_stream": round((_rss_kib(self._pids) - before_kib) / held, 2),
        }


def measure(idle_streams: int, slow_clients: int, connects: int, count: int, folder: Path) -> dict[str, object]:
    """Run all measurements once."""
    with relays(folder, count, idle_streams + slow_clients + 1000) as (pids, relay), part("service") as echo:
        port = int(echo.line())
        made = Measurement(pids, relay, connects)
        made.connect("alone", port)
        before, began = _rss_kib(pids), time.perf_counter()
        with contextlib.ExitStack() as stack:
            if idle_streams:
                held = int(stack.enter_context(part("idle", relay, port, idle_streams)).line())
                made.hold(held, before, time.perf_counter() - began)
                made.connect("beside_idle", port)
            for what in ("spread", "lockstep") if slow_clients else ():
                with part(what, relay, port, slow_clients) as clients:
                    clients.line()
                    made.connect(f"beside_slow_{what}", port)
                    clients.ask_to_end()
                    made.result[f"slow_{what}"] = json.loads(clients.line())
            made.result["rss_mib"] = round(_rss_kib(pids) / 1024, 1)
        return made.result


def _relays_needed(idle_streams: int, slow_clients: int, limit: int) -> int:
    """Return how many relays are needed to have descriptors for all streams."""
    wanted = 2 * idle_streams + slow_clients
    if wanted + SPARE_FILES <= limit:
        return 1
    return -(-wanted // int((limit - SPARE_FILES) * ROOM))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements, or one of their parts."""
    parser = argparse.ArgumentParser(prog="python -m bench.abuse", description="What abuse costs a relay.")
    parser.add_argument("--idle", type=int, default=10_000, help="idle streams")
    parser.add_argument("--slow", type=int, default=5000, help="clients that send a byte a second")
    parser.add_argument("--connects", type=int, default=1000, help="connects of a real client, each time")
    parser.add_argument(
        "--first",
        action="store_true",
        help="take priority over all other processes of a busy machine (root, SCHED_FIFO)",
    )
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments, _given)
    if given.part:
        name, *numbers = given.part
        _run_part(name, [int(number) for number in numbers])
        return 0
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if max(given.idle, given.slow) + SPARE_FILES > limit:
        print(f"the limit of descriptors is {limit}: raise it (ulimit -Hn), or use fewer clients", file=sys.stderr)
        return 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    count = _relays_needed(given.idle, given.slow, limit)
    with tempfile.TemporaryDirectory(prefix="crossnet-abuse-") as folder:
        result = measure(given.idle, given.slow, given.connects, count, Path(folder))
    print(
        json.dumps(
            {"machine": machine.describe(), "descriptors_a_process": limit, "first": given.first, "result": result},
            indent=1,
        )
    )
    return 0


def _run_part(name: str, numbers: list[int]) -> None:
    match name:
        case "service":
            uvloop.run(service())
        case "idle":
            uvloop.run(idle(*numbers))
        case "real":
            real(*numbers)
        case _:
            slow(*numbers, lockstep=name == "lockstep")


if __name__ == "__main__":
    sys.exit(main())
