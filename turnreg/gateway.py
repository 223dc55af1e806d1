"""The gateway: takes streams that arrive from other networks' relays and delivers them to services of its own network.

A stream reaches a service only after its preamble is proven, its ClientHello is the one that was signed for, and the address that
is about to be dialled passes `allow`, the refused ranges and the loop guard (sniproxy's capsules carry everything after that).
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Gauge

from discovery.addresses import TargetList
from discovery.contract import Discovery
from sniproxy.engine import Listener, Wire
from sniproxy.hello import DEFAULT_MAX_HELLO_BYTES, HelloError, HelloReader
from sniproxy.stream.account import Account, Ledger
from sniproxy.stream.capsule import CapsuleError, Payload
from sniproxy.stream.carry import Carry
from sniproxy.stream.control import Opened, Ready, Refused
from sniproxy.stream.ends import Side
from sniproxy.stream.framed import Framed
from sniproxy.stream.policy import Policy
from sniproxy.stream.preamble import (
    FirstBytes,
    Preamble,
    PreambleError,
    SigningKey,
    WarmPreamble,
    classify_first_bytes,
    read_length,
)
from sniproxy.stream.reason import Reason
from sniproxy.stream.verifier import PreambleVerifier, check_hello
from turnreg.activation import DEFAULT_MAX_HELD, Activation, ActivationRule
from turnreg.client import Bound
from turnreg.continuation import Continuations
from turnreg.delivery import Delivery, Undeliverable
from turnreg.warm import MAX_WARM, WarmStreams

log = logging.getLogger(__name__)

DEFAULT_HELLO_TIMEOUT_S = 5.0
"""From the bind to the last byte of the ClientHello. The relay had it whole before it dialled: this covers the way here."""

DEFAULT_DIAL_TIMEOUT_S = 3.0
"""For the TCP handshake with a service in our own network: one lost SYN is sent again after 1 s."""

DEFAULT_IDLE_TIMEOUT_S = 3600.0
DEFAULT_HALF_CLOSE_TIMEOUT_S = 600.0
"""As at the relay: whichever is lower ends the stream."""

DEFAULT_MAX_STREAMS = 16_384
"""As at the relay: two descriptors a stream."""

MAX_UNPROVEN = 1024
"""Connections whose preamble has not come whole. A relay's is there within a round trip, a stranger's may never come: past this
number the oldest has to go, and strangers keep no relay out."""

MAX_LINGERING = 1024
"""Refused connections that are read from until REFUSED has arrived. In a flood of more it arrives as luck has it."""

_PREAMBLE_START = 16
"""A PROXY v2 header says its length in its first 16 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What an operator decides about a gateway."""

    id: str
    network: str
    domain: str
    allow: TargetList
    """What may be dialled, checked on the address that is dialled."""
    policy: Policy = field(default_factory=Policy)
    """Which streams may go where, by the network and client that they come from."""
    activate: tuple[ActivationRule, ...] = ()
    """How services that sleep are woken; the first rule that names one counts."""
    max_held: int = DEFAULT_MAX_HELD
    """Streams that wait for services to wake."""
    listen: tuple[tuple[str, int], ...] = ()
    """Where relays may come directly, without a TURN server."""
    guard: tuple[tuple[str, int], ...] = ()
    """Addresses of our own that are no services (discovery servers, the admin server): never dialled for a stream."""
    max_hello_bytes: int = DEFAULT_MAX_HELLO_BYTES
    max_streams: int = DEFAULT_MAX_STREAMS
    hello_timeout_s: float = DEFAULT_HELLO_TIMEOUT_S
    dial_timeout_s: float = DEFAULT_DIAL_TIMEOUT_S
    idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S
    half_close_timeout_s: float = DEFAULT_HALF_CLOSE_TIMEOUT_S


class _Refusal(Exception):
    """A stream that we end on purpose. `tell`: its relay has proven itself, or asks in our protocol, and hears why."""

    def __init__(self, reason: Reason, detail: str, *, tell: bool = True) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.tell = tell


@dataclass(slots=True)
class _Arrival:
    """What is known of a stream while it is being opened."""

    framed: Framed
    addressee: str
    """Id of the allocation that it came by, or of our own record."""
    came_by: dict[str, str]
    """The TURN server, where it came through one, for the log."""
    account: Account
    is_stream: bool = True
    """False for the second connection of a stream, and while it is only kept ready: those are in nobody's books."""
    preamble: Preamble | None = None
    evicted: bool = False
    """Closed by us to make room before it had proven anything."""
    data: bytearray = field(default_factory=bytearray)


