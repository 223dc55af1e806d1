"""The listening sockets of our HTTP servers: limits on the number of connections, and on how long each may take.

aiohttp by itself accepts any number of connections and waits for requests without a limit. Here a connection counts from
accept on, before TLS. There is a limit in total and for each address, and connections never use more than a share of the
process's file descriptors. At a limit the oldest connection that is not being served is closed, of the address that has the most.
A request has a deadline from its first byte on, a client must read its answer, and addresses that connect or send requests too
fast take turns (`fairness.py`).
"""

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.http.fairness import Gate
from discovery.http.rate_limit import RateLimit

log = logging.getLogger(__name__)

BACKLOG = 128
MIN_TAKEN = 16 * 1024
FULL_PAUSE_S = 0.001
OUT_OF_FILES_PAUSE_S = 0.1

REASONS = ("full", "address_full", "handshake", "header_timeout", "write_timeout", "too_large", "out_of_files")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerLimits:
    """Limits of a listener."""

    connections: int
    connections_per_address: int
    request_bytes: int
    """Size of one request, header and body. A larger one ends the connection."""

    files_share: int
    """The connections may use 1/files_share of the process's file descriptors."""

    connects_per_s: float = 5.0
    connects_burst: int = 20
    """Connections of one address that are accepted before it has to take turns."""

    requests_per_s: float = 12.0
    requests_burst: int = 24
    """Requests of one connection that are served before it has to take turns."""

    def effective(self) -> tuple[int, int]:
        """Return the limits in total and for one address, given the process's current limit of file descriptors."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = files if files != resource.RLIM_INFINITY else 1 << 20
        most = max(1, min(self.connections, files // self.files_share))
        if self.connections_per_address >= self.connections:
            return most, most
        return most, max(1, min(self.connections_per_address, (most + 1) // 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerTiming:
    """Deadlines of connections, in seconds. Tests shorten them."""

    handshake_s: float = 10.0
    """For the TLS handshake, after any wait for a turn."""

    header_s: float = 10.0
    """For a request's header, from accept or from the first byte of a later request."""

    keepalive_s: float = 60.0
    """How long a connection may be idle between two requests."""

    write_s: float = 30.0
    """Within this time a client must read part of its answer."""

    linger_s: float = 1.0
    """How long the rest of an unwanted body is still read, so that the client can read the answer."""

    overdue_check_s: float = 1.0
    """How often connections are checked against `header_s` and `write_s`."""


TIMING = ListenerTiming()


class _Peer:
    """One connection, counted from accept on."""

    __slots__ = ("address", "protocol", "task")

    def __init__(self, address: str) -> None:
        self.address = address
        self.protocol: Connection | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a handler is working on a request, and not only waiting for the client."""
        return self.protocol is not None and self.protocol.busy

    def end(self) -> None:
        if self.protocol is not None and self.protocol.transport is not None:
            self.protocol.transport.abort()
        elif self.task is not None:
            self.task.cancel()


class Connection(web.RequestHandler):
    """aiohttp's protocol, with deadlines for reading and writing."""

    def __init__(self, listener: "Listener", peer: _Peer, server: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=listener.timing.keepalive_s,
            access_log=None,  # type: ignore[arg-type]
            lingering_time=listener.timing.linger_s,
        )
        self.busy = False
        self.peer = peer
        self._listener = listener
        self._received = 0
        self._partial_since: float | None = loop.time()
        self._blocked_since = 0.0
        self._unsent: int | None = None

    def data_received(self, data: bytes) -> None:
        """Feed the parser. A request that is too large closes the connection."""
        requests = self._request_count
        super().data_received(data)
        if self._request_count != requests:
            self._received, self._partial_since = 0, None
            return
        self._received += len(data)
        if data and self._partial_since is None and self._waiter is not None:  # it has been idle
            self._partial_since = self._loop.time()
        if self._received > self._listener.limits.request_bytes and self.transport is not None:
            self._listener.note(self.peer, "too_large")
            self.transport.abort()

    def pause_writing(self) -> None:
        """Start the clock: the client has stopped reading."""
        super().pause_writing()
        self._blocked_since, self._unsent = self._loop.time(), self._queued()

    def resume_writing(self) -> None:
        """Stop the clock: the client reads again."""
        super().resume_writing()
        self._unsent = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """Release its place at the listener."""
        self._listener.release(self.peer)
        super().connection_lost(exc)

    def overdue(self, now: float) -> str | None:
        """Return why the connection has to be closed, None if it may stay."""
        if self._partial_since is not None and now - self._partial_since > self._listener.timing.header_s:
            return "header_timeout"
        if self._unsent is not None:
            queued = self._queued()
            if queued <= self._unsent - MIN_TAKEN:
                self._blocked_since, self._unsent = now, queued
            elif now - self._blocked_since > self._listener.timing.write_s:
                return "write_timeout"
        return None

    def _queued(self) -> int:
        return self.transport.get_write_buffer_size() if self.transport is not None else 0


