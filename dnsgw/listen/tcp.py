"""Questions over TCP (RFC 7766): many on one connection, answered in the order in which the answers come.

A connection is read a little at a time, and its questions take turns with everybody else's (`turns.py`), whether they are
answered at once or later: a client that asks faster than it is answered slows down nobody but itself.
"""

import asyncio
import socket
from typing import Any, cast

from dnsgw.client_limits import Client, Host, client_of, packed
from dnsgw.message.question import HEADER_SIZE
from dnsgw.resolver import Resolver
from dnsgw.turns import PORTION, Turns
from dnsgw.upstream.server import Endpoint

MAX_QUERY = 4096  # as over UDP
MAX_PIPELINED = 128  # questions of one connection that wait for their answers; then it is not read
READ_SIZE = 8192  # bytes read from one connection before what is there has been handled
MAX_UNREAD = 256 * 1024  # bytes of answers that a client does not read, besides what the kernel keeps for it
BACKLOG = 256


class TcpListener:
    """One listening socket and its connections."""

    def __init__(
        self,
        endpoint: Endpoint,
        resolver: Resolver,
        turns: Turns,
        *,
        max_connections: int,
        max_connections_per_client: int,
        idle_timeout_s: float,
        reuse_port: bool = False,
    ) -> None:
        """Bind and listen; connections are accepted from `start` on. Raises OSError."""
        address, port = endpoint
        self.resolver = resolver
        self.turns = turns
        self.space = memoryview(bytearray(READ_SIZE))
        """Where every connection reads into: what came is taken out at once."""
        self.idle_timeout_s = idle_timeout_s
        self._max_connections = max_connections
        self._max_connections_per_client = max_connections_per_client
        self._connections: dict[_Connection, Client] = {}
        self._clients: dict[Client, int] = {}
        self._server: asyncio.Server | None = None
        self._sock = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if address.version == 6:
                self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self._sock.bind((str(address), port))
            self._sock.listen(BACKLOG)
            self._sock.setblocking(False)
        except OSError:
            self._sock.close()
            raise
        self.port: int = self._sock.getsockname()[1]

    def __len__(self) -> int:
        return len(self._connections)

    async def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to answer."""
        self._server = await loop.create_server(lambda: _Connection(self, loop), sock=self._sock, backlog=BACKLOG)

    def close(self) -> None:
        """Close the socket and every connection."""
        if self._server is not None:
            self._server.close()
        else:
            self._sock.close()
        for connection in list(self._connections):
            connection.close()

    def admit(self, connection: "_Connection", host: Host) -> bool:
        """Count a connection, or say that there are too many."""
        client = client_of(host)
        mine = self._clients.get(client, 0)
        if len(self._connections) >= self._max_connections or mine >= self._max_connections_per_client:
            return False
        self._connections[connection] = client
        self._clients[client] = mine + 1
        return True

    def forget(self, connection: "_Connection") -> None:
        """Count a connection out."""
        client = self._connections.pop(connection, None)
        if client is not None:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]


class _Connection(asyncio.BufferedProtocol):
    """One client's connection."""

    def __init__(self, listener: TcpListener, loop: asyncio.AbstractEventLoop) -> None:
        self._listener = listener
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._host = b""
        self._buffer = bytearray()
        self._waiting = 0
        """Questions whose answers are not there yet."""
        self._in_turn = False
        """What is in the buffer has its turns."""
        self._reading = True
        self._writable = True
        self._ended = False
        self._last = loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._host = packed(peer[0]) if peer else b""
        if not peer or not self._listener.admit(self, self._host):
            self._transport.abort()
            return
        self._timer = self._loop.call_later(self._listener.idle_timeout_s, self._check_idle)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._transport = None
        self._buffer.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._listener.forget(self)

    def close(self) -> None:
        """End the connection; what was answered still goes out, unless the client does not read."""
        if self._transport is not None:
            if self._writable:
                self._transport.close()
            else:
                self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._listener.space

    def buffer_updated(self, nbytes: int) -> None:
        self._buffer += self._listener.space[:nbytes]
        self._take_turns()
        self._read_or_not()

    def eof_received(self) -> bool:
        """The client asks no more. It may still wait for answers."""
        self._ended = True
        return self._waiting > 0 or self._in_turn

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._take_turns()

    def _take_turns(self) -> None:
        """Have what is in the buffer handled, unless too much waits or the client does not read its answers."""
        if not self._in_turn and self._open_for_more() and self._is_whole():
            self._in_turn = True
            self._listener.turns.add(self._turn)

    def _turn(self) -> bool:
        """Handle a few questions; tell whether there are more to handle now."""
        transport, buffer = self._transport, self._buffer
        begin = 0
        for _ in range(PORTION):
            if transport is None or transport.is_closing() or not self._open_for_more() or len(buffer) - begin < 2:
                break
            size = int.from_bytes(buffer[begin : begin + 2], "big")
            if not HEADER_SIZE <= size <= MAX_QUERY:
                transport.close()
                break
            end = begin + 2 + size
            if len(buffer) < end:
                break
            self._waiting += 1
            self._last = self._loop.time()
            self._listener.resolver.handle(bytes(buffer[begin + 2 : end]), self._host, self._send, None, True)
            begin = end
        del buffer[:begin]
        if transport is None or transport.is_closing():
            buffer.clear()
        self._in_turn = self._open_for_more() and self._is_whole()
        self._read_or_not()
        self._close_if_done()
        return self._in_turn

    def _is_whole(self) -> bool:
        """Tell whether a question, or what is none, is there to be handled."""
        if len(self._buffer) < 2:
            return False
        size = int.from_bytes(self._buffer[:2], "big")
        return not HEADER_SIZE <= size <= MAX_QUERY or len(self._buffer) >= 2 + size

    def _read_or_not(self) -> None:
        """Read on when there is little left to handle."""
        wanted = len(self._buffer) < READ_SIZE
        transport = self._transport
        if wanted is not self._reading and transport is not None and not transport.is_closing() and not self._ended:
            self._reading = wanted
            transport.resume_reading() if wanted else transport.pause_reading()

    def _close_if_done(self) -> None:
        """Close once the client asks no more and has all its answers."""
        if self._ended and not self._waiting and not self._is_whole() and self._transport is not None:
            self._transport.close()

    def _open_for_more(self) -> bool:
        return self._writable and self._waiting < MAX_PIPELINED

    def _send(self, reply: bytes, where: Any) -> None:  # noqa: ARG002 - where is for UDP
        self._waiting -= 1
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if reply:
            transport.write(len(reply).to_bytes(2, "big") + reply)
        else:
            transport.close()  # what needs no reply has no place on a connection either
        if not self._writable and transport.get_write_buffer_size() > MAX_UNREAD:
            transport.abort()  # what it asked for before goes on coming, and may be 64 KiB each time
        self._take_turns()
        if not self._in_turn:
            self._close_if_done()

    def _check_idle(self) -> None:
        """Close what has been quiet for too long: no whole question came, and none is being answered or nobody reads it."""
        if self._transport is None:
            return
        left_s = self._last + self._listener.idle_timeout_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_idle)
        elif self._waiting and self._writable:
            self._timer = self._loop.call_later(self._listener.idle_timeout_s, self._check_idle)
        else:
            self._transport.abort() if self._transport.get_write_buffer_size() else self._transport.close()
