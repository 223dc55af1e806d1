"""Thousands of clients that send one byte of their ClientHello per second, in one process with little overhead.

Plain sockets on a timer wheel of a thousand slots of one millisecond: a client costs two system calls a second. `late_ms` shows
whether the process kept to its schedule; if it did not, its figures are worthless.
"""

import errno
import socket
import time
from collections.abc import Callable

SLOTS = 1000
SPREAD_S = 5.0
"""Clients that are not in lockstep connect over this time, the relay's deadline, so that they never expire together."""


class Slow:
    """Slow clients of the relay at this port of loopback."""

    def __init__(self, relay: int, hello: bytes, count: int, *, lockstep: bool) -> None:
        self._relay = relay
        self._hello = hello
        self._sockets: list[socket.socket | None] = [None] * count
        self._sent = [0] * count
        now = time.monotonic()
        self._due = [now if lockstep else now + SPREAD_S * (number * 7919 % count) / count for number in range(count)]
        self._wheel: list[list[int]] = [[] for _ in range(SLOTS)]
        for number in range(count):
            self._wheel[0 if lockstep else number * SLOTS // count].append(number)
        self.cut = 0
        self.begin()

    def begin(self) -> None:
        """Reset the statistics."""
        self._began, self._slot, self._late = time.monotonic(), 0, 0.0
        self._cut_before, self._cpu_before = self.cut, time.process_time()

    def run(self, until: Callable[[], bool]) -> None:
        """Send until `until()` is true, which is checked every tenth of a second."""
        while True:
            for _ in range(SLOTS // 10):
                left = self._began + self._slot / SLOTS - time.monotonic()
                if left > 0:
                    time.sleep(left)
                else:
                    self._late = max(self._late, -left)
                for number in self._wheel[self._slot % SLOTS]:
                    self._tick(number)
                self._slot += 1
            if until():
                return

    def done(self) -> dict[str, object]:
        """Return the statistics since `begin`."""
        seconds = time.monotonic() - self._began
        return {
            "clients": len(self._sockets),
            "cut_per_s": round((self.cut - self._cut_before) / seconds),
            "cores": round((time.process_time() - self._cpu_before) / seconds, 3),
            "late_ms": round(self._late * 1000, 1),
        }

    def _tick(self, number: int) -> None:
        client = self._sockets[number]
        if client is None:
            if time.monotonic() >= self._due[number]:
                self._connect(number)
            return
        at = self._sent[number]
        try:
            client.send(self._hello[at : at + 1])
            self._sent[number] = at + 1
            ended = not client.recv(64)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.ENOTCONN:  # still connecting
                return
            ended = True
        if ended:
            client.close()
            self.cut += 1
            self._connect(number)

    def _connect(self, number: int) -> None:
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._sockets[number], self._sent[number] = client, 0
        try:
            client.connect(("127.0.0.1", self._relay))
        except BlockingIOError:
            pass
        except OSError:  # no port is free at the moment
            client.close()
            self._sockets[number] = None
