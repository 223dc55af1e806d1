"""The load generator, a worker: one process with one epoll loop and any number of clients."""

import math
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from bench.exchange import CHUNK_BYTES, COUNT, DOWNLOAD, ECHO, GO, READY, UPLOAD, client_hello, request
from bench.worker import allow_open_files, serve_commands

OPEN_TIMEOUT_S = 15.0
STALL_TIMEOUT_S = 20.0
"""If no socket is ready for this long, something between the ends has stalled."""

NO_LIMIT_MS = 3_600_000


class Load:
    """The commands of the benchmark. Each gets the address to connect to and the name to ask for."""

    def __init__(self) -> None:
        self._buffer = bytearray(CHUNK_BYTES)
        self._payload = memoryview(bytes(CHUNK_BYTES))
        self._held: list[socket.socket] = []
        self._hellos: dict[str, bytes] = {}

    def probe(self, address: tuple[str, int], name: str) -> dict[str, Any]:
        """Open one stream and close it."""
        self._open(address, name, request(ECHO)).close()
        return {}

    def bulk(
        self, address: tuple[str, int], name: str, streams: int, direction: str, seconds: float, count: int
    ) -> dict[str, Any]:
        """Move bytes `up` or `down` for `seconds`, or `count` bytes per stream if it is not 0. Opening is not timed."""
        ms = NO_LIMIT_MS if count else round(seconds * 1000)
        what = request(UPLOAD if direction == "up" else DOWNLOAD, ms=ms, count=count)
        socks = [self._open(address, name, what) for _ in range(streams)]
        try:
            for sock in socks:
                sock.setblocking(False)
            began = time.monotonic()
            moved = self._upload(socks, began + ms / 1000, count) if direction == "up" else self._download(socks, count)
            return {"bytes": moved, "seconds": time.monotonic() - began}
        finally:
            for sock in socks:
                sock.close()

    def _upload(self, socks: Sequence[socket.socket], deadline: float, count: int) -> int:
        by_fd = {sock.fileno(): sock for sock in socks}
        sent = dict.fromkeys(by_fd, 0)
        confirmed = 0
        with select.epoll() as epoll:
            for descriptor in by_fd:
                epoll.register(descriptor, select.EPOLLOUT)
            while by_fd:
                for descriptor, event in _ready(epoll):
                    sock = by_fd[descriptor]
                    if not event & select.EPOLLOUT:  # the last event of a stream: its count has arrived
                        (arrived,) = COUNT.unpack(_receive(sock, COUNT.size))
                        if arrived != sent[descriptor]:
                            raise ValueError(f"{sent[descriptor]} bytes sent, {arrived} arrived")
                        confirmed += arrived
                        epoll.unregister(descriptor)
                        del by_fd[descriptor]
                    elif time.monotonic() >= deadline or 0 < count <= sent[descriptor]:
                        sock.shutdown(socket.SHUT_WR)
                        epoll.modify(descriptor, select.EPOLLIN)
                    else:
                        piece = self._payload[: count - sent[descriptor]] if count else self._payload
                        sent[descriptor] += _tried(sock.send, piece)
        return confirmed

    def _download(self, socks: Sequence[socket.socket], count: int) -> int:
        by_fd = {sock.fileno(): sock for sock in socks}
        received = dict.fromkeys(by_fd, 0)
        with select.epoll() as epoll:
            for descriptor, sock in by_fd.items():
                epoll.register(descriptor, select.EPOLLIN)
                sock.send(GO)
            while by_fd:
                for descriptor, _ in _ready(epoll):
                    size = by_fd[descriptor].recv_into(self._buffer)
                    received[descriptor] += size
                    if not size:
                        if count and received[descriptor] != count:
                            raise ValueError(f"{count} bytes requested, {received[descriptor]} arrived")
                        epoll.unregister(descriptor)
                        del by_fd[descriptor]
        return sum(received.values())

    def connections(self, address: tuple[str, int], name: str, streams: int, seconds: float) -> dict[str, Any]:
        """For `seconds`, open streams, `streams` at a time, and close each after its first byte."""
        where, first = (address[0], address[1]), self._hello(name) + request(ECHO)
        took: list[float] = []
        begun: dict[int, tuple[socket.socket, float]] = {}
        began = time.monotonic()
        with select.epoll() as epoll:

            def begin() -> None:
                at = time.monotonic()
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                begun[sock.fileno()] = sock, at
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect_ex(where)
                # On loopback the connection is already established; elsewhere the first event reports it.
                unsent = _tried(sock.send, first) != len(first)
                epoll.register(sock.fileno(), select.EPOLLOUT if unsent else select.EPOLLIN)

            try:
                for _ in range(streams):
                    begin()
                while begun:
                    for descriptor, event in _ready(epoll):
                        sock, at = begun[descriptor]
                        if event & select.EPOLLOUT:
                            sock.sendall(first)
                            epoll.modify(descriptor, select.EPOLLIN)
                            continue
                        _receive(sock, len(READY))
                        now = time.monotonic()
                        took.append(now - at)
                        del begun[descriptor]
                        sock.close()
                        if now - began < seconds:
                            begin()
            finally:
                for sock, _ in begun.values():
                    sock.close()
        return {"count": len(took), "seconds": time.monotonic() - began, **_percentiles(took)}

    def round_trips(
        self, address: tuple[str, int], name: str, streams: int, seconds: float, size: int
    ) -> dict[str, Any]:
        """For `seconds`, send messages of `size` bytes; each stream sends the next one when the last has come back."""
        message = self._payload[:size]
        socks = [self._open(address, name, request(ECHO)) for _ in range(streams)]
        took: list[float] = []
        try:
            with select.epoll() as epoll:
                by_fd: dict[int, list[Any]] = {}
                began = time.monotonic()
                for sock in socks:
                    epoll.register(sock.fileno(), select.EPOLLIN)
                    by_fd[sock.fileno()] = [sock, time.monotonic()]
                    sock.sendall(message)
                while by_fd:
                    for descriptor, _ in _ready(epoll):
                        state = by_fd[descriptor]
                        _receive(state[0], size)
                        now = time.monotonic()
                        took.append(now - state[1])
                        if now - began < seconds:
                            state[1] = now
                            state[0].sendall(message)
                        else:
                            del by_fd[descriptor]
            return {"count": len(took), "seconds": time.monotonic() - began, **_percentiles(took)}
        finally:
            for sock in socks:
                sock.close()

    def hold(self, address: tuple[str, int], name: str, streams: int) -> dict[str, Any]:
        """Open idle streams, which stay open until `release`."""
        for _ in range(streams):
            self._held.append(self._open(address, name, request(ECHO)))
        return {}

    def release(self) -> dict[str, Any]:
        """Close the idle streams."""
        while self._held:
            self._held.pop().close()
        return {}

    def _hello(self, name: str) -> bytes:
        if name not in self._hellos:
            self._hellos[name] = client_hello(name)
        return self._hellos[name]

    def _open(self, address: tuple[str, int], name: str, what: bytes) -> socket.socket:
        """Open a stream, and wait for the service's READY."""
        sock = socket.create_connection((address[0], address[1]), OPEN_TIMEOUT_S)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(self._hello(name) + what)
            if sock.recv(1) != READY:
                raise EOFError("refused: no service at the far end")
        except BaseException:
            sock.close()
            raise
        return sock


