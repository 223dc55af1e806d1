"""The relay: accepts the clients of a network, reads the server name in the ClientHello, and carries each stream along a route.

There is no default route. Whatever it cannot parse, does not know or may not reach is refused: with a TLS alert if the client
speaks TLS, and with one reason in log and metrics.
"""

import asyncio
import itertools
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from ipaddress import ip_address

from prometheus_client import CollectorRegistry

from discovery.client.contract import Discovery
from discovery.model.addresses import PRIVATE_RANGES, Address, Network, TargetList
from discovery.model.imports import Imports
from discovery.model.mesh import Mesh
from sniproxy.access.client_limits import (
    DEFAULT_MAX_HELLO_HELD_BYTES,
    DEFAULT_MAX_STREAMS_PER_CLIENT,
    DEFAULT_NEW_STREAMS_PER_S,
    Admission,
    Budget,
    Limits,
    client_of,
)
from sniproxy.access.loop_guard import LoopGuard
from sniproxy.access.reach import Reach
from sniproxy.access.rules import Policy
from sniproxy.endpoints.checker import EndpointChecker
from sniproxy.endpoints.dialer import EndpointDialer
from sniproxy.engine import DEFAULT_BUFFER_BYTES, Deadlines, End, Listener, SocketStream, Splice
from sniproxy.engine.host_addresses import is_own_address
from sniproxy.formats.client_hello import DEFAULT_MAX_HELLO_BYTES
from sniproxy.formats.close_notify import is_close_notify
from sniproxy.relay.accept import StreamRefused, read_endpoints, read_hello
from sniproxy.relay.alerts import MAX_LINGERING, Alerts
from sniproxy.relay.permission import Permit
from sniproxy.relay.router import Router
from sniproxy.relay.upstreams import DEFAULT_DIAL_TIMEOUT_S, Connected, Upstreams
from sniproxy.streams.end_reason import Reason
from sniproxy.streams.idle_streams import MIN_IDLE_S
from sniproxy.streams.room import Room
from sniproxy.streams.stream_log import StreamLog, StreamRecord
from sniproxy.transport.base import Candidate, Transport, TransportConfig
from sniproxy.transport.errors import DialError, Unroutable
from sniproxy.transport.local import undeliverable
from sniproxy.transport.registry import make_transports
from sniproxy.tunnel import heartbeat
from sniproxy.tunnel.bridge import StreamBridge
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.relay_handshake import GatewayConnector, StreamRequest
from sniproxy.tunnel.state import Side

log = logging.getLogger(__name__)

DEFAULT_HELLO_TIMEOUT_S = 5.0
"""From accept to the last byte of the ClientHello, however slowly it comes. Enough for two round trips and a retransmission."""

DEFAULT_IDLE_TIMEOUT_S = math.inf
"""Silence in both directions: no limit. Clients wait for days (LISTEN, server-sent events, connection pools), a lost host is found
within half a minute anyway, and a full relay ends the longest idle stream of the client that holds most."""

DEFAULT_HALF_CLOSE_TIMEOUT_S = 600.0
"""Silence after one side has ended. The longest time that a service computes an answer after the request is complete."""

DEFAULT_POOL = 2
"""Warm connections for each allocation in use: one for the next client, and one while its replacement is being made."""

