"""A distant server: a hop that delays everything that passes through it, in both directions.

    python -m bench.far PORT MILLISECONDS        delay in one direction; prints the port where it listens

The kernel's netem would do the same and better, but many small machines do not have it. The first byte of a new connection waits
for a round trip, as it would for the handshake. Bytes keep their order and are not slowed down otherwise, and nothing is lost. A
FIN is passed on after the bytes before it, a reset immediately.
"""

import asyncio
import sys
from collections import deque
from typing import cast

import uvloop

HOST = "127.0.0.1"
MAX_HELD_BYTES = 64 * 1024 * 1024
"""Per direction: 1 Gb/s for half a second. Above it, reading from the sender pauses."""


class _Cable(asyncio.Protocol):
    """One end of a connection: data received here is sent from the other end later."""

    def __init__(self, late_s: float) -> None:
        self._late_s = late_s
        self._loop = asyncio.get_running_loop()
        self._held: deque[tuple[float, bytes | None]] = deque()
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None
        self.other: _Cable | None = None
        self.clear_at = 0.0
        """Loop time at which the other end is connected; the delay of data received before starts then."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._hold(data)
        self._size += len(data)
        if self._size > MAX_HELD_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self._hold(None)
        return True  # this end still writes

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None and self.other is not None and self.other.transport is not None:
            self.other.transport.abort()

    def _hold(self, data: bytes | None) -> None:
        self._held.append((max(self._loop.time(), self.clear_at) + self._late_s, data))
        self.pour()

    def pour(self) -> None:
        """Send what is due, and set a timer for the rest."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        out = None if self.other is None else self.other.transport
        while self._held and out is not None:
            due, data = self._held[0]
            if due > self._loop.time():
                self._timer = self._loop.call_at(due, self.pour)
                return
            self._held.popleft()
            if data is None:
                if out.can_write_eof() and not out.is_closing():
                    out.write_eof()
                continue
            self._size -= len(data)
            out.write(data)
        if self._size <= MAX_HELD_BYTES and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()


async def _serve(port: int, late_s: float) -> None:
    loop = asyncio.get_running_loop()

    async def begin(near: _Cable) -> None:
        near.clear_at = loop.time() + 2 * late_s
        await asyncio.sleep(late_s)  # the delay of the SYN
        try:
            _, far = await loop.create_connection(lambda: _Cable(late_s), HOST, port)
        except OSError:
            if near.transport is not None:
                near.transport.abort()
            return
        near.other, far.other = far, near
        near.pour()

    async with asyncio.TaskGroup() as group:

        class Accepted(_Cable):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                group.create_task(begin(self))

        server = await loop.create_server(lambda: Accepted(late_s), HOST, 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), float(sys.argv[2]) / 1000))