class Gateway:
    """One gateway. Streams come by `take` (the registrar's callback) and by its own listeners."""

    def __init__(
        self,
        config: GatewayConfig,
        discovery: Discovery,
        keys: Mapping[str, SigningKey],
        *,
        registry: CollectorRegistry,
    ) -> None:
        self.config = config
        self._verifier = PreambleVerifier(keys, config.network)
        self._delivery = Delivery(
            config.network,
            discovery,
            config.allow,
            config.policy,
            guard=config.guard,
            dial_timeout_s=config.dial_timeout_s,
        )
        self._activation = Activation(
            self._delivery, discovery, config.network, config.activate, config.max_held, registry=registry
        )
        self._continuations = Continuations()
        self._warm = WarmStreams()
        self.ledger = Ledger("gateway", registry)
        warm = Gauge("crossnet_gateway_warm_streams", "Connections that relays keep ready.", registry=registry)
        warm.set_function(lambda: len(self._warm))
        self._listeners: list[Listener] = []
        self._unproven: dict[int, _Arrival] = {}  # by identity, the oldest first
        self._lingering = 0
        self._group: asyncio.TaskGroup | None = None
        self._closed = asyncio.Event()

    def reconfigure(self, config: GatewayConfig, keys: Mapping[str, SigningKey]) -> None:
        """Go by these from now on: streams that are open keep what they began with, listeners stay where they are."""
        self.config = config
        self._verifier.keys = keys
        self._delivery.reconfigure(config.allow, config.policy, dial_timeout_s=config.dial_timeout_s)
        self._activation.reconfigure(config.activate, config.max_held)

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Where it listens for relays that come directly."""
        return tuple(listener.address for listener in self._listeners)

    async def open(self, inherited: Callable[[str, int], socket.socket | None] = lambda _address, _port: None) -> None:
        """Bind every listening address. OSError names the one that failed; none stays open then.

        Args:
            inherited: gives a socket that listens there already, of the process that we come after.
        """
        try:
            for address, port in self.config.listen:
                sock = inherited(address, port)
                listener = await Listener.open(address, port) if sock is None else Listener(sock)
                self._listeners.append(listener)
        except OSError:
            self.close()
            raise

    def listening(self) -> list[tuple[tuple[str, int], int]]:
        """The listening sockets by their configured address and port, for a process that comes after us."""
        return [(place, listener.fileno()) for place, listener in zip(self.config.listen, self._listeners, strict=True)]

    async def run(self) -> None:
        """Serve until `close`, and then until the last stream has ended. Cancelling ends the streams."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = self._activation.group = group
                for listener in self._listeners:
                    group.create_task(listener.serve(self._serve_direct))
                await self._closed.wait()
        finally:
            self._group = self._activation.group = None
            self.close()

    def close(self) -> None:
        """Take no more streams; those that are open go on, and may still get their second connection."""
        self._closed.set()
        self._warm.close()
        for listener in self._listeners:
            listener.close()

    def take(self, bound: Bound) -> None:
        """Take a stream that was bound on an allocation of ours."""
        serving = self._serve_bound(bound)
        try:
            if self._group is None:
                raise RuntimeError("not running")
            task = self._group.create_task(serving)
        except RuntimeError:  # not running, or the last stream has just ended
            serving.close()
            bound.wire.close()
            return
        # A task that is cancelled before its first step never reaches its own finally.
        task.add_done_callback(lambda task: bound.wire.close() if task.cancelled() else None)

    async def _serve_bound(self, bound: Bound) -> None:
        try:
            await self._serve(bound.wire, bound.allocation, via=bound.via, turn=bound.turn)
        except Exception:  # one stream's defect must not end the gateway
            log.exception("unexpected error while serving a stream on %s", bound.allocation)

    async def _serve_direct(self, wire: Wire) -> None:
        await self._serve(wire, self.config.id)

    async def _serve(self, wire: Wire, addressee: str, **came_by: str) -> None:
        arrival = _Arrival(Framed(wire, Side.GATEWAY), addressee, came_by, self._open_account(wire, came_by))
        reason: Reason | None = Reason.OTHER
        refused: _Refusal | None = None
        try:
            try:
                reason = await self._carry(arrival)
            except _Refusal as refusal:
                refused, reason, arrival.account.detail = refusal, refusal.reason, refusal.detail
            finally:
                if arrival.is_stream:
                    self.ledger.close(arrival.account, reason or Reason.OTHER)
                else:
                    self.ledger.drop(arrival.account)
            if refused is not None and refused.tell:  # no stream any more: it keeps nobody else out
                await self._refuse(arrival.framed, refused)
        finally:
            if reason is not None:
                wire.close()

    def _open_account(self, wire: Wire, came_by: dict[str, str]) -> Account:
        # Until the preamble is proven a stream has an id of our own, so that its log line can be told from others.
        account = self.ledger.open(os.urandom(16), peer=wire.peer[0], **came_by)
        task = asyncio.current_task()
        assert task is not None
        account.end = task.cancel
        return account

    async def _carry(self, arrival: _Arrival) -> Reason | None:
        """Take one stream from its first byte to its end; None for a second connection, which its stream takes over."""
        framed = arrival.framed
        try:
            async with asyncio.timeout(self.config.hello_timeout_s) as deadline:
                preamble = await self._proven(arrival)
                if self._closed.is_set() and not (isinstance(preamble, Preamble) and preamble.continues):
                    raise _Refusal(Reason.DRAINING, "this gateway takes no more streams")
                if isinstance(preamble, WarmPreamble):
                    deadline.reschedule(None)
                    opening = await self._keep_warm(arrival)
                    if opening is None:
                        return Reason.OK
                    deadline.reschedule(asyncio.get_running_loop().time() + self.config.hello_timeout_s)
                    preamble = opening
                elif preamble.continues:
                    arrival.is_stream = False
                    await self._hand_over(arrival, preamble)
                    return None
                if len(self.ledger) - len(self._unproven) > self.config.max_streams:
                    raise _Refusal(
                        Reason.OVERLOADED, f"{self.config.max_streams} streams are open: gateway.max_streams"
                    )
                if not framed.ends.ready:
                    await framed.send(Ready())
                await self._read_hello(arrival, preamble)
        except TimeoutError:
            said = "preamble" if arrival.preamble is None else "ClientHello"
            detail = f"no whole {said} in {self.config.hello_timeout_s} s"
            raise _Refusal(Reason.HELLO_TIMEOUT, detail, tell=arrival.preamble is not None) from None
        except CapsuleError as error:
            raise _Refusal(Reason.PROTOCOL_ERROR, str(error)) from error
        except (OSError, EOFError) as error:
            if arrival.evicted:
                detail = f"{MAX_UNPROVEN} connections have not proven anything, and this was the oldest"
                raise _Refusal(Reason.OVERLOADED, detail, tell=False) from error
            detail = "cut before the ClientHello was whole"
            raise _Refusal(Reason.TRUNCATED, detail, tell=False) from error
        account = arrival.account
        account.mark("hello")
        account.state = "dialling"
        try:
            delivered = await self._activation.connect(preamble)
        except Undeliverable as error:
            raise _Refusal(error.reason, error.detail) from error
        account.mark("connect")
        account.fields["endpoint"] = f"{delivered.endpoint}"
        try:
            await framed.send(Opened(delivered.address, delivered.port, delivered.ms))
        except OSError as error:
            delivered.wire.reset()
            raise _Refusal(Reason.TRUNCATED, "cut while we were dialling", tell=False) from error
        except BaseException:
            delivered.wire.reset()
            raise
        with self._continuations.expected(preamble) as second:
            carry = Carry(
                delivered.wire,
                framed,
                Side.GATEWAY,
                idle_timeout_s=self.config.idle_timeout_s,
                half_close_timeout_s=self.config.half_close_timeout_s,
                first=bytes(arrival.data),
                second=second if arrival.came_by else None,
            )
            arrival.data.clear()  # for as long as the stream lives
            account.carry(up=carry.inbound, down=carry.outbound)
            return await carry.run()

    async def _hand_over(self, arrival: _Arrival, preamble: Preamble) -> None:
        """Give a second connection to its stream."""
        lost = _Refusal(Reason.PROTOCOL_ERROR, "it continues a stream that is not open here")
        if not arrival.came_by or not self._continuations.awaits(preamble):
            raise lost  # before READY, so that its relay does not send the rest of an upload here
        await arrival.framed.send(Ready())
        if not self._continuations.bring(preamble, arrival.framed):
            raise lost

    async def _keep_warm(self, arrival: _Arrival) -> Preamble | None:
        """Keep a connection ready until its relay brings a stream, None if it ends without."""
        if len(self._warm) >= MAX_WARM:
            raise _Refusal(Reason.OVERLOADED, f"{MAX_WARM} connections are kept ready")
        arrival.is_stream = False
        self.ledger.drop(arrival.account)
        header = await self._warm.wait(arrival.framed)
        if header is None:
            return None
        arrival.account = self._open_account(arrival.framed.wire, arrival.came_by)
        arrival.is_stream = True
        arrival.account.fields["warm"] = True
        opening = self._verified(arrival, header)
        if isinstance(opening, WarmPreamble) or opening.continues:
            raise _Refusal(Reason.PROTOCOL_ERROR, "OPEN without the preamble of a stream")
        return opening

    async def _proven(self, arrival: _Arrival) -> Preamble | WarmPreamble:
        """Read the preamble, in competition with strangers that send none."""
        self._unproven[id(arrival)] = arrival
        try:
            if len(self._unproven) > MAX_UNPROVEN:
                oldest = self._unproven.pop(next(iter(self._unproven)))
                oldest.evicted = True
                oldest.framed.wire.close()  # wakes its task
            return await self._read_preamble(arrival)
        finally:
            self._unproven.pop(id(arrival), None)

    async def _read_preamble(self, arrival: _Arrival) -> Preamble | WarmPreamble:
        wire = arrival.framed.wire
        start = await wire.recv_exactly(_PREAMBLE_START)
        if classify_first_bytes(start) is not FirstBytes.PROXY:
            raise _Refusal(Reason.PROTOCOL_ERROR, "it does not begin with a preamble", tell=False)
        try:
            length = read_length(start)
        except PreambleError as error:
            raise _Refusal(error.reason, error.detail) from error
        assert length is not None
        header = start + await wire.recv_exactly(length - len(start))
        arrival.framed.received += length
        return self._verified(arrival, header)

    def _verified(self, arrival: _Arrival, header: bytes) -> Preamble | WarmPreamble:
        try:
            preamble = self._verifier.verify(header, addressee=arrival.addressee, now_ms=time.time_ns() // 1_000_000)
        except PreambleError as error:
            raise _Refusal(error.reason, error.detail) from error
        if isinstance(preamble, Preamble):
            arrival.preamble = preamble
            arrival.account.stream = preamble.stream_id
            arrival.account.fields |= {
                "client": preamble.client[0],
                "sni": preamble.authority,
                "from_network": preamble.from_network,
                "key_id": preamble.key_id,
                "target": preamble.target,
                "attempt": preamble.attempt,
            }
        return preamble

    async def _read_hello(self, arrival: _Arrival, preamble: Preamble) -> None:
        """Read up to the end of the ClientHello, which must be the one that was signed for."""
        framed = arrival.framed
        reader = HelloReader(self.config.max_hello_bytes)
        hello = None
        try:
            while hello is None:
                events = await framed.read()
                for index, event in enumerate(events):
                    if isinstance(event, Payload):
                        hello = reader.feed(event.data)
                        if hello is not None:
                            framed.put_back(events[index + 1 :])
                            break
                if hello is None and framed.exhausted:
                    raise _Refusal(Reason.BAD_HELLO, "the stream ends inside its ClientHello")
            check_hello(preamble, hello.server_name, hello.digest)
        except HelloError as error:
            raise _Refusal(Reason(error.reason.value), error.detail) from error
        except PreambleError as error:
            raise _Refusal(error.reason, error.detail) from error
        arrival.data += reader.raw

    async def _refuse(self, framed: Framed, refusal: _Refusal) -> None:
        """Say why, then give it time to arrive: a close right behind it would overtake it in a TURN server."""
        try:
            await framed.send(Refused(refusal.reason.value, refusal.detail))
        except OSError:
            return
        if self._lingering < MAX_LINGERING:
            self._lingering += 1
            try:
                await framed.discard()
            finally:
                self._lingering -= 1
