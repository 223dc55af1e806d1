"""A transport without a socket: relay and gateway in one process, bytes in memory.

It proves that a new transport needs one file and one line in the registry.

It has the traits of TURN, so that everything a transport can need is used: retries, warm connections, second connections.
"""

import asyncio
import errno
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from discovery.model.lookup import Place
from discovery.model.mesh import Kind, Mesh
from sniproxy.engine import StreamClosed
from sniproxy.engine.byte_stream import DEFAULT_READ_BYTES, Buffer
from sniproxy.engine.quantum import Quantum
from sniproxy.transport import registry
from sniproxy.transport.base import (
    Accepted,
    Candidate,
    OnStream,
    TransportConfig,
    endpoint_in,
    framed_candidate,
)
from sniproxy.transport.turn import TURN

MEMORY = replace(TURN, name="memory", rank=0)
BUFFER_BYTES = 64 * 1024
"""The most that one direction buffers before its writer waits."""


class _Direction:
    """The bytes that one end has written and the other has not read yet."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False
        self.cut = False
        self.changed: list[asyncio.Future[None]] = []

    def tell(self) -> None:
        for waiter in self.changed:
            if not waiter.done():
                waiter.set_result(None)
        self.changed.clear()

    async def change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self.changed.append(waiter)
        await waiter


class MemoryStream:
    """One end of a connection. Implements `sniproxy.engine.ByteStream`."""

    spliceable = False
    fd = -1
    memory = None

    def __init__(self, inward: _Direction, outward: _Direction, local: tuple[str, int], peer: tuple[str, int]) -> None:
        self._in, self._out = inward, outward
        self.local, self.peer = local, peer
        self.quantum = Quantum()
        self.closed = False
        self._expired = False
        self._unread = b""

    @property
    def holds_unread(self) -> bool:
        return bool(self._unread)

    def unread(self, data: Buffer) -> None:
        self._unread = bytes(data) + self._unread

    def take_unread(self) -> bytes:
        data, self._unread = self._unread, b""
        return data

    async def recv(self, limit: int = DEFAULT_READ_BYTES, *, low: int = 1) -> bytes:
        await self.take_turn()
        while True:
            data = self.try_recv(limit)
            if data:
                self.quantum.spend(len(data))
                return data
            if self._in.cut:
                raise ConnectionResetError(errno.ECONNRESET, "reset")
            if self._in.ended:
                return b""
            await self.readable()

    async def recv_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await self.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def try_recv(self, limit: int = DEFAULT_READ_BYTES) -> bytes:
        source = self._unread or self._in.data
        data = bytes(source[:limit])
        if self._unread:
            self._unread = self._unread[limit:]
        elif data:
            del self._in.data[:limit]
            self._in.tell()
        return data

    async def readable(self, low: int = 1) -> None:
        self._check()
        while not (self._in.data or self._in.ended or self._in.cut):
            await self._in.change()
            self._check()
        self.quantum.waited()

    async def take_turn(self) -> None:
        self._check()
        if self.quantum.used_up:
            await self.quantum.renew()
            self._check()

    def _check(self) -> None:
        if self.closed:
            raise StreamClosed(errno.EBADF, "closed on our side")
        if self._expired:
            raise TimeoutError

    def expire(self) -> None:
        self._expired = True
        self._in.tell()

    def try_send(self, buffers: Iterable[Buffer], flags: int = 0) -> int:
        if self.closed:
            raise StreamClosed(errno.EBADF, "closed on our side")
        if self._out.cut:
            raise BrokenPipeError(errno.EPIPE, "reset")
        data = b"".join(buffers)[: BUFFER_BYTES - len(self._out.data)]
        self._out.data += data
        self._out.tell()
        return len(data)

    async def send(self, *buffers: Buffer, more: bool = False) -> None:
        rest = memoryview(b"".join(buffers))
        while rest := rest[self.try_send((rest,)) :]:
            await self.writable()

    async def writable(self) -> None:
        while not (self.closed or self._out.cut or len(self._out.data) < BUFFER_BYTES):
            await self._out.change()

    @property
    def is_full(self) -> bool:
        return len(self._out.data) >= BUFFER_BYTES

    def take_full_s(self) -> float:
        return 0.0

    def wake_writer(self) -> None:
        pass

    def lost_peer(self) -> bool:
        return False

    def has_delivered(self, *, all_but: int) -> bool:
        return len(self._out.data) <= all_but

    async def flushed(self, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                while self._out.data and not (self.closed or self._out.cut):
                    await self._out.change()
        except TimeoutError:
            pass
        return not self._out.data

    def shutdown_write(self) -> None:
        self._out.ended = True
        self._out.tell()

    def close(self) -> None:
        if self.closed:
            return
        if self._in.data:  # as the kernel does
            self.reset()
            return
        self.closed = True
        self._in.cut = True  # later writes of the far end fail
        self.shutdown_write()
        self._in.tell()

    def reset(self) -> None:
        if not self.closed:
            self.closed = True
            self._in.cut = self._out.cut = True
            self._in.tell()
            self._out.tell()

    async def drain_and_close(self, *, limit_bytes: int = 64 * 1024, limit_s: float = 1.0) -> None:
        try:
            self.shutdown_write()
            async with asyncio.timeout(limit_s):
                while limit_bytes > 0 and (data := await self.recv(limit_bytes)):
                    limit_bytes -= len(data)
        except (OSError, TimeoutError):
            pass
        finally:
            self.close()


class MemoryAcceptor:
    """The gateway's side. Its address is that of a bound socket that does not listen, so no other test can get it."""

    at: "dict[tuple[str, int], MemoryAcceptor]" = {}

    def __init__(self, addressee: str) -> None:
        self._addressee = addressee
        self._held = socket.socket()
        self._held.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._held.getsockname()
        self._take: OnStream | None = None
        self._closed = asyncio.Event()
        self.at[self.address] = self

    async def run(self, on_stream: OnStream) -> None:
        self._take = on_stream
        await self._closed.wait()

    def close(self) -> None:
        self._take = None
        self._closed.set()
        self.at.pop(self.address, None)
        self._held.close()

    def connect(self) -> MemoryStream:
        """Connect to it. Raises OSError if it does not accept."""
        if self._take is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody accepts")
        up, down = _Direction(), _Direction()
        near, far = ("127.0.0.1", 1), self.address
        self._take(
            Accepted(
                stream=MemoryStream(up, down, far, near),
                traits=MEMORY,
                addressee=self._addressee,
                came_by={"via": "memory"},
            )
        )
        return MemoryStream(down, up, near, far)


class MemoryTransport:
    """The relay's side."""

    traits = MEMORY
    lacks = "no gateway in this process"

    def __init__(self, config: TransportConfig) -> None:
        pass

    def candidates(self, place: Place, mesh: Mesh) -> Iterator[Candidate]:
        for gateway in mesh.gateways(place.network):
            endpoint = endpoint_in(gateway.spec.address)
            if endpoint is not None and (str(endpoint[0]), endpoint[1]) in MemoryAcceptor.at:
                yield framed_candidate(MEMORY, place, endpoint, gateway, near=False)

    def offers(self, candidate: Candidate, mesh: Mesh) -> bool:
        return mesh.record(Kind.GATEWAY, candidate.network, candidate.addressee) is not None

    async def dial(self, candidate: Candidate, *, timeout_s: float) -> MemoryStream:
        acceptor = MemoryAcceptor.at.get((candidate.address, candidate.port))
        if acceptor is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no such gateway")
        return acceptor.connect()


@contextmanager
def registered() -> Iterator[None]:
    """Register the transport for relays that are made in the block."""
    registry.TRANSPORTS.append(MemoryTransport)
    try:
        yield
    finally:
        registry.TRANSPORTS.remove(MemoryTransport)
