"""One upstream resolver, and the sockets to it.

An upstream has a pool of connected UDP sockets, so the kernel drops packets from elsewhere. Each uses a port that the kernel has
chosen at random, evenly from net.ipv4.ip_local_port_range, for a limited number of questions and seconds (`UpstreamLimits`). The
socket for a question is chosen at random, like the id (RFC 5452 section 9). `connections.py` has those over TCP and TLS.
Every upstream remembers its failures and capabilities.
"""

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable
from ipaddress import ip_address

from dnsgw.message.cookie import OPTION, SECRET_SIZE
from dnsgw.message.question import option
from dnsgw.message.upstream_query import encode, respelled, subnet_of
from dnsgw.upstream.address import UpstreamAddress, UpstreamProtocol
from dnsgw.upstream.capabilities import Capabilities
from dnsgw.upstream.connections import (
    Client,
    ConnectionPending,
    Connections,
    free_id,
)
from dnsgw.upstream.exchange import Attempt, Exchange, Pending, Trust
from dnsgw.upstream.https_client import HttpsClient
from dnsgw.upstream.limits import UPSTREAM_LIMITS, UpstreamLimits
from dnsgw.upstream.stream_client import Spawn, StreamClient
from sniproxy.engine.network_changes import source_towards
from sniproxy.engine.socket_address import socket_address

log = logging.getLogger(__name__)

DOWN_AFTER = 2  # attempts in a row without an answer; a single one may have been lost
_MAX_DATAGRAM = 65535
_MAX_DRAIN = 2  # packets read from one socket per callback: there are many sockets, and an answer is some work


class _Port:
    """One connected UDP socket: one source port for a while."""

    __slots__ = ("pending", "sock", "source", "stale", "timer", "uses")

    def __init__(self, sock: socket.socket, pending: Pending) -> None:
        self.sock = sock
        self.uses = 0
        self.pending = pending
        self.source = packed_source(sock)
        self.stale = False
        """The kernel would choose another source by now."""

        self.timer: asyncio.TimerHandle | None = None


def packed_source(sock: socket.socket) -> bytes:
    """Return the local address of a connected socket, packed."""
    return ip_address(sock.getsockname()[0].partition("%")[0]).packed


