"""A forger of answers: it sees no question and no answer, but it can send from the upstream's address and port.

It also knows the resolver's open ports, as any local user does from /proc/net/udp. What it has to guess is the id, and
whatever else the resolver makes hard to guess. It runs as a process of its own, so that it sends while others work.

    with Forger(the upstream's UDP socket, its port) as forger:
        forger.forge("www.example.test", "192.0.2.66")
        packets = forger.stop()
"""

import os
import random
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.support.dns_packets import header, query

TTL_S = 3600
_BURST = 512
_LOOK_EVERY = 8  # bursts between two looks at the open ports


class Forger:
    """The process, for as long as its context lasts."""

    def __init__(self, sock: socket.socket, port: int) -> None:
        self._sock = sock
        self._port = port
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        fd = os.dup(self._sock.fileno())
        try:
            command = [sys.executable, "-m", __name__, str(fd), str(self._port)]
            root = Path(__file__).parents[2]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, pass_fds=(fd,), bufsize=1
            )
        finally:
            os.close(fd)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def forge(self, name: str, address: str) -> None:
        """Send forged answers about this name from now on, in place of those about another."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name} {address}\n")

    def stop(self) -> int:
        """Send no more, and say how many packets were sent since the last name was given."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        return int(self._process.stdout.readline())


def _forged(name: str, address: str) -> bytes:
    """An answer without its id."""
    record = b"\xc0\x0c\0\1\0\1" + TTL_S.to_bytes(4, "big") + b"\0\4" + socket.inet_aton(address)
    return header(0, 0x8580, (1, 1, 0, 0))[2:] + query(name)[12:] + record


def _open_ports(upstream_port: int) -> list[int]:
    """The local ports of all sockets that are connected to this port of loopback."""
    ports = []
    for line in Path("/proc/net/udp").read_text().splitlines()[1:]:
        local, remote = line.split()[1:3]
        if int(remote.rpartition(":")[2], 16) == upstream_port:
            ports.append(int(local.rpartition(":")[2], 16))
    return ports


def _main(fd: int, upstream_port: int) -> None:
    sock = socket.socket(fileno=fd)
    orders = open(0, "rb", buffering=0)  # noqa: SIM115 - what is buffered, select does not see
    answer, sent, burst = b"", 0, 0
    ports: list[int] = []
    while True:
        ready, _, _ = select.select([orders], [], [], 0 if answer else None)
        if ready:
            words = orders.readline().decode().split()
            if words:
                answer, sent, burst = _forged(*words), 0, 0
            else:
                answer = b""
                print(sent, flush=True)
            continue
        if burst % _LOOK_EVERY == 0:
            ports = _open_ports(upstream_port)
        burst += 1
        if not ports:
            continue
        for _ in range(_BURST):
            try:
                sock.sendto(random.randbytes(2) + answer, ("127.0.0.1", random.choice(ports)))
            except OSError:  # a full buffer, or the resolver closed that port meanwhile
                continue
            sent += 1


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
