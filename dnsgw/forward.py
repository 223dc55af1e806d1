"""Forward questions: ask one upstream after the other until one answers or time is up.

Identical questions are asked once, however many clients wait for the answer (RFC 5452 section 5: more than one in flight
is more chances to guess an id). A packet that answers nothing that was asked is counted, and the wait goes on. All of it
runs in callbacks of the loop: a question costs no task. Every exchange ends within `TOTAL_S`.
"""

import asyncio
import logging
from collections.abc import Sequence

from dnsgw.exchange import Done, Exchange, Failure, Pending
from dnsgw.metrics import DnsMetrics, UpstreamOutcome
from dnsgw.reply import is_answer
from dnsgw.upstream import Endpoint, Upstream
from dnsgw.wire import HEADER_SIZE, Query, Rcode

log = logging.getLogger(__name__)

TOTAL_S = 1.8  # below the 2 s after which CoreDNS and NodeLocal DNSCache give up, and glibc's 5 s
ATTEMPT_S = 0.8  # so that a second upstream has time to answer
MAX_IN_FLIGHT = 4096  # clients that wait; some 2 kB each
_TICK_S = 0.002  # timers of the loop are in whole milliseconds and may fire one early

# Answers about the server more than about the name, which another server may not share. libc goes on likewise.
_TRY_ANOTHER = frozenset({Rcode.SERVFAIL, Rcode.REFUSED})


class Forwarder:
    """All upstreams of a server, and what was asked of them."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        metrics: DnsMetrics,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        attempt_s: float = ATTEMPT_S,
        total_s: float = TOTAL_S,
    ) -> None:
        """Prepare, on the running loop; sockets are opened when they are needed."""
        self._loop = asyncio.get_running_loop()
        self._upstreams = [
            Upstream(endpoint, self._loop, received=self._on_packet, lost=self._on_lost) for endpoint in endpoints
        ]
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._attempt_s = attempt_s
        self._total_s = total_s
        self._first = 0  # the upstream to begin with: the last one known to answer
        self._exchanges: dict[bytes, Exchange] = {}
        self.waiting = 0
        """Clients that wait for an answer."""

    def ask(self, message: bytes, query: Query, done: Done, *, tcp: bool) -> None:
        """Ask for `query` with this message, which is without an id, and hand the answer or a Failure to `done` once.

        The answer has an id and a spelling that are not the client's. `done` may be called before this returns.
        """
        if not self._upstreams:
            done(Failure.NO_UPSTREAM)
            return
        if self.waiting >= self._max_in_flight:
            done(Failure.OVERLOADED)
            return
        self.waiting += 1
        name_stop = HEADER_SIZE - 2 + len(query.name)
        key = b"%d" % tcp + message[: HEADER_SIZE - 2] + query.name + message[name_stop:]
        exchange = self._exchanges.get(key)
        if exchange is not None:
            self._metrics.coalesced += 1
            exchange.waiting.append(done)
            return
        question = message[HEADER_SIZE - 2 : name_stop + 4]
        exchange = Exchange(key, message, question, self._loop.time() + self._total_s, tcp=tcp, first=self._first)
        exchange.waiting.append(done)
        self._exchanges[key] = exchange
        self._attempt(exchange)

    def close(self) -> None:
        """Stop asking: whoever waits is told so."""
        for upstream in self._upstreams:
            upstream.close()
        for exchange in list(self._exchanges.values()):
            self._finish(exchange, Failure.CLOSED)

    def _attempt(self, exchange: Exchange) -> None:
        """Ask the next upstream; one that is known at once not to be there is passed over."""
        now = self._loop.time()
        if exchange.timer is not None:
            exchange.timer.cancel()
        while exchange.refusals < self._enough:
            exchange.attempts += 1
            try:
                self._upstreams[self._asked(exchange)].ask(exchange, now)
            except OSError:
                self._refused(exchange)
                continue
            wait_s = min(self._attempt_s, exchange.deadline - now)
            exchange.timer = self._loop.call_later(max(wait_s, 0), self._elapsed, exchange)
            return
        if exchange.open:  # an earlier attempt may still be answered
            exchange.timer = self._loop.call_later(max(exchange.deadline - now, 0), self._elapsed, exchange)
            return
        self._finish(exchange, exchange.fallback or Failure.UNREACHABLE)

    @property
    def _enough(self) -> int:
        """So many attempts that fail at once end an exchange: each upstream once; twice if there is but one."""
        return max(len(self._upstreams), 2)

    def _asked(self, exchange: Exchange) -> int:
        """The upstream that the last attempt asks."""
        return (exchange.first + exchange.attempts - 1) % len(self._upstreams)

    def _pass_over(self, exchange: Exchange) -> None:
        """Let new questions begin with another upstream than the one that did not answer."""
        if self._asked(exchange) == self._first:
            self._first = (self._first + 1) % len(self._upstreams)

    def _refused(self, exchange: Exchange) -> None:
        self._metrics.upstream[UpstreamOutcome.UNREACHABLE] += 1
        exchange.refusals += 1
        self._pass_over(exchange)

    def _elapsed(self, exchange: Exchange) -> None:
        self._metrics.upstream[UpstreamOutcome.TIMEOUT] += 1
        self._pass_over(exchange)
        all_asked = exchange.fallback is not None and exchange.attempts >= len(self._upstreams)
        if all_asked or self._loop.time() >= exchange.deadline - _TICK_S:
            self._finish(exchange, exchange.fallback or Failure.TIMEOUT)
        else:
            self._attempt(exchange)

    def _on_packet(self, packet: bytes, pending: Pending) -> None:
        exchange = pending.get(int.from_bytes(packet[:2], "big"))
        if exchange is None or not is_answer(packet, exchange.question):
            self._metrics.upstream[UpstreamOutcome.UNWANTED] += 1
            return
        if packet[3] & 0xF in _TRY_ANOTHER and exchange.attempts < len(self._upstreams):
            self._metrics.upstream[UpstreamOutcome.FAILED_OVER] += 1
            exchange.fallback = packet
            self._forget(exchange, pending)
            self._attempt(exchange)
            return
        self._metrics.upstream[UpstreamOutcome.ANSWERED] += 1
        self._finish(exchange, packet)

    def _on_lost(self, pending: Pending) -> None:
        for exchange in dict.fromkeys(pending.values()):
            self._refused(exchange)
            self._forget(exchange, pending)
            self._attempt(exchange)

    def _forget(self, exchange: Exchange, pending: Pending) -> None:
        """Stop waiting for the attempts of this exchange at one socket."""
        for place in [place for place in exchange.open if place[0] is pending]:
            exchange.open.remove(place)
            pending.pop(place[1], None)

    def _finish(self, exchange: Exchange, result: bytes | Failure) -> None:
        if exchange.timer is not None:
            exchange.timer.cancel()
        if self._exchanges.pop(exchange.key, None) is None:
            return
        for pending, ident in exchange.open:
            pending.pop(ident, None)
        exchange.open.clear()
        waiting, exchange.waiting = exchange.waiting, []
        self.waiting -= len(waiting)
        for done in waiting:
            try:
                done(result)
            except Exception:
                log.exception("dns_answer_failed")
