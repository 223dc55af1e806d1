"""The connections to one upstream over TCP or TLS: how many there are, and which question goes over which.

Usually one connection carries all questions (RFC 7766 section 6.2.1.1). Some servers close a connection after one answer, or after
a number of them. So the end of a connection says nothing about the questions that it did not answer, unless nothing at all was
answered: they are asked again over another connection. How many questions a connection takes is remembered, and given up when a
connection that has had its share stays open. If questions need several connections, their number is limited, and lowered if the
server ends some of them unanswered while it answers on others. Other questions wait.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from dnsgw.upstream.exchange import Attempt, Exchange, Pending, QueryTarget
from dnsgw.upstream.stream_client import StreamClient

_UNLIMITED = 1 << 16  # more questions than a connection has ids


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Limits of the connections to one upstream that does not take all questions on one of them."""

    most: int = 16
    """Connections: below what servers allow one client or all. dnsmasq has 20, BIND 150; unbound queues those above 10."""

    quiet_s: float = 0.1
    """A server that closes after an answer does so at once. One that is quiet for so long keeps the connection open."""

    fewer_s: float = 60.0
    """How long there are fewer connections after the server has ended some of them unanswered."""

    pause_s: float = 0.02
    """Without new connections, after such an end: the server may not have noticed yet that others have ended."""

    alive_s: float = 1.0
    """A server that has answered so recently is taken to refuse a connection, not the question."""


CONNECTION_LIMITS = ConnectionLimits()


class ConnectionPending(Pending):
    """The questions on one connection, and what is known of it."""

    __slots__ = ("answered", "answered_at", "older", "taken")

    def __init__(self, upstream: QueryTarget) -> None:
        """Start without questions."""
        super().__init__(upstream, stream=True)
        self.taken = 0
        """Questions that were sent over it."""

        self.answered = 0
        self.answered_at = 0.0
        self.older = 0
        """Questions that were still waiting when the last answer came."""


Client: TypeAlias = StreamClient[ConnectionPending]


class OpenConnection(Protocol):
    """Opens a connection."""

    def __call__(
        self,
        pending: ConnectionPending,
        received: Callable[[bytes, ConnectionPending], None],
        lost: Callable[[Client], None],
    ) -> Client:
        """Start to connect. Raises OSError if that fails at once."""


