"""An allocation with its open port, for TCP and UDP alike. Its start and its end are logged."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, TypeVar

from sniproxy.engine import Listener, SocketStream
from turnreg.server.allocation import Allocation, AllocationTable, Endpoint
from turnreg.server.datagrams import DatagramSocket
from turnreg.server.metrics import TurnMetrics
from turnreg.server.outcome import Open, Reply
from turnreg.server.relay_ports import RelayPorts
from turnreg.server.transaction import Transactions
from turnreg.stun.message import TRANSPORT_TCP, TRANSPORT_UDP

log = logging.getLogger(__name__)

Send = Callable[[bytes], Awaitable[None]]
"""Sends a message on the control connection. Raises OSError if the connection is lost."""

TRANSPORT_NAMES = {TRANSPORT_TCP: "tcp", TRANSPORT_UDP: "udp"}


def text_of(endpoint: Endpoint) -> str:
    """Format an endpoint for a log."""
    host, port = endpoint
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class WaitingPeer:
    """Connects a peer's task with the task of the data connection that is bound to it."""

    __slots__ = ("_arrived", "data", "done")

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._arrived: asyncio.Future[None] = loop.create_future()
        self.data: SocketStream | None = None
        self.done: asyncio.Future[None] = loop.create_future()
        """Done when the stream has ended and the data connection may be dropped."""

    def join(self, data: SocketStream | None) -> None:
        """Hand over the data connection; None if it was lost while the bind was answered, or if there will be none."""
        self.data = data
        if not self._arrived.done():
            self._arrived.set_result(None)

    async def joined(self) -> SocketStream | None:
        """Wait for `join`, and return what it handed over."""
        await self._arrived
        return self.data

    def over(self) -> None:
        """Let the data connection's task end."""
        if not self.done.done():
            self.done.set_result(None)


class ServerState:
    """State shared by all sessions: decisions, metrics, relay addresses, and waiting peers by connection id."""

    def __init__(
        self,
        table: AllocationTable,
        transactions: Transactions,
        metrics: TurnMetrics,
        relays: dict[int, RelayPorts],
    ) -> None:
        self.table = table
        self.transactions = transactions
        self.metrics = metrics
        self.relays = relays
        self.peers: dict[bytes, WaitingPeer] = {}

    async def open_streams(self, opening: Open) -> "Opened[Listener] | Reply":
        """Open the port of a TCP allocation. Returns the refusal if there is no free port."""
        clock = asyncio.get_running_loop().time
        listener = await self.relays[opening.family].listen(clock())
        if listener is None:
            return self.transactions.fail_allocate(opening)
        allocation, answer = self.transactions.complete_allocate(opening, listener.address, clock())
        return Opened(LiveAllocation(self, allocation, listener), listener, answer)

    def open_datagrams(self, opening: Open) -> "Opened[DatagramSocket] | Reply":
        """Open the port of a UDP allocation. Returns the refusal if there is no free port."""
        now = asyncio.get_running_loop().time()
        relays = self.relays[opening.family]
        sock: DatagramSocket | None = None
        reservation = b""
        if opening.token:
            claims = (relay.claim(opening.token) for relay in self.relays.values())
            sock = next((claimed for claimed in claims if claimed is not None), None)
        else:
            bound = relays.bind(now, even=opening.even, pair=opening.pair)
            if bound is not None:
                sock, reservation = bound
        if sock is None:
            return self.transactions.fail_allocate(opening)
        allocation, answer = self.transactions.complete_allocate(opening, sock.address, now, reservation=reservation)
        return Opened(LiveAllocation(self, allocation, sock), sock, answer)


class LiveAllocation:
    """One allocation with its open port, from its Allocate until `end`."""

    def __init__(self, state: ServerState, allocation: Allocation, port: Listener | DatagramSocket) -> None:
        self._state = state
        self._port = port
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self.allocation = allocation
        state.metrics.allocated()
        log.info("turn_allocation", extra={"event": self._event(lifetime_s=int(allocation.lifetime_s))})

    def end(self, reason: str) -> None:
        """Close the port, remove the allocation, and log that."""
        allocation = self.allocation
        self._port.close()  # its task closes it too, unless it was cancelled before its first step
        self._state.table.remove(allocation)
        family = next(relay for relay in self._state.relays.values() if relay.address == allocation.relayed[0])
        ports = family.streams if allocation.transport == TRANSPORT_TCP else family.datagrams
        ports.give_back(allocation.relayed[1], self._clock())
        event = self._event(
            bytes_to_client=allocation.to_client,
            bytes_to_peer=allocation.to_peer,
            ms_total=round((self._clock() - self._began) * 1000),
            reason=reason,
        )
        log.info("turn_allocation_ended", extra={"event": event})

    def _event(self, **more: object) -> dict[str, object]:
        allocation = self.allocation
        return {
            "client": text_of(allocation.five_tuple.client),
            "account": allocation.account,
            "relayed": text_of(allocation.relayed),
            "transport": TRANSPORT_NAMES[allocation.transport],
            **more,
        }


Port = TypeVar("Port", Listener, DatagramSocket)


class Opened(NamedTuple, Generic[Port]):
    """The result of an Allocate that was granted."""

    live: LiveAllocation
    port: Port
    answer: bytes