class Listener:
    """The listening sockets of one server: `open`, then `run`, then `close` before the runner's cleanup."""

    def __init__(
        self, name: str, limits: ListenerLimits, registry: CollectorRegistry, timing: ListenerTiming = TIMING
    ) -> None:
        """`name` is used in metrics (`crossnet_NAME_connections`) and log events."""
        self.name = name
        self.limits = limits
        self.timing = timing
        self.gate = Gate()
        self._most, self._most_per_address = limits.effective()
        self._sockets: list[socket.socket] = []
        self._tls: ssl.SSLContext | None = None
        self._runner: web.AppRunner
        self._peers: dict[str, dict[_Peer, None]] = {}
        self._count = 0
        self._connects = RateLimit(limits.connects_per_s, limits.connects_burst)
        self._requests = RateLimit(limits.requests_per_s, limits.requests_burst)
        self._running: asyncio.Task[None] | None = None
        self._open = Gauge(f"crossnet_{name}_connections", "Connections that are open.", registry=registry)
        self._limit = Gauge(f"crossnet_{name}_connections_limit", "Connections that may be open.", registry=registry)
        self._limit.set(self._most)
        self._ended = Counter(
            f"crossnet_{name}_connections_refused",
            "Connections that were refused or ended for a limit.",
            ["reason"],
            registry=registry,
        )
        for reason in REASONS:
            self._ended.labels(reason)

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Addresses listened on, in the order of the configuration."""
        names = [listening.getsockname() for listening in self._sockets]
        return tuple((str(name[0]), int(name[1])) for name in names)

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets."""
        return tuple(self._sockets)

    def open(
        self,
        runner: web.AppRunner,
        places: Iterable[tuple[str, int]],
        tls: ssl.SSLContext | None = None,
        inherited: socket.socket | None = None,
    ) -> None:
        """Listen for a runner that has been set up. Raises OSError, with no socket left open."""
        self._runner, self._tls = runner, tls
        try:
            for host, port in places:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                listening = inherited or socket.create_server((host, port), family=family, backlog=BACKLOG)
                listening.setblocking(False)
                self._sockets.append(listening)
        except OSError:
            self.close()
            raise

    def renew(self, tls: ssl.SSLContext | None) -> None:
        """Use this TLS context for later connections. Sessions of the previous context cannot be resumed."""
        self._tls = tls

    async def run(self) -> None:
        """Accept connections until closed or cancelled."""
        self._running = asyncio.current_task()
        async with asyncio.TaskGroup() as group:
            for listening in self._sockets:
                group.create_task(self._accept(listening, group))
            group.create_task(self._end_overdue())

    def close(self) -> None:
        """Stop listening. The runner ends open connections."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
        for listening in self._sockets:
            listening.close()
        self._sockets.clear()

    def cut_certified(self) -> int:
        """Close every connection with a client certificate, so that it is verified again. Returns their number."""
        protocols = [peer.protocol for peers in self._peers.values() for peer in peers]
        found = [protocol.transport for protocol in protocols if protocol is not None]
        certified = [transport for transport in found if transport and transport.get_extra_info("peercert")]
        for transport in certified:
            transport.abort()
        return len(certified)

    def crowds(self, request: web.Request) -> bool:
        """Count a request. Returns whether its connection sends more than its share."""
        return self._requests.wait_s(id(request.protocol), asyncio.get_running_loop().time()) > 0

    def note(self, peer: _Peer, reason: str) -> None:
        """Count and log a connection that is closed because of a limit."""
        self._ended.labels(reason).inc()
        event = {"listener": self.name, "remote": peer.address, "reason": reason, "open": self._count}
        log.warning("http_connection_refused", extra={"event": event})

    def release(self, peer: _Peer) -> None:
        """Release a connection's place. Idempotent."""
        peers = self._peers.get(peer.address, {})
        if peer not in peers:
            return
        del peers[peer]
        if not peers:
            self._peers.pop(peer.address, None)
        self._count -= 1
        self._open.set(self._count)

    async def _accept(self, listening: socket.socket, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, name = await loop.sock_accept(listening)
            except OSError as error:
                self._ended.labels("out_of_files").inc()
                log.error("accept_failed", extra={"event": {"listener": self.name, "detail": str(error)}})
                await asyncio.sleep(OUT_OF_FILES_PAUSE_S)
                continue
            peer = _Peer(str(name[0]))
            if self._admit(peer):
                peer.task = group.create_task(self._begin(connection, peer))
                await asyncio.sleep(0)  # sock_accept does not yield to the loop if a connection is already waiting
            else:
                connection.close()
                await asyncio.sleep(FULL_PAUSE_S)

    def _admit(self, peer: _Peer) -> bool:
        """Make room for a connection, by closing another one if necessary. Returns False if that is not possible."""
        reason = None
        if len(self._peers.get(peer.address, ())) >= self._most_per_address:
            reason, crowded = "address_full", peer.address
        elif self._count >= self._most:
            reason, crowded = "full", max(self._peers, key=lambda address: len(self._peers[address]))
        if reason is not None:
            oldest = next((each for each in self._peers[crowded] if not each.busy), None)
            self.note(oldest or peer, reason)
            if oldest is None:
                return False
            self.release(oldest)
            oldest.end()
        self._peers.setdefault(peer.address, {})[peer] = None
        self._count += 1
        self._open.set(self._count)
        return True

    async def _begin(self, connection: socket.socket, peer: _Peer) -> None:
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        made: list[Connection] = []

        def factory() -> Connection:
            made.append(Connection(self, peer, server, loop))
            return made[0]

        begun = False
        try:
            crowd = self._connects.wait_s(_network_of(peer.address), loop.time()) > 0
            await self.gate.enter(_network_of(peer.address), crowd=crowd)
            async with asyncio.timeout(self.timing.handshake_s):
                options: dict[str, Any] = {"ssl": self._tls} if self._tls is not None else {}
                await loop.connect_accepted_socket(factory, connection, **options)
            peer.protocol = made[0]
            begun = True
        except (OSError, TimeoutError):  # ssl.SSLError is one
            self._ended.labels("handshake").inc()
        finally:
            if not begun:
                self.release(peer)
                connection.close()
            peer.task = None

    async def _end_overdue(self) -> None:
        """Close connections that have missed a deadline."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.timing.overdue_check_s)
            now = loop.time()
            for peer in [peer for peers in self._peers.values() for peer in peers]:
                reason = peer.protocol.overdue(now) if peer.protocol is not None else None
                if reason is not None:
                    self.note(peer, reason)
                    peer.end()


def _network_of(address: str) -> str:
    """Return what identifies a client: an IPv4 address, or an IPv6 /64, since one host may use a whole /64."""
    bare = address.partition("%")[0]
    if ":" not in bare:
        return bare
    parsed = ip_address(bare)
    return str(getattr(parsed, "ipv4_mapped", None) or int(parsed) >> 64)


def address_of(request: web.Request) -> str:
    """Return the client's address, or its IPv6 /64."""
    protocol = request.protocol
    return _network_of(protocol.peer.address if isinstance(protocol, Connection) else request.remote or "")


class waiting:  # noqa: N801 - used as a statement: `with waiting(request): body = await request.read()`
    """Context in which a handler only waits for the client, so that the connection may be closed to make room."""

    def __init__(self, request: web.Request) -> None:
        self._protocol = request.protocol

    def __enter__(self) -> None:
        if isinstance(self._protocol, Connection):
            self._protocol.busy = False

    def __exit__(self, *_: object) -> None:
        if isinstance(self._protocol, Connection):
            self._protocol.busy = True
