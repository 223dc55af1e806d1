"""The gateway: accepts streams from relays of other networks and delivers them to services of its own network.

A stream reaches a service only if its preamble is verified, its ClientHello is the one that was signed, and the address to dial
passes `allow`, the refused ranges and the loop guard. After that, its bytes are carried in sniproxy's capsules.
"""

import asyncio
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TypeVar

from prometheus_client import CollectorRegistry

from discovery.client.contract import Discovery
from sniproxy.endpoints.checker import EndpointChecker
from sniproxy.endpoints.dialer import EndpointDialer
from sniproxy.engine import ByteStream
from sniproxy.streams.end_reason import Reason
from sniproxy.streams.room import Room
from sniproxy.streams.stream_log import StreamLog, StreamRecord
from sniproxy.transport.base import Accepted
from sniproxy.transport.direct import DirectAcceptor
from sniproxy.tunnel.bridge import DEFAULT_TIMING, BridgeTiming, StreamBridge
from sniproxy.tunnel.capsules import CapsuleError
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.epoch import EPOCH_SIZE
from sniproxy.tunnel.messages import Opened, Ready, Refused, Waiting
from sniproxy.tunnel.preamble import Preamble, SigningKey, WarmPreamble
from sniproxy.tunnel.state import Side
from turnreg.gateway.activation import Activation
from turnreg.gateway.config import GatewayConfig
from turnreg.gateway.handshake import InboundHandshakes, InboundStream, StreamRefused, read_hello
from turnreg.gateway.metrics import GatewayMetrics
from turnreg.gateway.second_connection import SecondConnections
from turnreg.gateway.service_dialer import ServiceConnection, ServiceDialer, Undeliverable
from turnreg.gateway.warm import WarmStreams

