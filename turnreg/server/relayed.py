"""The relayed address of one TCP allocation: accepts peers, and carries each until its stream ends."""

import asyncio
import errno
import ipaddress
import logging
import socket

from sniproxy.engine import Listener, SocketStream, connect
from sniproxy.engine.copy import Splice
from turnreg.server.allocation import Allocation, Attempt, Endpoint, Refusal
from turnreg.server.config import HALF_CLOSE_TIMEOUT_S, STREAM_IDLE_TIMEOUT_S
from turnreg.server.live_allocation import Send, ServerState, WaitingPeer, text_of
from turnreg.server.outcome import Connect

log = logging.getLogger(__name__)

_ENDS = {"a_reset": "peer_reset", "b_reset": "client_reset", "a_lost": "peer_lost", "b_lost": "client_lost"}

REFUSED_LOG_INTERVAL_S = 1.0
"""Refused peers are logged once in this time, with their number, so that a port scan does not fill the log."""


class RelayedAddress:
    """Serves the peers of one allocation. Cancelling `serve` closes the port and resets every stream."""

    def __init__(self, allocation: Allocation, listener: Listener, state: ServerState, send: Send) -> None:
        self._allocation = allocation
        self._listener = listener
        self._state = state
        self._send = send
        self._clock = asyncio.get_running_loop().time
        self._refused = 0
        self._refused_logged = -REFUSED_LOG_INTERVAL_S

    async def serve(self) -> None:
        """Accept peers until cancelled."""
        await self._listener.serve(self._peer)

    async def _peer(self, peer: SocketStream) -> None:
        """Serve one peer from its arrival to the end of its stream."""
        if not peer.peer[0]:
            return  # reset between its connect and our accept
        table = self._state.table
        address = peer.peer
        if ":" in address[0]:
            address = (str(ipaddress.ip_address(address[0])), address[1])
        announced = table.announce(self._allocation, address, self._clock())
        if isinstance(announced, Refusal):
            self._refuse(address, announced)
            peer.reset()
            return
        try:
            await self._carry(peer, announced, self._state.transactions.attempt(announced[0]))
        finally:
            table.depart(self._allocation, address)

    async def connect(self, connecting: Connect) -> None:
        """Connect to a peer at the client's request and serve it (RFC 6062, section 5.2)."""
        allocation, state, address = self._allocation, self._state, connecting.peer
        try:
            peer: SocketStream | None = None
            try:
                sock = _from_relayed(allocation.relayed)
                peer = await connect(*address, timeout_s=state.table.limits.connect_timeout_s, sock=sock)
            except (OSError, TimeoutError):
                pass
            finally:
                allocation.connecting -= 1
            if peer is None:
                state.metrics.refused(Refusal.CONNECT_FAILED)
                await self._send(state.transactions.fail_connect(connecting).answer)
                return
            waiting = state.table.enqueue(allocation, address)
            await self._carry(peer, waiting, state.transactions.complete_connect(connecting, waiting[0]))
        except OSError:
            pass  # the control connection is lost
        finally:
            state.table.depart(allocation, address)

    async def _carry(self, peer: SocketStream, announced: tuple[Attempt, Attempt | None], announcement: bytes) -> None:
        """Announce a peer to the client, wait for the bind, and move bytes until the stream ends.

        Nothing is read from the peer before the bind: the kernel closes the window, the peer waits, and no byte is lost.
        """
        state = self._state
        attempt, crowded_out = announced
        if crowded_out is not None:
            self._refuse(crowded_out.peer, Refusal.PEER_LIMIT)
            state.peers[crowded_out.connection_id].join(None)
        waiting = state.peers[attempt.connection_id] = WaitingPeer()
        try:
            await self._send(announcement)
            data = await self._bound(attempt, waiting)
            if data is None:
                peer.reset()
            else:
                await self._stream(peer, data)
        except OSError:
            pass  # the control connection is lost: its session notices it too and ends the allocation
        finally:
            del state.peers[attempt.connection_id]
            state.table.release(attempt)
            # Does nothing if the stream has closed them. Any other end is a failure, and must look like one to the peers.
            peer.reset()
            if waiting.data is not None:
                waiting.data.reset()
            waiting.over()

    async def _bound(self, attempt: Attempt, waiting: WaitingPeer) -> SocketStream | None:
        """Wait for the data connection; None if there is no bind in time or the data connection was lost."""
        limit_s = self._state.table.limits.bind_timeout_s
        timer = asyncio.get_running_loop().call_later(limit_s, self._give_up, attempt, waiting)
        try:
            return await waiting.joined()
        finally:
            timer.cancel()

    def _give_up(self, attempt: Attempt, waiting: WaitingPeer) -> None:
        if self._state.table.release(attempt):  # otherwise it was claimed just now, and the answer is being sent
            self._state.metrics.refused(Refusal.PEER_NOT_BOUND)
            waiting.join(None)

    async def _stream(self, peer: SocketStream, data: SocketStream) -> None:
        stream = Splice(
            peer,
            data,
            idle_timeout_s=STREAM_IDLE_TIMEOUT_S,
            half_close_timeout_s=HALF_CLOSE_TIMEOUT_S,
            buffer_bytes=self._state.table.limits.buffer_bytes,
        )
        pace = self._allocation.pace
        if pace is not None:
            stream.a_to_b.pace = stream.b_to_a.pace = lambda size: pace.spend(size, self._clock())
        metrics = self._state.metrics
        began = self._clock()
        reason = "cut"
        metrics.stream_began(stream)
        try:
            moved = await stream.run()
            reason = _ENDS.get(moved.end, moved.end.value)
        finally:
            metrics.stream_ended(stream)
            self._allocation.to_client += stream.a_to_b.moved
            self._allocation.to_peer += stream.b_to_a.moved
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
        self._state.metrics.refused(why)
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


def _from_relayed(relayed: Endpoint) -> socket.socket:
    """Return a socket bound to the relayed port, in addition to the one that listens there. Raises OSError."""
    family = socket.AF_INET6 if ":" in relayed[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(relayed)
    except OSError as error:
        sock.close()
        raise OSError(error.errno or errno.EADDRINUSE, "cannot connect from the relayed port") from error
    return sock