def _ready(epoll: select.epoll) -> list[tuple[int, int]]:
    events = epoll.poll(STALL_TIMEOUT_S)
    if not events:
        raise TimeoutError(f"no progress for {STALL_TIMEOUT_S:g} s")
    return events


def _tried(send: Any, data: Any) -> int:
    try:
        return int(send(data))
    except BlockingIOError:
        return 0


def _receive(sock: socket.socket, size: int) -> bytes:
    """Receive a message of `size` bytes. Blocks for what is missing, since it nearly always arrives in one piece."""
    data = sock.recv(size)
    while data and len(data) < size:
        select.select([sock], [], [], STALL_TIMEOUT_S)
        data += sock.recv(size - len(data))
    if not data:
        raise EOFError("the stream ended before its answer")
    return data


def _percentiles(took: list[float]) -> dict[str, float]:
    """Return p50 and p99 by nearest rank, in microseconds."""
    took.sort()
    return {f"p{p}_us": took[max(0, math.ceil(len(took) * p / 100) - 1)] * 1e6 for p in (50, 99)}


def main() -> None:
    """Serve the commands of the benchmark."""
    allow_open_files()
    load = Load()
    serve_commands(
        {
            "probe": load.probe,
            "bulk": load.bulk,
            "connections": load.connections,
            "round_trips": load.round_trips,
            "hold": load.hold,
            "release": load.release,
        }
    )


if __name__ == "__main__":
    main()
