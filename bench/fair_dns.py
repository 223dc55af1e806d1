"""Fairness of the resolver: how long a real client waits while others ask faster than they are answered.

    python -m bench.fair_dns --seconds 5 --connections 1 64

A real `crossnet run` with only the dns role. A real client repeatedly asks for a name of the mesh over UDP, and over a new TCP
connection. Reported are its p50 and p99, alone and during each flood, and how long the process takes to end after SIGTERM
during the flood. Each flood is a process of its own (`flood`): TCP connections that pipeline questions endlessly, or UDP sockets.

The goal: p99 during the flood is at most five times p99 alone, or 25 ms, whichever is more; the process ends within `drain`.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.fairness import DRAIN_S, FIRST, LIMIT_S, PAUSE_S, compared, free_port
from bench.worker import ROOT

HOST = "127.0.0.1"
OTHER_HOST = "127.0.0.2"
"""Address of the real client over UDP: the resolver is fair between addresses, so it needs one of its own."""

CHUNK = 64 * 1024
AGAIN_S = 0.5
"""Before an attacker that was disconnected connects again."""

_HEAD = bytes.fromhex("0100 0001 0000 0000 0000")
_A = b"\0\1\0\1"
_ANSWER = bytes.fromhex("c00c 0001 0001 00000e10 0004 c0000201")


def _name(text: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in text.split(".")) + b"\0"


OWN = _name("p8443-10-1-0-5.b.svc.mesh.internal")
CACHED = _name("www.example.test")

RESEND_S = 0.25
"""After which the real client repeats its question over UDP."""

QUESTIONS = {
    "own": b"\0\1" + _HEAD + OWN + _A,
    "cached": b"\0\1" + _HEAD + CACHED + _A,
    "garbage": b"\0\1" + _HEAD + b"\xff" * 4,
    "missed": b"",
    "udp": b"\0\1" + _HEAD + OWN + _A,
    "unread": b"\0\1" + _HEAD + OWN + _A,
}
"""What each flood sends: questions for a name of the mesh; for a cached name; invalid packets; questions for names that are not
cached; for a name of the mesh over UDP; and for a name of the mesh by clients that read no answers."""


def flood(address: tuple[str, int], what: str, connections: int, seconds: float) -> None:
    """Flood for this many seconds over this many connections at a time. A connection that was cut is opened again."""
    until = time.monotonic() + seconds
    if what == "udp":
        _flood_udp(address, QUESTIONS[what], connections, until)
        return
    data = b"" if what == "missed" else _framed(QUESTIONS[what]) * (CHUNK // (len(QUESTIONS[what]) + 2))
    with selectors.DefaultSelector() as selector:
        again = [0.0] * connections
        """When each attacker that is not connected connects again."""
        while (now := time.monotonic()) < until:
            for back_at in [each for each in again if each <= now]:
                again.remove(back_at)
                with contextlib.suppress(OSError):
                    sock = socket.create_connection(address, timeout=1)
                    sock.setblocking(False)
                    events = selectors.EVENT_WRITE | (selectors.EVENT_READ if what != "unread" else 0)
                    selector.register(sock, events, [0, data or _missed()])
                    continue
                again.append(now + AGAIN_S)
            for key, events in selector.select(0.05):
                flooding = key.fileobj
                assert isinstance(flooding, socket.socket)
                try:
                    _pour(flooding, key.data, events)
                except BlockingIOError:
                    continue
                except OSError:
                    selector.unregister(flooding)
                    flooding.close()
                    again.append(now + AGAIN_S)


def _pour(sock: socket.socket, state: list[Any], events: int) -> None:
    if events & selectors.EVENT_READ and not sock.recv(1 << 20):
        raise ConnectionError
    if events & selectors.EVENT_WRITE:
        at, data = state
        at += sock.send(memoryview(data)[at:])
        state[:] = (at, data) if at < len(data) else (0, data)


def _flood_udp(address: tuple[str, int], question: bytes, sockets: int, until: float) -> None:
    socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) for _ in range(sockets)]
    for sock in socks:
        sock.connect(address)
    while time.monotonic() < until:
        for sock in socks:
            with contextlib.suppress(OSError):
                for _ in range(64):
                    sock.send(question)
            with contextlib.suppress(OSError):
                while True:
                    sock.recv(512)


def _missed() -> bytes:
    """Return one write of questions for names that nobody has asked for before."""
    stamp = secrets.token_hex(4)
    return b"".join(_framed(b"\0\1" + _HEAD + _name(f"n{n}-{stamp}.example.test") + _A) for n in range(CHUNK // 50))


def _framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


@contextlib.contextmanager
def flooding(address: tuple[str, int], what: str, connections: int, seconds: float) -> Iterator[None]:
    """Flood from a process of its own while the block runs."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=flood, args=(address, what, connections, seconds), daemon=True)
    process.start()
    assert process.pid is not None
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, process.pid, 0)
    time.sleep(1.0)  # until it has imported its modules and connected
    try:
        yield
    finally:
        process.kill()
        process.join()