class Upstream:
    """One upstream resolver."""

    def __init__(
        self,
        destination: UpstreamAddress,
        loop: asyncio.AbstractEventLoop,
        *,
        received: Callable[[bytes, Pending], None],
        lost: Callable[[Pending], None],
        moved: Callable[[Pending], None],
        tls: ssl.SSLContext | None = None,
        random_case: bool = True,
        client_subnet: bool = False,
        limits: UpstreamLimits = UPSTREAM_LIMITS,
    ) -> None:
        """Open no socket yet.

        Args:
            destination: address and protocol.
            loop: the loop to run on.
            received: called with every packet, and the questions pending at its socket.
            lost: called when pending questions can no longer get an answer.
            moved: called when pending questions should be asked from another local address.
            tls: for TLS and HTTPS.
            random_case: ask in random case (DNS 0x20), over UDP only.
            client_subnet: forward the clients' subnet option.
            limits: of the sockets.
        """
        self.destination = destination
        self.looping = False
        """Questions to it come back to this server."""

        self.spawn: Spawn | None = None
        """Runs a coroutine in a task, for connections. None: the server does not run."""

        self.abilities = Capabilities(destination.address.packed, os.urandom(SECRET_SIZE))
        self._family = socket.AF_INET if destination.address.version == 4 else socket.AF_INET6
        self._destination = (str(destination.address), destination.port)
        self._loop = loop
        self._received = received
        self._lost = lost
        self._moved = moved
        self._tls = tls
        self._random_case = random_case and destination.way is UpstreamProtocol.UDP
        self._client_subnet = client_subnet
        self._limits = limits
        self._ports: list[_Port | None] = [None] * limits.pool
        self._retired: set[_Port] = set()
        self._connections = Connections(
            self,
            loop,
            open_connection=self._open_connection,
            message=self._stream_message,
            received=received,
            lost=lost,
            limits=limits.connections,
        )
        self._https: HttpsClient | None = None
        self._failures = 0
        self._down_until = 0.0

    def ask(self, exchange: Exchange, now: float, *, stream: bool) -> None:
        """Make one attempt, over a connection if `stream`. Raises OSError if it fails at once."""
        way = self.destination.way
        if way is UpstreamProtocol.HTTPS:
            self._ask_https(exchange, now)
        elif stream or way is not UpstreamProtocol.UDP:
            self._connections.ask(exchange)
        else:
            self._ask_port(exchange, now)

    def answered(self) -> None:
        """Note that it answered."""
        self._failures = 0
        self._down_until = 0.0

    def failed(self, now: float) -> None:
        """Note that it did not answer, or not in time. After two failures in a row it comes last for a while."""
        self._failures += 1
        if self._failures >= DOWN_AFTER:
            self._down_until = now + self._limits.down.bound_s(self._failures - DOWN_AFTER + 1)

    def is_down(self, now: float) -> bool:
        """Whether others should be asked first. When that time is over, a single question tries it again."""
        if self._failures < DOWN_AFTER:
            return False
        if now < self._down_until:
            return True
        self._down_until = now + self._limits.down.first_s
        return False

    def lost_case(self, now: float) -> None:
        """Stop asking in random case for a while, since it does not preserve case even over TCP."""
        if self.abilities.keeps_case(now):
            log.warning(
                "dns_case_lost",
                extra={
                    "event": {
                        "upstream": str(self.destination),
                        "detail": "its answers do not preserve the case of names: no random case for an hour",
                    }
                },
            )
        self.abilities.lost_case(now)

    def status(self) -> dict[str, object]:
        """Return its state, for the status page."""
        now = self._loop.time()
        if not self._random_case:
            case = "off"
        else:
            case = "on" if self.abilities.keeps_case(now) else "lost by upstream, tried again within the hour"
        return {
            "upstream": str(self.destination),
            "random_case": case,
            "cookies": self.abilities.has_cookies,
            "edns": self.abilities.takes_edns(now),
            "answers": self._failures < DOWN_AFTER,
            "loop": self.looping,
        }

    @property
    def in_random_case(self) -> bool:
        """Whether it is asked in random case now."""
        return self._random_case and self.abilities.keeps_case(self._loop.time())

    def close(self) -> None:
        """Close every socket. `received` and `lost` are not called any more."""
        ports, self._ports = self._ports, [None] * len(self._ports)
        for port in (*self._retired, *(port for port in ports if port is not None)):
            self._close_port(port)
        self._retired.clear()
        self._connections.close()

    def renew(self) -> None:
        """Give up the sockets and connections whose local address is not the one that the kernel would choose now.

        What they wait for is asked again. Without any route nothing changes: the host may get the same address again.
        """
        source = source_towards(*self._destination)
        if source is None:
            return
        packed = ip_address(source).packed
        stale = [
            port
            for port in (*self._ports, *self._retired)
            if port is not None and port.source != packed and not port.stale
        ]
        for port in stale:
            port.stale = True
            if port not in self._retired:
                self._replace(port)  # it may still get answers if the host has that address yet
        self._connections.renew(packed)
        if self._https is not None:
            self._https.renew(packed)
        for port in stale:
            if port.pending:
                self._moved(port.pending)

    async def ended(self) -> None:
        """Wait until all connections are closed; call `close` first."""
        https, self._https, self.spawn = self._https, None, None
        if https is not None:
            await https.close()

    def shed(self, pending: Pending) -> None:
        """Close the socket of `pending`, which receives unsolicited packets. `lost` is called only for a connection."""
        for port in (*self._retired, *self._ports):
            if port is not None and port.pending is pending:
                self._remove(port)
                return
        if self._connections.shed(pending):
            log.warning(
                "dns_upstream_refused",
                extra={"event": {"upstream": str(self.destination), "error": "it sends unsolicited answers"}},
            )

    def _message(self, attempt: Attempt, now: float, *, cookies: bool, pad: bool = False) -> bytes:
        """Return the message to send, without its id, and note in `attempt` what its answer must match."""
        exchange, abilities = attempt.exchange, self.abilities
        query = exchange.query
        options = b""
        if query.verbatim:
            return query.verbatim
        if self._random_case and abilities.keeps_case(now):
            attempt.spelled = True
            name = respelled(query.name, os.urandom(len(query.name)))
            attempt.question = name + query.question[-4:]
        attempt.edns = not exchange.plain and abilities.takes_edns(now)
        if attempt.edns:
            if cookies and not exchange.no_cookie:
                attempt.client_cookie, server_cookie = abilities.cookie(attempt.source, now)
                options = option(OPTION, attempt.client_cookie + server_cookie)
            if self._client_subnet:
                options += subnet_of(query)
        return encode(query, attempt.question, edns=attempt.edns, options=options, pad=pad)

    def _ask_port(self, exchange: Exchange, now: float, *, renewed: bool = False) -> None:
        draw = os.urandom(3)
        port = self._port(draw[2] % len(self._ports), fresh=exchange.trust.get(self) is Trust.RENEWED)
        port.uses += 1
        ident = free_id(port.pending, draw)
        query = exchange.query
        attempt = Attempt(exchange, port.pending, ident, query.name + query.question[-4:])
        attempt.source = port.source
        packet = ident.to_bytes(2, "big") + self._message(attempt, now, cookies=True)
        try:
            port.sock.send(packet)
        except ConnectionRefusedError:
            port.sock.send(packet)  # the error belongs to an earlier packet, and this one was not sent
        except BlockingIOError:
            pass  # a full send buffer: the packet is lost, as on the network
        except OSError:
            # Usually the host has lost the address that the socket was connected from. All others are looked at as well.
            if renewed:
                raise
            self._replace(port)
            self.renew()
            self._ask_port(exchange, now, renewed=True)
            return
        port.pending[ident] = attempt
        exchange.open.append(attempt)

    def _port(self, slot: int, *, fresh: bool) -> _Port:
        worn, limits = self._ports[slot], self._limits
        if worn is not None and (
            (worn.uses < limits.max_uses and not fresh) or len(self._retired) >= limits.max_retired
        ):
            return worn
        sock = socket.socket(self._family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(socket_address(*self._destination))
            port = _Port(sock, Pending(self, stream=False))
        except OSError:
            sock.close()
            raise
        if worn is not None:
            self._replace(worn)
        self._ports[slot] = port
        port.timer = self._loop.call_later(limits.max_age_s, self._replace, port)
        self._loop.add_reader(sock, self._readable, port)
        return port

    def _replace(self, port: _Port) -> None:
        """Stop using this port; close it when no more answers can come."""
        self._ports = [None if kept is port else kept for kept in self._ports]
        if not port.pending:
            self._close_port(port)
            return
        if port.timer is not None:
            port.timer.cancel()
        self._retired.add(port)
        port.timer = self._loop.call_later(self._limits.retired_s, self._remove, port)

    def _remove(self, port: _Port) -> None:
        self._retired.discard(port)
        self._ports = [None if kept is port else kept for kept in self._ports]
        self._close_port(port)

    def _close_port(self, port: _Port) -> None:
        if port.timer is not None:
            port.timer.cancel()
        if port.sock.fileno() >= 0:
            self._loop.remove_reader(port.sock)
            port.sock.close()

    def _readable(self, port: _Port) -> None:
        for _ in range(_MAX_DRAIN):
            try:
                packet = port.sock.recv(_MAX_DATAGRAM)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # an ICMP error: nobody listens there, and all questions from this port are lost
                # The socket cannot be kept: libuv stops watching it at the first POLLERR.
                self._remove(port)
                self._lost(port.pending)
                return
            self._received(packet, port.pending)
            if port.sock.fileno() < 0:
                return
        if not port.pending and port in self._retired:
            self._remove(port)

    def _open_connection(
        self,
        pending: ConnectionPending,
        received: Callable[[bytes, ConnectionPending], None],
        lost: Callable[[Client], None],
    ) -> Client:
        if self.spawn is None:
            raise OSError("not running")
        client = StreamClient(
            pending,
            spawn=self.spawn,
            received=received,
            lost=lost,
            tls=self._tls if self.destination.way is UpstreamProtocol.TLS else None,
            server_name=self.destination.server_name,
            timing=self._limits.stream,
        )
        client.open(self._family, self._destination)
        return client

    def _stream_message(self, attempt: Attempt) -> bytes:
        way = self.destination.way
        cookies, pad = way is UpstreamProtocol.UDP, way is UpstreamProtocol.TLS
        return self._message(attempt, self._loop.time(), cookies=cookies, pad=pad)

    def _ask_https(self, exchange: Exchange, now: float) -> None:
        if self.spawn is None or self._tls is None:
            raise OSError("not running")
        if self._https is None:
            self._https = HttpsClient(self.destination, self._tls, received=self._received, lost=self._lost)
        pending = Pending(self, stream=True)
        query = exchange.query
        attempt = pending[0] = Attempt(exchange, pending, 0, query.name + query.question[-4:])
        exchange.open.append(attempt)
        self.spawn(self._https.post(pending, 0, self._message(attempt, now, cookies=False, pad=True)))
