"""The resolvers that are asked: where they are, and the sockets to them.

An upstream has a pool of connected UDP sockets, so that the kernel drops what comes from elsewhere. Each asks from a port
of its own and is replaced often; which one asks is drawn at random, as the id is (RFC 5452 section 9). Over TCP and TLS
there is one connection that many questions share. Every upstream remembers how it did.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeAlias

from discovery.addresses import Address
from dnsgw.destination import Destination, Way
from dnsgw.exchange import Exchange, Pending
from dnsgw.https import HttpsClient
from dnsgw.pipeline import Pipeline
from dnsgw.wire import padded

Endpoint: TypeAlias = tuple[Address, int]

DNS_PORT = 53
MAX_RESOLV_CONF = 3  # MAXNS of glibc and musl
POOL = 64  # sockets, opened when first picked
MAX_USES = 1000  # of one socket
MAX_AGE_S = 60.0
RETIRED_S = 2.0  # how long a replaced socket still waits for answers: longer than any exchange
DOWN_AFTER = 2  # attempts in a row without an answer: one may have been lost on the way
DOWN_MIN_S = 1.0
DOWN_MAX_S = 30.0
_MAX_DATAGRAM = 65535
_MAX_DRAIN = 64  # packets read from one socket before others get their turn


class _Port:
    """One connected UDP socket: one source port for a while."""

    __slots__ = ("born", "pending", "sock", "uses")

    def __init__(self, sock: socket.socket, born: float) -> None:
        self.sock = sock
        self.born = born
        self.uses = 0
        self.pending: Pending = {}


class Upstream:
    """One resolver to ask."""

    def __init__(
        self,
        destination: Destination,
        loop: asyncio.AbstractEventLoop,
        *,
        received: Callable[[bytes, Pending], None],
        lost: Callable[[Pending], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare. `received` gets every packet, `lost` is called when nothing can come for what is pending."""
        self.destination = destination
        self.looping = False
        """What it is asked comes back to us."""

        self.spawn: Callable[[Coroutine[Any, Any, None]], object] | None = None
        """Runs a coroutine in a task; only DNS over HTTPS needs it."""

        self._family = socket.AF_INET if destination.address.version == 4 else socket.AF_INET6
        self._destination = (str(destination.address), destination.port)
        self._loop = loop
        self._received = received
        self._lost = lost
        self._tls = tls
        self._ports: list[_Port | None] = [None] * POOL
        self._retired: set[_Port] = set()
        self._pipeline: Pipeline[Exchange] | None = None
        self._pipelines: set[Pipeline[Exchange]] = set()
        self._https: HttpsClient | None = None
        self._failures = 0
        self._down_until = 0.0

    def ask(self, exchange: Exchange, now: float) -> None:
        """Make one attempt. Raises OSError when it is known at once to be in vain."""
        way = self.destination.way
        if way is Way.HTTPS:
            self._ask_https(exchange)
        elif exchange.tcp or way is not Way.UDP:
            self._ask_pipeline(exchange)
        else:
            self._ask_port(exchange, now)

    def answered(self) -> None:
        """Note that it answered."""
        self._failures = 0
        self._down_until = 0.0

    def failed(self, now: float) -> None:
        """Note that it did not answer in time, or at all: after two such in a row it comes last for a while."""
        self._failures += 1
        if self._failures >= DOWN_AFTER:
            self._down_until = now + min(DOWN_MIN_S * 2 ** min(self._failures - DOWN_AFTER, 10), DOWN_MAX_S)

    def is_down(self, now: float) -> bool:
        """Tell whether others should be asked first. Once the while is over one question tries it, and no more at once."""
        if self._failures < DOWN_AFTER:
            return False
        if now < self._down_until:
            return True
        self._down_until = now + DOWN_MIN_S
        return False

    def close(self) -> None:
        """Close every socket. Nothing more is received or lost."""
        ports, self._ports = self._ports, [None] * POOL
        for port in (*self._retired, *(port for port in ports if port is not None)):
            self._close_port(port)
        self._retired.clear()
        for pipeline in list(self._pipelines):
            pipeline.pending.clear()
            pipeline.close()

    async def ended(self) -> None:
        """Wait for the end of what cannot be closed at once; after `close`."""
        https, self._https, self.spawn = self._https, None, None
        if https is not None:
            await https.close()

    def _ask_port(self, exchange: Exchange, now: float) -> None:
        draw = os.urandom(3)
        port = self._port(draw[2] % POOL, now)
        port.uses += 1
        ident = _free_id(port.pending, draw)
        packet = ident.to_bytes(2, "big") + exchange.message
        try:
            port.sock.send(packet)
        except ConnectionRefusedError:
            port.sock.send(packet)  # the error was the echo of an earlier packet, and this one was not sent
        except BlockingIOError:
            pass  # a full buffer loses packets as the network does
        port.pending[ident] = exchange
        exchange.open.append((port.pending, ident, self))

    def _port(self, slot: int, now: float) -> _Port:
        worn = self._ports[slot]
        if worn is not None and worn.uses < MAX_USES and now - worn.born < MAX_AGE_S:
            return worn
        sock = socket.socket(self._family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._destination)
        except OSError:
            sock.close()
            raise
        if worn is not None:
            self._retired.add(worn)
            self._loop.call_later(RETIRED_S, self._retire, worn)
        port = self._ports[slot] = _Port(sock, now)
        self._loop.add_reader(sock, self._readable, port)
        return port

    def _retire(self, port: _Port) -> None:
        if port in self._retired:
            self._retired.remove(port)
            self._close_port(port)

    def _close_port(self, port: _Port) -> None:
        self._loop.remove_reader(port.sock)
        port.sock.close()

    def _readable(self, port: _Port) -> None:
        for _ in range(_MAX_DRAIN):
            try:
                packet = port.sock.recv(_MAX_DATAGRAM)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an ICMP error: nobody listens there, and what was asked from this port is lost
                self._give_up(port)
                return
            self._received(packet, port.pending)
            if port.sock.fileno() < 0:
                return

    def _give_up(self, port: _Port) -> None:
        """Close a port that reported an error: uvloop would not watch it any more (libuv stops at the first POLLERR)."""
        self._retired.discard(port)
        self._ports = [None if kept is port else kept for kept in self._ports]
        self._close_port(port)
        self._lost(port.pending)

    def _ask_pipeline(self, exchange: Exchange) -> None:
        pipeline = self._pipeline
        # A second attempt does not trust the connection that the first one still waits on.
        if pipeline is None or pipeline.closed or any(place[0] is pipeline.pending for place in exchange.open):
            secret = self.destination.way is Way.TLS
            pipeline = Pipeline(
                self._loop,
                received=self._received,
                lost=self._pipeline_lost,
                tls=self._tls if secret else None,
                server_name=self.destination.name or str(self.destination.address),
            )
            pipeline.open(self._family, self._destination)
            self._pipeline = pipeline
            self._pipelines.add(pipeline)
        ident = _free_id(pipeline.pending, os.urandom(2))
        pipeline.pending[ident] = exchange
        exchange.open.append((pipeline.pending, ident, self))
        message = exchange.message
        if self.destination.way is Way.TLS:
            message = padded(message, len(exchange.question))
        pipeline.send(ident.to_bytes(2, "big") + message)

    def _ask_https(self, exchange: Exchange) -> None:
        if self.spawn is None or self._tls is None:
            raise OSError("not running yet")
        if self._https is None:
            self._https = HttpsClient(self.destination, self._tls, received=self._received, lost=self._lost)
        pending: Pending = {0: exchange}
        exchange.open.append((pending, 0, self))
        self.spawn(self._https.post(pending, 0, padded(exchange.message, len(exchange.question))))

    def _pipeline_lost(self, pipeline: Pipeline[Exchange]) -> None:
        self._pipelines.discard(pipeline)
        if pipeline.pending:
            self._lost(pipeline.pending)


def _free_id(pending: Pending, draw: bytes) -> int:
    ident = int.from_bytes(draw[:2], "big")
    while ident in pending:  # far fewer are in flight than there are ids
        ident = int.from_bytes(os.urandom(2), "big")
    return ident


def read_resolv_conf(path: Path) -> tuple[Endpoint, ...]:
    """Read the name servers of a resolv.conf, three at most as libc does. A file that is not there has none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append((ip_address(words[1]), DNS_PORT))
            except ValueError:
                continue
    return tuple(found[:MAX_RESOLV_CONF])


def leads_here(upstream: Endpoint, listening: Iterable[Endpoint]) -> bool:
    """Tell whether asking this upstream would be asking ourselves."""
    address, port = upstream
    for own, own_port in listening:
        if port == own_port and address.version == own.version:
            if address == own or address.is_unspecified:
                return True
            if own.is_unspecified and _is_local(address):
                return True
    return False


def _is_local(address: Address) -> bool:
    """Tell whether an address is this host's: packets to such a one have it as their source too."""
    if address.is_loopback:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), DNS_PORT))  # sends nothing
        except OSError:
            return False
        return bool(ip_address(probe.getsockname()[0]) == address)