DEFAULT_MAX_STREAMS = 16_384
"""A stream needs two descriptors. This leaves half of the usual hard limit of open files (65,536) for pipes and everything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """The configuration of a relay."""

    id: str
    network: str
    domain: str
    listen: tuple[tuple[str, int], ...]
    reuse_port: bool = False
    """Let other processes of this machine listen there too. The kernel distributes the clients among all."""
    imports: Imports = field(default_factory=Imports)
    allow: tuple[Network, ...] = PRIVATE_RANGES
    """Clients that may connect, by source address."""
    policy: Policy = field(default_factory=Policy)
    """Which clients may go where."""
    deliver: TargetList = field(default_factory=TargetList)
    """What may be dialled in the relay's own network. Default: nothing."""
    direct: TargetList = field(default_factory=TargetList)
    """Where gateways of other networks may be dialled without a TURN server. Default: nowhere."""
    zone: str = ""
    """The relay's zone. TURN servers and gateways in the same zone are preferred."""
    pool: int = DEFAULT_POOL
    """Warm connections for each allocation in use. 0: none; each stream is opened when its client comes."""
    guard: tuple[tuple[str, int], ...] = ()
    """Our own addresses that are no services (discovery servers, the admin server). They are never dialled for a stream."""
    proxy_from: tuple[Network, ...] = ()
    """Load balancers that begin each connection with a PROXY header, which names the client and the address it connected to."""
    max_hello_bytes: int = DEFAULT_MAX_HELLO_BYTES
    max_hello_held_bytes: int = DEFAULT_MAX_HELLO_HELD_BYTES
    """The limit for all ClientHellos together that have not reached a service yet."""
    max_streams: int = DEFAULT_MAX_STREAMS
    max_streams_per_client: int = DEFAULT_MAX_STREAMS_PER_CLIENT
    """By source address, for IPv6 by its /64. 0: no limit per client."""
    new_streams_per_s: int = DEFAULT_NEW_STREAMS_PER_S
    """The rate for one client. 0: no limit."""
    hello_timeout_s: float = DEFAULT_HELLO_TIMEOUT_S
    dial_timeout_s: float = DEFAULT_DIAL_TIMEOUT_S
    buffer_bytes: int = DEFAULT_BUFFER_BYTES
    """What the kernel may hold of one direction of a slow stream."""
    idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S
    half_close_timeout_s: float = DEFAULT_HALF_CLOSE_TIMEOUT_S


