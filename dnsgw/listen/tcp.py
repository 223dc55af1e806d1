"""Questions over TCP (RFC 7766): many on one connection, answered in the order in which answers become available.

A connection is read in small pieces, and the time that its questions take counts against the engine's quantum: a client that asks
faster than it is answered slows down only itself.

This server is an asyncio.Protocol, not an engine.Listener with a SocketStream for each connection. Those would cost, in CPU time
per question on uvloop, 28 % more if each question has its own connection and 21 % more if they share one, one after the other
(medians of 5 alternating rounds; here it is 140 µs and 42 µs). Even a bare accept(2) with a reader callback per socket costs 25 %
more per connection than uvloop's own transports, which accept, watch and read in C. The relay needs the descriptor, for splice(2);
a resolver does not.
"""

import asyncio
import socket
from time import perf_counter
from typing import Any, cast

from dnsgw.client_limits import Client, Host, client_of, packed
from dnsgw.message.question import HEADER_SIZE
from dnsgw.resolver import Resolver
from dnsgw.upstream.host_resolvers import Endpoint
from sniproxy.engine.quantum import Quantum
from sniproxy.engine.socket_address import socket_address

MAX_QUERY = 4096  # as over UDP
MAX_PIPELINED = 128  # unanswered questions of one connection; with so many it is not read
READ_SIZE = 8192  # bytes read from one connection before they are handled
WRITE_SIZE = 16384  # bytes of answers per write
MAX_UNREAD = 256 * 1024  # bytes of unread answers, in addition to the kernel's buffer, after which a client is cut off
BACKLOG = 256
_PORTION = 8  # questions between two reads of the clock
_MESSAGES_A_SECOND = 10_000  # one message of the engine's quantum is 100 µs of work