class Connections:
    """All connections to one upstream, and the questions that wait for one."""

    def __init__(
        self,
        upstream: QueryTarget,
        loop: asyncio.AbstractEventLoop,
        *,
        open_connection: OpenConnection,
        message: Callable[[Attempt], bytes],
        received: Callable[[bytes, Pending], None],
        lost: Callable[[Pending], None],
        limits: ConnectionLimits = CONNECTION_LIMITS,
    ) -> None:
        """Open none yet.

        Args:
            upstream: the server.
            loop: the loop to run on.
            open_connection: opens a connection.
            message: encodes the message of an attempt, without its id.
            received: called with every packet, and the questions pending on its connection.
            lost: called with questions that get no answer.
            limits: of their number, and times.
        """
        self._limits = limits
        self._upstream = upstream
        self._loop = loop
        self._now = loop.time
        self._open_connection = open_connection
        self._message = message
        self._received = received
        self._lost = lost
        self._clients: dict[Client, None] = {}
        self._waiting = Pending(upstream, stream=True)
        self._answered_at = -limits.alive_s
        self._share = _UNLIMITED
        """Questions that one connection takes."""

        self._most = limits.most
        self._fewer_until = 0.0
        self._pause: asyncio.TimerHandle | None = None

    def ask(self, exchange: Exchange) -> None:
        """Make one attempt, now or when a connection takes it. Raises OSError if no connection can be opened."""
        if any(attempt.pending is self._waiting for attempt in exchange.open):
            return
        client = None
        if not (self._waiting and self._clients):
            client = self._choose(exchange) or self._another()
        if client is not None:
            self._send(client, exchange)
            return
        self._wait(exchange)
        self._advance()

    def shed(self, pending: Pending) -> bool:
        """Close the connection of `pending`, which receives unsolicited packets. Returns False if it is none of these."""
        for client in self._clients:
            if client.pending is pending:
                del self._clients[client]
                client.close()
                self._advance()
                return True
        return False

    def renew(self, source: bytes) -> None:
        """Close the connections that have another local address than this, packed; what they carry is asked again."""
        for client in [client for client in self._clients if client.source != source]:
            del self._clients[client]
            self._retry(client.pending)
            client.close()
        self._advance()

    def close(self) -> None:
        """Close all connections. `received` and `lost` are not called any more."""
        self._waiting.clear()
        self._resume()
        clients, self._clients = self._clients, {}
        for client in clients:
            client.pending.clear()
            client.close()

    def _choose(self, exchange: Exchange) -> Client | None:
        """Return a connection that takes this question; None: there is none.

        A second attempt does not use the connection on which the first one still waits. If it opened another connection, later
        questions use that one as well.
        """
        for client in reversed(self._clients):
            pending = client.pending
            if client.closed or any(attempt.pending is pending for attempt in exchange.open):
                continue
            if pending.taken < self._share:
                return client
            # It has had its share, and the server has not closed it: it may take more.
            if pending.answered == pending.taken and self._now() - pending.answered_at >= self._limits.quiet_s:
                self._share = min(max(2 * self._share, pending.taken + 1), _UNLIMITED)
                return client
        return None

    def _another(self) -> Client | None:
        """Open a connection; None: there may be no more. Raises OSError."""
        spent = None
        if self._pause is not None:
            return None
        if len(self._clients) >= self._limit():
            spent = next(
                (each for each in self._clients if not each.pending and each.pending.taken >= self._share), None
            )
            if spent is None:
                return None
        pending = ConnectionPending(self._upstream)
        client = self._open_connection(pending, self._heard, self._ended)
        self._clients[client] = None
        if spent is not None:
            del self._clients[spent]
            spent.close()
        return client

    def _limit(self) -> int:
        if self._most < self._limits.most and self._now() >= self._fewer_until:
            self._most = self._limits.most
        return self._most

    def _wait(self, exchange: Exchange) -> None:
        ident = free_id(self._waiting, os.urandom(2))
        attempt = self._waiting[ident] = Attempt(exchange, self._waiting, ident, b"")
        exchange.open.append(attempt)

    def _send(self, client: Client, exchange: Exchange) -> None:
        query, pending = exchange.query, client.pending
        ident = free_id(pending, os.urandom(2))
        attempt = Attempt(exchange, pending, ident, query.name + query.question[-4:])
        attempt.source = client.source
        message = self._message(attempt)
        pending[ident] = attempt
        pending.taken += 1
        exchange.open.append(attempt)
        client.send(ident.to_bytes(2, "big") + message)

    def _advance(self) -> None:
        """Send the questions that wait, as far as there are connections."""
        while self._waiting:
            exchange = next(iter(self._waiting.values())).exchange
            try:
                client = self._choose(exchange) or self._another()
            except OSError:
                if not self._clients:
                    self._lose_waiting()
                return
            if client is None:
                return
            exchange.forget(self._waiting)
            self._send(client, exchange)

    def _lose_waiting(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, Pending(self._upstream, stream=True)
        self._lost(waiting)

    def _heard(self, packet: bytes, pending: ConnectionPending) -> None:
        ident = int.from_bytes(packet[:2], "big")
        attempt = pending.get(ident)
        older = len(pending) - 1
        self._received(packet, pending)
        if attempt is not None and pending.get(ident) is not attempt:
            pending.answered += 1
            self._answered_at = pending.answered_at = self._now()
            pending.older = older
            if self._waiting:
                self._advance()

    def _ended(self, client: Client) -> None:
        pending = client.pending
        if client not in self._clients:  # given up before
            if pending:
                self._lost(pending)
            return
        del self._clients[client]
        if pending and not self._is_refusal(client):
            self._retry(pending)
        elif pending or not client.connected:
            self._lost(pending)
            if not self._clients:
                self._lose_waiting()
        self._advance()

    def _is_refusal(self, client: Client) -> bool:
        """Whether the end of this connection means that the server does not answer. If not, note what it does mean."""
        now, pending = self._now(), client.pending
        if pending.answered:
            if pending.older or now - pending.answered_at < self._limits.quiet_s:
                self._share = min(self._share, pending.answered)
            return False
        if client.connected and pending.taken > 1:
            self._share = 1
            return False
        others = [other for other in self._clients if other.connected]
        if not client.connected or (
            now - self._answered_at >= self._limits.alive_s and not any(other.pending for other in others)
        ):
            return True
        self._most = max(len(others), 1)
        self._fewer_until = now + self._limits.fewer_s
        if self._pause is None:
            self._pause = self._loop.call_later(self._limits.pause_s, self._resume)
        return False

    def _resume(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._advance()

    def _retry(self, pending: ConnectionPending) -> None:
        for exchange in dict.fromkeys(attempt.exchange for attempt in pending.values()):
            exchange.forget(pending)
            if not any(attempt.pending is self._waiting for attempt in exchange.open):
                self._wait(exchange)


def free_id(pending: Pending, draw: bytes) -> int:
    """Return an id that no question in `pending` has: these two random bytes, if possible."""
    ident = int.from_bytes(draw[:2], "big")
    while ident in pending:  # far fewer questions are in flight than there are ids
        ident = int.from_bytes(os.urandom(2), "big")
    return ident
