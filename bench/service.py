"""The service at the far end of every path, a worker: one process with one epoll loop and any number of streams."""

import json
import os
import select
import socket
import sys
import time

from bench.exchange import CHUNK_BYTES, COUNT, DOWNLOAD, ECHO, READY, UPLOAD, parse_start
from bench.worker import allow_open_files

ACCEPT_BATCH = 64
BACKLOG = 4096


class _Stream:
    """One client's connection, starting with its ClientHello."""

    __slots__ = ("deadline", "left", "limit_ms", "sock", "start", "taken", "what")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.start = bytearray()
        self.what = b""
        self.limit_ms = 0
        self.left: int | None = None
        self.deadline = 0.0
        self.taken = 0


class Service:
    """Serves streams until its standard input ends."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._streams: dict[int, _Stream] = {}
        self._buffer = bytearray(CHUNK_BYTES)
        self._payload = memoryview(os.urandom(CHUNK_BYTES))

    @property
    def port(self) -> int:
        """The port of loopback on which it listens."""
        port: int = self._listener.getsockname()[1]
        return port

    def run(self, stdin: int) -> None:
        """Serve until `stdin` ends."""
        self._epoll.register(stdin, select.EPOLLIN)
        while True:
            for descriptor, _ in self._epoll.poll():
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor == stdin:
                    return
                elif (stream := self._streams.get(descriptor)) is not None:
                    try:
                        self._serve(stream)
                    except BlockingIOError:
                        pass
                    except OSError:
                        self._close(stream)  # the client counts the bytes it got, and reports the cut

    def _accept(self) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._streams[sock.fileno()] = _Stream(sock)
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _serve(self, stream: _Stream) -> None:
        if not stream.what:
            self._begin(stream)
        elif stream.what == ECHO:
            size = stream.sock.recv_into(self._buffer)
            if size:
                stream.sock.send(memoryview(self._buffer)[:size])
            else:
                self._close(stream)
        elif stream.what == UPLOAD:
            self._take(stream)
        elif stream.deadline:
            self._give(stream)
        else:
            if stream.sock.recv(1):
                stream.deadline = time.monotonic() + stream.limit_ms / 1000
                self._epoll.modify(stream.sock.fileno(), select.EPOLLOUT)
            else:
                self._close(stream)

    def _begin(self, stream: _Stream) -> None:
        data = stream.sock.recv(65536)
        if not data:
            self._close(stream)
            return
        stream.start += data
        parsed = parse_start(stream.start)
        if parsed is None:
            return
        stream.what, stream.limit_ms, count, _ = parsed
        if stream.what == DOWNLOAD:
            stream.left = count or None
        stream.start.clear()
        stream.sock.send(READY)

    def _take(self, stream: _Stream) -> None:
        size = stream.sock.recv_into(self._buffer)
        if size:
            stream.taken += size
        else:
            stream.sock.send(COUNT.pack(stream.taken))
            self._close(stream)

    def _give(self, stream: _Stream) -> None:
        if time.monotonic() >= stream.deadline or stream.left == 0:
            self._close(stream)
            return
        sent = stream.sock.send(self._payload if stream.left is None else self._payload[: stream.left])
        if stream.left is not None:
            stream.left -= sent

    def _close(self, stream: _Stream) -> None:
        self._epoll.unregister(stream.sock.fileno())
        del self._streams[stream.sock.fileno()]
        stream.sock.close()


def main() -> None:
    """Print the port, then serve."""
    allow_open_files()
    service = Service()
    sys.stdin.readline()  # the benchmark asks for the port
    print(json.dumps({"port": service.port}), flush=True)
    service.run(sys.stdin.fileno())


if __name__ == "__main__":
    main()