class TcpListener:
    """One listening socket and its connections."""

    def __init__(
        self,
        endpoint: Endpoint,
        resolver: Resolver,
        *,
        max_connections: int,
        max_connections_per_client: int,
        idle_timeout_s: float,
        reuse_port: bool = False,
    ) -> None:
        """Bind and listen; `start` accepts connections. Raises OSError.

        Args:
            endpoint: address and port; port 0: any.
            resolver: answers the questions.
            max_connections: of all clients; more are closed at once.
            max_connections_per_client: likewise, of one client.
            idle_timeout_s: a connection without a complete question for this long is closed.
            reuse_port: other processes may bind the same address.
        """
        address, port = endpoint
        self.resolver = resolver
        self.space = memoryview(bytearray(READ_SIZE))
        """Read buffer of all connections: its content is copied out at once."""
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
            self._sock.bind(socket_address(address, port))
            self._sock.listen(BACKLOG)
            self._sock.setblocking(False)
        except OSError:
            self._sock.close()
            raise
        self.port: int = self._sock.getsockname()[1]

    def __len__(self) -> int:
        return len(self._connections)

    async def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Accept connections."""
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
        """Count a new connection; False: there are too many."""
        client = client_of(host)
        mine = self._clients.get(client, 0)
        if len(self._connections) >= self._max_connections or mine >= self._max_connections_per_client:
            return False
        self._connections[connection] = client
        self._clients[client] = mine + 1
        return True

    def forget(self, connection: "_Connection") -> None:
        """Stop counting a connection."""
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
        """Unanswered questions."""
        self._out = bytearray()
        """Answers that go out in one write after the questions at hand."""
        self._handling = False
        self._in_turn = False
        """The buffer waits for its turn."""
        self._quantum = Quantum()
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
        """Close the connection. Answers are still sent, unless the client does not read."""
        if self._transport is not None:
            if self._writable:
                self._transport.close()
            else:
                self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._listener.space

    def buffer_updated(self, nbytes: int) -> None:
        if nbytes < READ_SIZE:
            self._quantum.waited()  # nothing more was there to read
        self._buffer += self._listener.space[:nbytes]
        if self._in_turn or self._quantum.used_up:
            self._queue()
            self._read_or_not()
        else:
            self._handle()

    def eof_received(self) -> bool:
        """The client asks nothing more, but may wait for answers."""
        self._ended = True
        return self._waiting > 0 or self._is_whole()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._queue()

    def _queue(self) -> None:
        """Queue for a turn, if there is a question to handle."""
        if not self._in_turn and self._open_for_more() and self._is_whole():
            self._in_turn = True
            self._quantum.renew_then(self._on_turn)

    def _on_turn(self) -> None:
        self._in_turn = False
        self._handle()

    def _handle(self) -> None:
        """Handle questions until there is none, too many are unanswered, or the quantum is used up; then read on, or close."""
        transport, buffer, quantum = self._transport, self._buffer, self._quantum
        begin = count = 0
        began = perf_counter()
        self._handling = True
        while transport is not None and not transport.is_closing() and self._open_for_more():
            if len(buffer) - begin < 2:
                break
            size = int.from_bytes(buffer[begin : begin + 2], "big")
            if not HEADER_SIZE <= size <= MAX_QUERY:
                self._flush()
                transport.close()
                break
            end = begin + 2 + size
            if len(buffer) < end:
                break
            self._waiting += 1
            self._last = self._loop.time()
            self._listener.resolver.handle(bytes(buffer[begin + 2 : end]), self._host, self._send, None, True)
            begin = end
            count += 1
            if not count % _PORTION:
                now = perf_counter()
                quantum.spend(0, (now - began) * _MESSAGES_A_SECOND)
                began = now
                if quantum.used_up:
                    break
        quantum.spend(0, (perf_counter() - began) * _MESSAGES_A_SECOND)
        self._handling = False
        del buffer[:begin]
        if transport is None or transport.is_closing():
            buffer.clear()
            return
        self._flush()
        self._queue()
        self._read_or_not()
        self._close_if_done()

    def _is_whole(self) -> bool:
        """Whether the buffer has a complete message, or an invalid length, to handle."""
        if len(self._buffer) < 2:
            return False
        size = int.from_bytes(self._buffer[:2], "big")
        return not HEADER_SIZE <= size <= MAX_QUERY or len(self._buffer) >= 2 + size

    def _read_or_not(self) -> None:
        """Pause reading while the buffer is full, and resume it after."""
        wanted = len(self._buffer) < READ_SIZE
        transport = self._transport
        if wanted is not self._reading and transport is not None and not transport.is_closing() and not self._ended:
            self._reading = wanted
            transport.resume_reading() if wanted else transport.pause_reading()

    def _close_if_done(self) -> None:
        """Close once the client has sent its last question and has all answers."""
        if self._ended and not self._waiting and not self._is_whole() and self._transport is not None:
            self._transport.close()

    def _open_for_more(self) -> bool:
        return self._writable and self._waiting < MAX_PIPELINED

    def _send(self, reply: bytes, where: Any) -> None:  # noqa: ARG002 - only UDP needs `where`
        self._waiting -= 1
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if reply:
            self._out += len(reply).to_bytes(2, "big")
            self._out += reply
        if not reply or not self._handling or len(self._out) >= WRITE_SIZE:
            self._flush()
        if not reply:
            transport.close()  # over TCP, a packet that gets no reply ends the connection
        if not self._handling:
            self._queue()  # in a later turn: many answers may come in one pass of the loop
            self._close_if_done()

    def _flush(self) -> None:
        """Write the answers."""
        transport = self._transport
        if transport is None or not self._out:
            return
        out, self._out = self._out, bytearray()
        transport.write(out)
        if not self._writable and transport.get_write_buffer_size() > MAX_UNREAD:
            transport.abort()  # answers to earlier questions keep coming, each of up to 64 KiB

    def _check_idle(self) -> None:
        """Close an idle connection: no complete question came, and none is unanswered unless the client does not read."""
        if self._transport is None:
            return
        left_s = self._last + self._listener.idle_timeout_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_idle)
        elif self._waiting and self._writable:
            self._timer = self._loop.call_later(self._listener.idle_timeout_s, self._check_idle)
        else:
            self._transport.abort() if self._transport.get_write_buffer_size() else self._transport.close()