__all__ = ["Gateway", "GatewayConfig"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Gateway:
    """One gateway. The acceptor of each transport passes connections to `take`; the one for direct connections runs here."""

    def __init__(
        self,
        config: GatewayConfig,
        discovery: Discovery,
        keys: Mapping[str, SigningKey],
        *,
        registry: CollectorRegistry,
        endpoints: EndpointDialer | None = None,
        timing: BridgeTiming = DEFAULT_TIMING,
    ) -> None:
        """Make a gateway that `open` and `run` start.

        Args:
            endpoints: connects to services; one of its own by default.
            timing: how long its streams wait for a relay.
        """
        self._timing = timing
        self._discovery = discovery
        self.config = config
        self.endpoints = endpoints or EndpointDialer("gateway", registry)
        self.epoch = os.urandom(EPOCH_SIZE)
        """Random value that our records publish and relays sign, so that no preamble made for another process is valid here."""
        self._handshakes = InboundHandshakes(
            keys,
            config.network,
            epoch=self.epoch,
            require_epoch=config.require_epoch,
            max_unproven=config.limits.max_unproven,
        )
        self._service_dialer = ServiceDialer(
            config.network,
            config.domain,
            discovery,
            config.allow,
            config.policy,
            guard=config.guard,
            dial_timeout_s=config.dial_timeout_s,
            endpoints=self.endpoints,
        )
        self._checker = EndpointChecker(
            self.endpoints, config.network, lambda *place: self._service_dialer.undeliverable(*place) is None
        )
        self._activation = Activation(
            self._service_dialer,
            discovery,
            config.network,
            config.activate,
            config.max_held,
            limits=config.limits,
            registry=registry,
        )
        self._second_connections = SecondConnections()
        self._warm = WarmStreams(config.limits)
        self.ledger = StreamLog("gateway", registry)
        self._metrics = GatewayMetrics(registry, warm=self._warm, remembered=self._handshakes.remembered)
        self._direct = DirectAcceptor(config.id, config.listen)
        self._room: Room[str] = Room(self.ledger, min_idle_s=config.limits.min_idle_s)
        """The verified streams by network."""
        self._lingering = 0
        self._group: asyncio.TaskGroup | None = None
        self._closed = asyncio.Event()

    def reconfigure(self, config: GatewayConfig, keys: Mapping[str, SigningKey]) -> None:
        """Use these settings from now on. Open streams keep theirs, and listeners do not change."""
        self.config = config
        self._handshakes.reconfigure(keys, require_epoch=config.require_epoch)
        self._service_dialer.reconfigure(config.allow, config.policy, dial_timeout_s=config.dial_timeout_s)
        self._activation.reconfigure(config.activate, config.max_held)
        self._checker.reconsider()

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Addresses and ports where relays can connect directly."""
        return self._direct.addresses

    async def open(self, inherited: Callable[[str, int], socket.socket | None] = lambda _address, _port: None) -> None:
        """Bind every listening address. Raises OSError, which names the address that failed; then none stays open.

        Args:
            inherited: returns a socket that already listens there, from the process that we replace.
        """
        await self._direct.open(inherited)

    def listening(self) -> list[tuple[tuple[str, int], int]]:
        """Return configured address and port and descriptor of the listening sockets, for a process that replaces us."""
        return self._direct.listening()

    async def run(self) -> None:
        """Serve until `close` is called and the last stream has ended. Cancelling ends the streams."""
        unwatch = self._service_dialer.watch()
        unsubscribe = self._discovery.subscribe(self._checker.follow)
        self._checker.follow(self._discovery.mesh)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = self._activation.group = group
                group.create_task(self._direct.run(self.take))
                group.create_task(self._checker.run())
                await self._closed.wait()
        finally:
            self._group = self._activation.group = None
            unwatch()
            unsubscribe()
            self.close()

    def hold(self) -> None:
        """Leave direct connections in the listeners' queues until `accept` is called. Call this before `run`."""
        self._direct.hold()

    def accept(self) -> None:
        """Accept direct connections after `hold`."""
        self._direct.accept()

    def stop_listening(self) -> None:
        """Close the listeners for direct connections. Streams through TURN servers are still accepted."""
        self._direct.close()

    def close(self) -> None:
        """Accept no more streams. Open streams continue and may still get their second connection."""
        self._closed.set()
        self._checker.close()
        self._warm.close()
        self.stop_listening()

    def take(self, accepted: Accepted) -> None:
        """Serve a connection that one of the transports has accepted."""
        serving = self._serve_safely(accepted)
        try:
            if self._group is None:
                raise RuntimeError("not running")
            task = self._group.create_task(serving)
        except RuntimeError:  # not running, or just stopped after the last stream
            serving.close()
            accepted.stream.close()
            return
        # A task that is cancelled before its first step never reaches its own finally.
        task.add_done_callback(lambda task: accepted.stream.close() if task.cancelled() else None)

    async def _serve_safely(self, accepted: Accepted) -> None:
        try:
            await self._serve(accepted)
        except Exception:  # a bug in one stream must not end the gateway
            log.exception("stream_error", extra={"event": {"addressee": accepted.addressee}})
            accepted.stream.close()

    async def _serve(self, accepted: Accepted) -> None:
        stream = accepted.stream
        arrival = InboundStream(
            CapsuleConnection(stream, Side.GATEWAY), accepted, self._open_record(stream, accepted.came_by)
        )
        reason = Reason.OTHER
        told: tuple[Reason, str] | None = None  # not the exception: its traceback holds this frame
        try:
            try:
                reason = await self._carry(arrival)
            except StreamRefused as refusal:
                reason, arrival.record.detail = refusal.reason, refusal.detail
                told = refusal.told
                if not arrival.is_stream:
                    self._note_refused(stream, refusal)
            finally:
                if arrival.counted and arrival.preamble is not None:
                    self._room.leave(arrival.preamble.from_network)
                if arrival.is_stream:
                    self.ledger.close(arrival.record, reason)
                else:
                    self.ledger.drop(arrival.record)
            if told is not None:  # it no longer counts as a stream, so it keeps no other stream out
                await self._refuse(arrival.connection, *told)
                stream.close()
        finally:
            if not arrival.handed_over:
                arrival.let_go()

    def _note_refused(self, stream: ByteStream, refusal: StreamRefused) -> None:
        """Log why a connection ended that is not a stream: a second connection or a warm one."""
        self._metrics.refused(refusal.reason)
        event = {"peer": stream.peer[0], "reason": refusal.reason.value, "detail": refusal.detail}
        log.info("connection_refused", extra={"event": event})

    def _open_record(self, stream: ByteStream, came_by: Mapping[str, str]) -> StreamRecord:
        # Until the preamble is verified, a stream has a random id, so that its log line can be distinguished.
        record = self.ledger.open(os.urandom(16), peer=stream.peer[0], **came_by)
        task = asyncio.current_task()
        assert task is not None
        record.end = task.cancel
        return record

    async def _carry(self, arrival: InboundStream) -> Reason:
        """Serve one connection from its first byte to its end. Raises StreamRefused."""
        match await self._in_time(arrival, self._prove(arrival), self.config.hello_timeout_s):
            case WarmPreamble(from_network=network):
                return await self._keep_warm(arrival, network)
            case Preamble(continues=True):
                return Reason.OK  # it was handed over to its stream
            case Preamble() as preamble:
                return await self._bridge(arrival, preamble, await self._deliver(arrival, preamble))

    async def _prove(self, arrival: InboundStream) -> Preamble | WarmPreamble:
        """Read and verify the preamble. Then read the ClientHello of a stream, or hand a second connection over to its stream."""
        proven = await self._handshakes.prove(arrival)
        is_second = isinstance(proven, Preamble) and proven.continues
        if self._closed.is_set() and not is_second:
            raise StreamRefused(Reason.DRAINING, "this gateway accepts no more streams")
        if isinstance(proven, Preamble):
            await (self._hand_over(arrival, proven) if is_second else self._begin(arrival, proven))
        return proven

    async def _begin(self, arrival: InboundStream, preamble: Preamble) -> None:
        """Admit a stream, and read its ClientHello."""
        self._admit(arrival, preamble.from_network)
        if not arrival.connection.ends.ready:
            await arrival.connection.send(Ready())
        await read_hello(arrival, preamble, self.config.max_hello_bytes)

    async def _in_time(self, arrival: InboundStream, reading: Awaitable[T], limit_s: float | None) -> T:
        """Await `reading` for at most `limit_s`. Raises StreamRefused for what the relay did wrong."""
        try:
            async with asyncio.timeout(limit_s):
                return await reading
        except TimeoutError:
            missing = "preamble" if arrival.preamble is None else "ClientHello"
            detail = f"no complete {missing} in {limit_s} s"
            raise StreamRefused(Reason.HELLO_TIMEOUT, detail, tell=arrival.preamble is not None) from None
        except CapsuleError as error:
            # A relay that floods us would not read our answer.
            raise StreamRefused(error.reason, str(error), tell=error.reason is not Reason.FLOOD) from error
        except (OSError, EOFError) as error:
            raise StreamRefused(Reason.TRUNCATED, "cut before the ClientHello was complete", tell=False) from error

    async def _deliver(self, arrival: InboundStream, preamble: Preamble) -> ServiceConnection:
        """Connect to the service, waking it if necessary, and send OPENED. Raises StreamRefused."""
        record = arrival.record
        record.mark("hello")
        record.state = "dialling"
        try:
            service = await self._activation.connect(preamble, partial(self._held, arrival))
        except Undeliverable as error:
            raise StreamRefused(error.reason, error.detail) from error
        record.mark("connect")
        record.fields["endpoint"] = f"{service.endpoint}"
        try:
            await arrival.connection.send(Opened(service.address, service.port, service.ms))
        except OSError as error:
            service.stream.reset()
            raise StreamRefused(Reason.TRUNCATED, "cut while we were dialling", tell=False) from error
        except BaseException:
            service.stream.reset()
            raise
        return service

    async def _bridge(self, arrival: InboundStream, preamble: Preamble, service: ServiceConnection) -> Reason:
        """Carry the stream until it ends, and return how it ended. The bridge raises no exceptions."""
        with self._second_connections.expected(preamble) as second:
            bridge = StreamBridge(
                service.stream,
                arrival.connection,
                Side.GATEWAY,
                idle_timeout_s=self.config.idle_timeout_s,
                half_close_timeout_s=self.config.half_close_timeout_s,
                first=bytes(arrival.data),
                second=second if arrival.accepted.traits.needs_second_connection else None,
                heartbeats=preamble.heartbeats,
                timing=self._timing,
                resets_when_done=arrival.accepted.traits.gateway_dials,
                buffer_bytes=self.config.buffer_bytes,
            )
            arrival.data.clear()  # `arrival` lives as long as the stream
            arrival.record.carry(up=bridge.inbound, down=bridge.outbound)
            with self._room.carrying(arrival.record, preamble.from_network):
                return await bridge.run()

    async def _held(self, arrival: InboundStream, seconds: float) -> None:
        """Tell the relay that opening the stream takes longer."""
        arrival.record.state = "held"
        with suppress(OSError):  # a lost connection is noticed at the next send
            await arrival.connection.send(Waiting(math.ceil(seconds)))

    def _admit(self, arrival: InboundStream, network: str) -> None:
        """Count a verified stream. Raises StreamRefused if there are too many."""
        most, each = self.config.max_streams, self.config.max_streams_per_network
        if each and self._room.held(network) >= each:
            raise StreamRefused(
                Reason.OVERLOADED, f"{each} streams from {network!r} are open: gateway.max_streams_per_network"
            )
        self._room.enter(network)
        arrival.counted = True
        if self._room.taken - len(self._handshakes) > most:
            has_no_limit = math.isinf(self.config.idle_timeout_s)
            if not (has_no_limit and self._room.make(network)):
                raise StreamRefused(Reason.OVERLOADED, f"{most} streams are open: gateway.max_streams")

    async def _hand_over(self, arrival: InboundStream, preamble: Preamble) -> None:
        """Hand a second connection over to its stream."""
        arrival.is_stream = False
        lost = "it continues a stream that is not open here"
        if not arrival.accepted.traits.needs_second_connection or not self._second_connections.awaits(preamble):
            # Refused before READY, so that its relay does not send the rest of an upload here.
            raise StreamRefused(Reason.PROTOCOL_ERROR, lost)
        await arrival.connection.send(Ready())
        if not self._second_connections.bring(preamble, arrival.connection):
            raise StreamRefused(Reason.PROTOCOL_ERROR, lost)
        arrival.handed_over = True

    async def _keep_warm(self, arrival: InboundStream, network: str) -> Reason:
        """Keep a connection ready until its relay opens a stream on it or closes it; serve that stream."""
        full = self._warm.refusal(network, self._handshakes.networks)
        if full is not None:
            raise StreamRefused(Reason.OVERLOADED, full)
        arrival.is_stream = False
        self.ledger.drop(arrival.record)
        header = await self._in_time(arrival, self._warm.wait(arrival.connection, network), None)
        if header is None:
            return Reason.OK
        arrival.record = self._open_record(arrival.connection.stream, arrival.accepted.came_by)
        arrival.is_stream = True
        arrival.record.fields["warm"] = True
        opening = self._handshakes.verify(arrival, header)
        if isinstance(opening, WarmPreamble) or opening.continues:
            raise StreamRefused(Reason.PROTOCOL_ERROR, "OPEN without the preamble of a stream")
        await self._in_time(arrival, self._begin(arrival, opening), self.config.hello_timeout_s)
        return await self._bridge(arrival, opening, await self._deliver(arrival, opening))

    async def _refuse(self, connection: CapsuleConnection, reason: Reason, detail: str) -> None:
        """Send REFUSED, and give it time to arrive: in a TURN server, an immediate close could overtake it."""
        try:
            await connection.send(Refused(reason.value, detail))
        except OSError:
            return
        if self._lingering < self.config.limits.max_lingering:
            self._lingering += 1
            try:
                await connection.discard()
            finally:
                self._lingering -= 1