class Relay:
    """One relay: listeners, routing, streams. `open` binds, `run` serves, `close` stops accepting, `drain` waits."""

    def __init__(
        self,
        config: RelayConfig,
        discovery: Discovery,
        keys: SigningKeys,
        *,
        registry: CollectorRegistry,
        transports: Callable[[TransportConfig], Sequence[Transport]] = make_transports,
        endpoints: EndpointDialer | None = None,
        max_lingering: int = MAX_LINGERING,
        min_idle_s: float = MIN_IDLE_S,
    ) -> None:
        """Prepare a relay; nothing is opened yet.

        Args:
            config: may be replaced by `reconfigure`, and so may `keys`.
            discovery: the view of the mesh to route by.
            keys: sign the streams to other networks.
            registry: gets the metrics.
            transports: makes the transports, again for each configuration.
            endpoints: connects to services of the relay's own network; one of its own by default.
            max_lingering: refused clients that are read from at once, so that they get their alert.
            min_idle_s: how long a stream must have been silent to be ended for another one.
        """
        self._discovery = discovery
        self._make_transports = transports
        self._alerts = Alerts(max_lingering)
        self.ledger = StreamLog("relay", registry)
        self.endpoints = endpoints or EndpointDialer("relay", registry)
        self._checker = EndpointChecker(self.endpoints, config.network, self._may_be_delivered)
        self._upstreams = Upstreams(registry, self.endpoints)
        self._reach = Reach(config.network, config.domain)
        self._listeners: list[Listener] = []
        self._adapted: dict[tuple[str, int], Listener] = {}
        self._group: asyncio.TaskGroup | None = None
        self._admission = Admission(Limits())
        self._room: Room[int] = Room(self.ledger, min_idle_s=min_idle_s)
        self._hellos = Budget(config.max_hello_held_bytes)
        self._deadlines = Deadlines(config.hello_timeout_s)
        self.reconfigure(config, keys)

    def reconfigure(self, config: RelayConfig, keys: SigningKeys) -> None:
        """Use these from now on. Open streams keep the settings they began with, and listeners keep their addresses."""
        self.config = config
        if self._deadlines.limit_s != config.hello_timeout_s:
            self._deadlines = Deadlines(config.hello_timeout_s)
        self._admission.limits = Limits(
            max_streams=config.max_streams_per_client, new_streams_per_s=config.new_streams_per_s
        )
        self._hellos.limit = config.max_hello_held_bytes
        self._permit = Permit(config.network, config.imports, config.policy, self._reach)
        self._guard = LoopGuard(config.network, [*config.guard, *self.addresses], is_own=is_own_address)
        self._transport_config = TransportConfig(
            network=config.network, deliver=config.deliver, direct=config.direct, guard=self._guard, zone=config.zone
        )
        transports = self._make_transports(self._transport_config)
        self._router = Router(
            network=config.network,
            domain=config.domain,
            imports=config.imports,
            keys=keys,
            transports=transports,
            order=self._upstreams.order,
        )
        connector = GatewayConnector(config.network, keys, now_ms=lambda: time.time_ns() // 1_000_000)
        self._upstreams.reconfigure(connector, transports, pool=config.pool, dial_timeout_s=config.dial_timeout_s)
        self._checker.reconsider()

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Where it listens, with the ports that the kernel chose for port 0."""
        return tuple(listener.address for listener in (*self._listeners, *self._adapted.values()))

    async def open(self, inherited: Callable[[str, int], socket.socket | None] = lambda _address, _port: None) -> None:
        """Bind all listening addresses. Raises an OSError that names the one that failed; none stays open then.

        Args:
            inherited: returns a socket that already listens there, from the process that this one replaces.
        """
        try:
            for address, port in self.config.listen:
                sock = inherited(address, port)
                if sock is None:
                    listener = await Listener.open(address, port, reuse_port=self.config.reuse_port)
                else:
                    listener = Listener(sock)
                self._listeners.append(listener)
                self._guard.add(*listener.address)
        except OSError:
            self.close()
            raise

    def adopt(self, sock: socket.socket) -> None:
        """Also listen on a socket that a replaced process had opened by `adapt`. To be called before `run`."""
        listener = Listener(sock)
        self._adapted[listener.address] = listener
        self._guard.add(*listener.address)

    def listening(self) -> list[tuple[tuple[str, int], int]]:
        """Return the listening sockets by configured address and port, for a process that replaces this one."""
        return [(place, listener.fileno()) for place, listener in zip(self.config.listen, self._listeners, strict=True)]

    def adapted(self) -> list[tuple[tuple[str, int], int]]:
        """Return the sockets that `adapt` has opened, in the same form."""
        return [(place, listener.fileno()) for place, listener in self._adapted.items()]

    async def run(self) -> None:
        """Serve until `close`, and then until the last stream has ended. Cancelling ends the streams."""
        unsubscribe = self._discovery.subscribe(self._follow)
        self._reach.follow(self._discovery.mesh, time.monotonic())
        self._checker.follow(self._discovery.mesh)
        try:
            async with asyncio.TaskGroup() as self._group:
                self._group.create_task(self._upstreams.run())
                self._group.create_task(self._checker.run())
                for listener in (*self._listeners, *self._adapted.values()):
                    self._group.create_task(listener.serve(self._serve))
        finally:
            unsubscribe()
            self.close()  # also listeners whose task was cancelled before its first step

    def _may_be_delivered(self, address: Address, port: int, mesh: Mesh) -> bool:
        return undeliverable(address, port, mesh, self._transport_config) is None

    def _follow(self, mesh: Mesh) -> None:
        self._checker.follow(mesh)
        self._reach.follow(mesh, time.monotonic())
        self._upstreams.follow(mesh)

    async def adapt(self, ports: Collection[int]) -> dict[int, str]:
        """Listen on exactly these ports in addition to the configured ones, on the same addresses.

        Returns:
            the ports that could not be opened, with the error. The next request tries them again.
        """
        if self._group is None:
            return {}
        fixed = {listener.address for listener in self._listeners}
        wanted = {(address, port) for address, _ in fixed for port in ports} - fixed
        failed = {}
        for place in self._adapted.keys() - wanted:
            self._adapted.pop(place).close()
        for place in sorted(wanted - self._adapted.keys()):
            try:
                listener = await Listener.open(*place, reuse_port=True)
            except OSError as error:
                failed[place[1]] = str(error)
                continue
            self._adapted[place] = listener
            self._guard.add(*place)
            self._group.create_task(listener.serve(self._serve))
        return failed

    def close(self) -> None:
        """Stop accepting. Open streams go on."""
        self._group = None
        self._upstreams.close()
        self._checker.close()
        for listener in (*self._listeners, *self._adapted.values()):
            listener.close()

    async def _serve(self, client: SocketStream) -> None:
        stream = os.urandom(16)
        record = self.ledger.open(stream, client=client.peer[0], local=f"{client.local[0]}:{client.local[1]}")
        reason = Reason.OTHER
        refused = is_gone = False
        task = asyncio.current_task()
        assert task is not None
        record.end = task.cancel
        deadlines = self._deadlines  # a reload may replace them
        deadlines.begin(client)
        try:
            try:
                reason = await self._carry(client, record, deadlines)
            except StreamRefused as refusal:
                refused, is_gone = True, refusal.is_gone
                reason, record.detail = refusal.reason, refusal.detail
            finally:
                deadlines.end(client)
                self.ledger.close(record, reason)
            if refused and not is_gone:
                # No longer counted as a stream, so clients that linger over their alert keep no others out.
                await self._alerts.send(client, reason)
        finally:
            client.close()

    async def _carry(self, client: SocketStream, record: StreamRecord, deadlines: Deadlines) -> Reason:
        """Carry one stream from accept to its end. Everything up to the end of the ClientHello has one time limit, from accept."""
        is_beyond = self._room.taken > self.config.max_streams
        if is_beyond and not math.isinf(self.config.idle_timeout_s):
            raise self._full()
        peer, local = await read_endpoints(client, record, self.config.proxy_from, deadlines.limit_s)
        source = ip_address(peer[0])
        refused = self._admission.admit(source, time.monotonic())
        if refused is not None:
            raise StreamRefused(Reason.OVERLOADED, refused)
        holder = client_of(source)
        self._room.enter(holder)
        try:
            with self._hellos.share() as share:
                with self._room.waiting(holder) if is_beyond else nullcontext(True) as may_wait:
                    if not may_wait:
                        raise self._full()
                    hello, data = await read_hello(
                        client, record, share, self.config.max_hello_bytes, deadlines.limit_s, local[1]
                    )
                deadlines.end(client)
                request = StreamRequest(stream=record.stream, client=peer, local=local, hello=hello, data=data)
                candidates = self._candidates(record, request, source)
                if is_beyond and self._room.taken > self.config.max_streams and not self._room.make(holder):
                    raise self._full()
                connected = await self._connect(record, request, source, candidates)
            with self._upstreams.carrying(connected.candidate):
                return await self._move(client, record, request, connected, holder)
        finally:
            self._room.leave(holder)
            self._admission.leave(source)

    def _full(self) -> StreamRefused:
        return StreamRefused(Reason.OVERLOADED, f"{self.config.max_streams} streams are open: relay.max_streams")

    def _candidates(self, record: StreamRecord, request: StreamRequest, source: Address) -> Sequence[Candidate]:
        """Return where a stream may go, best first. Raises StreamRefused if that is nowhere."""
        name = request.hello.server_name
        record.mark("hello")
        record.fields["sni"] = name
        if not any(source in network for network in self.config.allow):
            raise StreamRefused(Reason.DENIED, "relay.allow does not have this client's address")
        mesh = self._discovery.mesh
        self._reach.follow(mesh, time.monotonic())
        try:
            candidates = self._router.candidates(name, mesh, request.local[1])
        except Unroutable as error:
            if not self._discovery.synced:
                raise StreamRefused(Reason.NO_VIEW, f"discovery has not been heard from: {error.detail}") from error
            raise StreamRefused(error.reason, error.detail) from error
        is_local = any(not candidate.traits.to_gateway for candidate in candidates)
        if is_local and self.config.policy.rules and not self._discovery.synced:
            raise StreamRefused(
                Reason.NO_VIEW, "discovery has not been heard from: the service of this address is not known"
            )
        candidates, why = self._permit.permitted(candidates, source, name)
        if not candidates:
            raise StreamRefused(Reason.DENIED, why)
        record.mark("route")
        record.fields["network"] = candidates[0].network
        record.fields["target"] = candidates[0].target
        return candidates

    async def _connect(
        self, record: StreamRecord, request: StreamRequest, source: Address, candidates: Sequence[Candidate]
    ) -> Connected:
        """Connect a client to the service that its ClientHello asks for. Raises StreamRefused."""
        record.state = "dialling"
        try:
            connected = await self._upstreams.connect(request, candidates)
        except DialError as error:
            record.fields["attempts"] = error.attempts
            raise StreamRefused(error.reason, error.detail) from error
        record.mark("connect")
        candidate = connected.candidate
        if not candidate.traits.to_gateway:
            self._check_again(connected, source, request.hello.server_name)
        record.fields |= {
            "network": candidate.network,
            "target": candidate.target,
            "route": candidate.traits.name,
            "candidate": str(candidate),
            "attempts": connected.attempts,
        }
        if connected.was_warm:
            record.fields["warm"] = True
        return connected

    def _check_again(self, connected: Connected, source: Address, name: str) -> None:
        """Refuse a service of our own network if its records or the rules have changed while it was dialled."""
        self._reach.follow(self._discovery.mesh, time.monotonic())
        why = self._permit.refusal(connected.candidate, source, name)
        if why is not None:
            connected.stream.reset()
            raise StreamRefused(Reason.DENIED, why)

    async def _move(
        self, client: SocketStream, record: StreamRecord, request: StreamRequest, connected: Connected, holder: int
    ) -> Reason:
        idle, half_close = self.config.idle_timeout_s, self.config.half_close_timeout_s
        client.unread(request.data[connected.sent :])
        if connected.connection is not None:
            attempts = itertools.count(connected.attempts + 1)

            async def second() -> CapsuleConnection:
                record.fields["second"] = True
                return await self._upstreams.second(request, connected.candidate, attempts)

            carry = StreamBridge(
                client,
                connected.connection,
                Side.RELAY,
                idle_timeout_s=idle,
                half_close_timeout_s=half_close,
                second=second if connected.candidate.traits.needs_second_connection else None,
                heartbeats=heartbeat.PROTO in connected.candidate.proto,
                buffer_bytes=self.config.buffer_bytes,
            )
            carry.outbound.moved = connected.sent
            record.carry(up=carry.outbound, down=carry.inbound)
            with self._room.carrying(record, holder):
                return await carry.run()
        splice = Splice(
            client,
            connected.stream,
            idle_timeout_s=idle,
            half_close_timeout_s=half_close,
            farewell=is_close_notify,
            buffer_bytes=self.config.buffer_bytes,
        )
        record.carry(up=splice.a_to_b, down=splice.b_to_a)
        with self._room.carrying(record, holder):
            return _ENDS[(await splice.run()).end]


_ENDS = {
    End.OK: Reason.OK,
    End.A_RESET: Reason.CLIENT_RESET,
    End.B_RESET: Reason.SERVER_RESET,
    End.A_LOST: Reason.CLIENT_LOST,
    End.B_LOST: Reason.SERVER_LOST,
    End.IDLE_TIMEOUT: Reason.IDLE_TIMEOUT,
}