def _upstream(sock: socket.socket) -> None:
    """Answer every question for an address until the socket is closed."""
    while True:
        try:
            packet, peer = sock.recvfrom(4096)
        except OSError:
            return
        stop = packet.index(0, 12) + 5
        head = packet[:2] + b"\x81\x80\0\1\0\1\0\0\0\0"
        with contextlib.suppress(OSError):
            sock.sendto(head + packet[12:stop] + _ANSWER, peer)


class Resolver:
    """The resolver's process."""

    def __init__(self, folder: Path, upstream: int) -> None:
        """Start it, and wait until it listens. RuntimeError with its log if it does not start."""
        self.address = (HOST, free_port())
        (folder / "mesh.yaml").write_text(
            json.dumps(
                {
                    "networks": [{"id": "a"}, {"id": "b"}],
                    "relays": [{"network": "a", "id": "relay-1", "addresses": ["10.0.0.9"], "ports": [443]}],
                }
            )
        )
        document = {
            "network": "a",
            "discovery": "mesh.yaml",
            "admin": f"{HOST}:0",
            "drain": f"{DRAIN_S}s",
            "dns": {"listen": f"{HOST}:{self.address[1]}", "upstream": f"{HOST}:{upstream}", "search": []},
        }
        (folder / "dns.yaml").write_text(json.dumps(document))
        log = folder / "dns.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "crossnet", "run", "-c", "dns.yaml"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        for _ in range(400):
            if '"event":"started"' in log.read_text():
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(log.read_text())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def memory_kib(self) -> int:
        """Its peak resident memory so far."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0])

    def terminate(self) -> float | None:
        """Send SIGTERM. Returns the seconds until it ended, or None if it did not within its drain and a second."""
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(DRAIN_S + 1)
        except subprocess.TimeoutExpired:
            return None
        return round(time.monotonic() - began, 2)

    def end(self) -> None:
        """Kill it, and wait for it."""
        self._process.kill()
        self._process.wait()


def _ask_udp(address: tuple[str, int]) -> None:
    """Repeat the question until there is an answer, as clients do: packets may be lost when the socket buffer is full."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(RESEND_S)
        sock.bind((OTHER_HOST, 0))
        sock.connect(address)
        until = time.monotonic() + LIMIT_S
        while True:
            sock.send(QUESTIONS["own"])
            try:
                sock.recv(512)
            except TimeoutError:
                if time.monotonic() > until:
                    raise
            else:
                return


def _ask_tcp(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=LIMIT_S) as sock:
        sock.sendall(_framed(QUESTIONS["own"]))
        if not sock.recv(512):
            raise EOFError


CLIENTS: dict[str, Callable[[tuple[str, int]], None]] = {"udp": _ask_udp, "tcp": _ask_tcp}


def took_ms(client: str, address: tuple[str, int], seconds: float) -> list[float]:
    """Ask for this many seconds. Returns the sorted durations in milliseconds; a failure counts as LIMIT_S."""
    took = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        try:
            CLIENTS[client](address)
            took.append((time.perf_counter() - began) * 1000)
        except (OSError, EOFError):
            took.append(LIMIT_S * 1000)
        time.sleep(PAUSE_S)
    return sorted(took)


def measure(
    what: str, connections: int, seconds: float, folder: Path, upstream: int, *, first: bool = False
) -> dict[str, Any]:
    """Measure one flood, with a resolver of its own."""
    resolver = Resolver(folder, upstream)
    if first:
        os.setpriority(os.PRIO_PROCESS, resolver.pid, FIRST)
    result: dict[str, Any] = {"flood": what, "connections": connections}
    try:
        alone = {client: took_ms(client, resolver.address, seconds) for client in CLIENTS}
        with flooding(resolver.address, what, connections, 10 * seconds + 60):
            for client in CLIENTS:
                result[client] = compared(alone[client], took_ms(client, resolver.address, seconds))
            result["memory_kib"] = resolver.memory_kib
            result["sigterm_s"] = resolver.terminate()
    finally:
        resolver.end()
    result["ok"] = result["sigterm_s"] is not None and all(result[client]["ok"] for client in CLIENTS)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print JSON. Returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.fair_dns", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--connections", type=int, nargs="+", default=[1, 64], help="numbers of flooding connections (1 64)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement (%(default)s)")
    parser.add_argument("--only", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS), help="floods")
    parser.add_argument(
        "--first", action="store_true", help="take priority over all other processes of a busy machine (root)"
    )
    given = parser.parse_args(arguments)
    if given.first:
        os.setpriority(os.PRIO_PROCESS, 0, FIRST)
    results = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
        upstream.bind((HOST, 0))
        answering = multiprocessing.get_context("fork").Process(target=_upstream, args=(upstream,), daemon=True)
        answering.start()
        for what in given.only:
            for connections in given.connections:
                with tempfile.TemporaryDirectory(prefix="crossnet-fair-dns-") as folder:
                    port = upstream.getsockname()[1]
                    results.append(measure(what, connections, given.seconds, Path(folder), port, first=given.first))
                print(json.dumps(results[-1]), flush=True)
        answering.kill()
        answering.join()
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
