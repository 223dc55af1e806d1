"""Kernel memory of readers that are slow, and what they cost a client that is not.

    python -m bench.memory [--ways relay embedded coturn] [--readers 200] [--fast-mib 0] [--seconds 10]

Each reader asks for 50 MB and takes 2 kB of it every 0.1 s. With `--fast-mib` it first reads that much as fast as it can, so that
all windows are large when it slows down. `kernel_mib_each` is what receive and send queues (`ss -m`) and pipes of a process hold,
per reader. Another client then downloads 50 MB, and its time is compared with the same download before.
"""

import argparse
import fcntl
import json
import os
import re
import socket
import statistics
import struct
import subprocess
import tempfile
import termios
import time
from pathlib import Path

from bench.exchange import DOWNLOAD, GO, READY, client_hello, request
from bench.questions import probe
from bench.ways import WAYS, Way
from bench.worker import Worker, allow_open_files

FILE_BYTES = 50_000_000
PIECE_BYTES = 2_000
PIECE_EVERY_S = 0.1
MIB = 1 << 20
NO_LIMIT_MS = 3_600_000
OPEN_TIMEOUT_S = 15.0
DOWNLOADS = 40
SETTLE_S = 2.0
_SKMEM = re.compile(r"skmem:\(r(\d+),rb(\d+),t(\d+),tb(\d+),f(\d+),w(\d+)")
_PID = re.compile(r"pid=(\d+)")


def download(way: Way, hello: bytes, count: int) -> socket.socket:
    """Open a stream whose service begins to send `count` bytes."""
    sock = socket.create_connection(way.address, OPEN_TIMEOUT_S)
    sock.sendall(hello + request(DOWNLOAD, ms=NO_LIMIT_MS, count=count))
    if sock.recv(1) != READY:
        raise EOFError("refused: no service at the far end")
    sock.sendall(GO)
    return sock


def read(sock: socket.socket, count: int) -> None:
    """Read `count` bytes. Raises EOFError if there are fewer."""
    buffer = bytearray(MIB)
    while count:
        size = sock.recv_into(buffer, min(count, MIB))
        if not size:
            raise EOFError(f"{count} bytes are missing")
        count -= size


def timed(way: Way, hello: bytes) -> float:
    """Return the least of the seconds that a download of 50 MB takes: other programs only add to it."""
    took = []
    for _ in range(DOWNLOADS):
        began = time.monotonic()
        with download(way, hello, FILE_BYTES) as sock:
            read(sock, FILE_BYTES)
        took.append(time.monotonic() - began)
    return min(took)


def take_slowly(readers: list[socket.socket], seconds: float) -> None:
    """Let every reader take its piece every 0.1 s."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        began = time.monotonic()
        for sock in readers:
            try:
                sock.recv(PIECE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
        time.sleep(max(0.0, began + PIECE_EVERY_S - time.monotonic()))


def socket_bytes(pids: dict[str, int]) -> dict[str, float]:
    """Return the kernel memory in the queues of each process's TCP sockets."""
    part_of = {pid: part for part, pid in pids.items()}
    held = dict.fromkeys(pids, 0.0)
    shown = subprocess.run(["ss", "-tmnpHO"], capture_output=True, text=True, check=True).stdout
    for line in shown.splitlines():
        memory, owner = _SKMEM.search(line), _PID.search(line)
        if memory and owner and (part := part_of.get(int(owner[1]))) is not None:
            held[part] += int(memory[1]) + int(memory[6])
    return held


def pipe_bytes(pid: int) -> int:
    """Return the bytes in the pipes of a process."""
    held, seen = 0, set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        try:
            target = os.readlink(path)
            if not target.startswith("pipe:") or target in seen:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue
        seen.add(target)
        held += struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0\0\0\0"))[0]
        os.close(descriptor)
    return held


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(way: Way, readers: int, fast_bytes: int, seconds: float) -> dict[str, object]:
    """Measure one way, whose processes run."""
    hello = client_hello(way.asked)
    alone = [timed(way, hello)]
    pids = way.pids
    before = {part: rss(pid) for part, pid in pids.items()}
    slow: list[socket.socket] = []
    try:
        for _ in range(readers):
            sock = download(way, hello, FILE_BYTES)
            slow.append(sock)
            read(sock, fast_bytes)
        take_slowly(slow, seconds)
        sockets = socket_bytes(pids)
        pipes = {part: pipe_bytes(pid) for part, pid in pids.items()}
        memory = {part: round(rss(pid) - before[part]) for part, pid in pids.items()}
        sockstat = next(line for line in Path("/proc/net/sockstat").read_text().splitlines() if line.startswith("TCP"))
        beside = timed(way, hello)
    finally:
        for sock in slow:
            sock.close()
    time.sleep(SETTLE_S)
    alone.append(timed(way, hello))
    return {
        "way": way.name,
        "readers": readers,
        "fast_mib": fast_bytes / MIB,
        "kernel_mib_each": {part: round((sockets[part] + pipes[part]) / MIB / readers, 2) for part in pids},
        "pipes_mib_each": {part: round(pipes[part] / MIB / readers, 2) for part in pids},
        "rss_mib_each": {part: round(memory[part] / MIB / readers, 2) for part in pids},
        "all_tcp_mib": round(int(sockstat.split()[-1]) * os.sysconf("SC_PAGE_SIZE") / MIB),
        "alone_s": [round(seconds, 3) for seconds in alone],
        "beside_s": round(beside, 3),
        "ratio": round(beside / statistics.mean(alone), 2),
    }


def main() -> None:
    """Measure, and print one line of JSON for each way."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["relay", "embedded", "coturn"], metavar="WAY")
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--fast-mib", type=float, default=0.0, help="what a reader reads fast first (default: nothing)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="how long the readers are slow before it is measured"
    )
    arguments = parser.parse_args()
    allow_open_files()
    service, load = Worker("bench.service"), Worker("bench.load")
    try:
        port = service.ask("port", limit_s=OPEN_TIMEOUT_S)["port"]
        with tempfile.TemporaryDirectory() as folder:
            for name in arguments.ways:
                way = Way(name, Path(folder) / name, port)
                try:
                    way.start()
                    probe(load, way)
                    result = measure(way, arguments.readers, int(arguments.fast_mib * MIB), arguments.seconds)
                    print(json.dumps(result), flush=True)
                finally:
                    way.end()
    finally:
        load.end()
        service.end()


if __name__ == "__main__":
    main()
