"""One allocation's relayed address: the port that peers come to, and each peer until its stream ends."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from discovery.addresses import format_endpoint
from sniproxy.engine import Listener, Wire
from sniproxy.engine.move import Splice
from turnreg.server.allocation import Allocation, AllocationTable, Attempt, Endpoint, Refusal
from turnreg.server.config import HALF_CLOSE_TIMEOUT_S, STREAM_IDLE_TIMEOUT_S
from turnreg.server.metrics import TurnMetrics
from turnreg.server.transaction import Transactions

log = logging.getLogger(__name__)

REFUSED_LOG_INTERVAL_S = 1.0
"""Peers without permission are logged once a second, with their number: whoever scans the port writes no more lines."""

Send = Callable[[bytes], Awaitable[None]]
"""Sends a message on the control connection. Raises OSError if that is lost."""


def text_of(endpoint: Endpoint) -> str:
    """Write an endpoint for a log."""
    return format_endpoint(ip_address(endpoint[0]), endpoint[1])


class WaitingPeer:
    """Where a peer's task meets the task of the data connection that is bound to it."""

    __slots__ = ("_arrived", "data", "done")

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        self.data: Wire | None = None
        self.done = asyncio.Event()
        """Set when the stream is over and the data connection may go."""

    def join(self, data: Wire | None) -> None:
        """Hand over the data connection; None if it was lost while the bind was being answered, or must not come."""
        self.data = data
        self._arrived.set()

    async def joined(self) -> Wire | None:
        """Wait for what `join` hands over."""
        await self._arrived.wait()
        return self.data


class Meeting:
    """The waiting peers of all allocations by their connection id, and what they are decided and counted by."""

    def __init__(self, table: AllocationTable, transactions: Transactions, metrics: TurnMetrics) -> None:
        self.table = table
        self.transactions = transactions
        self.metrics = metrics
        self.peers: dict[bytes, WaitingPeer] = {}


class RelayedAddress:
    """Serves the peers of one allocation. Cancelling `serve` closes the port and cuts every stream."""

    def __init__(self, allocation: Allocation, listener: Listener, meeting: Meeting, send: Send) -> None:
        self._allocation = allocation
        self._listener = listener
        self._meeting = meeting
        self._send = send
        self._clock = asyncio.get_running_loop().time
        self._refused = 0
        self._refused_logged = -REFUSED_LOG_INTERVAL_S

    async def serve(self) -> None:
        """Accept peers until cancelled."""
        await self._listener.serve(self._peer)

    async def _peer(self, peer: Wire) -> None:
        """Carry one peer from its arrival to the end of its stream.

        Until the bind nothing is read from it: the kernel closes the window, the peer waits, and not a byte is lost.
        """
        meeting, allocation = self._meeting, self._allocation
        if not peer.peer[0]:
            return  # reset between its connect and our accept
        address = (str(ip_address(peer.peer[0])), peer.peer[1])
        announced = meeting.table.announce(allocation, address, self._clock())
        if isinstance(announced, Refusal):
            self._refuse(address, announced)
            peer.reset()
            return
        attempt, crowded_out = announced
        if crowded_out is not None:
            self._refuse(crowded_out.peer, Refusal.PEER_LIMIT)
            meeting.peers[crowded_out.connection_id].join(None)
        waiting = meeting.peers[attempt.connection_id] = WaitingPeer()
        try:
            await self._send(meeting.transactions.attempt(attempt))
            data = await self._bound(attempt, waiting)
            if data is None:
                peer.reset()
            else:
                await self._stream(peer, data)
        except OSError:
            pass  # the control connection is lost: its session sees it too and ends the allocation
        finally:
            del meeting.peers[attempt.connection_id]
            meeting.table.release(attempt)
            meeting.table.depart(allocation)
            # Nothing if the stream has closed them. Whatever else ends here is a cut, and must look like one.
            peer.reset()
            if waiting.data is not None:
                waiting.data.reset()
            waiting.done.set()

    async def _bound(self, attempt: Attempt, waiting: WaitingPeer) -> Wire | None:
        """Wait for the data connection; None if nobody binds in time or the one that did is lost."""
        try:
            async with asyncio.timeout(self._meeting.table.limits.bind_timeout_s):
                return await waiting.joined()
        except TimeoutError:
            if not self._meeting.table.release(attempt):
                return await waiting.joined()  # claimed at the last moment: its answer is being sent
            self._meeting.metrics.refused(Refusal.PEER_NOT_BOUND)
            return None

    async def _stream(self, peer: Wire, data: Wire) -> None:
        stream = Splice(peer, data, idle_timeout_s=STREAM_IDLE_TIMEOUT_S, half_close_timeout_s=HALF_CLOSE_TIMEOUT_S)
        metrics = self._meeting.metrics
        began = self._clock()
        reason = "cut"
        metrics.stream_began(stream)
        try:
            moved = await stream.run()
            reason = {"a_reset": "peer_reset", "b_reset": "client_reset"}.get(moved.end, moved.end.value)
        finally:
            metrics.stream_ended(stream)
            event = {
                "account": self._allocation.account,
                "relayed": text_of(self._allocation.relayed),
                "peer": text_of(peer.peer),
                "bytes_to_client": stream.a_to_b.moved,
                "bytes_to_peer": stream.b_to_a.moved,
                "ms_total": round((self._clock() - began) * 1000),
                "reason": reason,
            }
            log.info("turn_stream", extra={"event": event})

    def _refuse(self, peer: Endpoint, why: Refusal) -> None:
        self._meeting.metrics.refused(why)
        self._refused += 1
        if self._clock() < self._refused_logged + REFUSED_LOG_INTERVAL_S:
            return
        event = {
            "account": self._allocation.account,
            "relayed": text_of(self._allocation.relayed),
            "peer": text_of(peer),
            "refused": self._refused,
            "reason": why.value,
        }
        log.info("turn_peers_refused", extra={"event": event})
        self._refused = 0
        self._refused_logged = self._clock()
