"""Forward questions: ask one upstream after the other until one answers or time is up.

Those that answered lately are asked in the order of the configuration, the others after them. When one takes long, the next
is asked too, and the first answer counts; who was slower twice in a row comes last for a while.

Identical questions are asked once, however many clients wait for the answer (RFC 5452 section 5: more than one in flight
is more chances to guess an id). A packet that answers nothing that was asked is counted, and the wait goes on. All of it
runs in callbacks of the loop: a question costs no task. Every exchange ends within `TOTAL_S`.
"""

import asyncio
import logging
import secrets
import ssl
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from dnsgw.destination import Destination
from dnsgw.exchange import Done, Exchange, Failure, Pending
from dnsgw.metrics import DnsMetrics, UpstreamOutcome
from dnsgw.reply import is_answer
from dnsgw.upstream import Endpoint, Upstream
from dnsgw.wire import HEADER_SIZE, Query, Rcode, wire_name

log = logging.getLogger(__name__)

TOTAL_S = 1.8  # below the 2 s after which CoreDNS and NodeLocal DNSCache give up, and glibc's 5 s
ATTEMPT_S = 0.8  # so that a second upstream has time to answer
RACE_S = 0.25  # after which another upstream is asked as well: most answers of a resolver with a cache take far less
MAX_IN_FLIGHT = 4096  # clients that wait; some 2 kB each
_TICK_S = 0.002  # timers of the loop are in whole milliseconds and may fire one early

# Answers about the server more than about the name, which another server may not share. libc goes on likewise.
_TRY_ANOTHER = frozenset({Rcode.SERVFAIL, Rcode.REFUSED})


class Forwarder:
    """All upstreams of a server, and what was asked of them."""

    def __init__(
        self,
        destinations: Sequence[Destination | Endpoint],
        metrics: DnsMetrics,
        *,
        zones: Mapping[str, Sequence[Destination]] | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        attempt_s: float = ATTEMPT_S,
        total_s: float = TOTAL_S,
        race_s: float | None = None,
        tls: ssl.SSLContext | None = None,
        random_case: bool = False,
    ) -> None:
        """Prepare, on the running loop; sockets are opened when they are needed.

        `zones`: upstreams of their own for the names at and under these. `tls` is for those that are spoken to in secret.
        """
        self._loop = asyncio.get_running_loop()
        self._tls = tls
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._attempt_s = attempt_s
        self._total_s = total_s
        self._race_s = attempt_s if race_s is None else min(race_s, attempt_s)
        self._random_case = random_case
        self._upstreams = [self._upstream(destination) for destination in destinations]
        self._zones = {
            wire_name(zone): [self._upstream(destination) for destination in found]
            for zone, found in (zones or {}).items()
        }
        self._exchanges: dict[bytes, Exchange] = {}
        self._closed = False
        self.waiting = 0
        """Clients that wait for an answer."""

    def _upstream(self, destination: Destination | Endpoint) -> Upstream:
        if not isinstance(destination, Destination):
            destination = Destination(*destination)
        return Upstream(destination, self._loop, received=self._on_packet, lost=self._on_lost, tls=self._tls)

    @property
    def upstreams(self) -> list[Upstream]:
        """Every upstream, of whatever zone."""
        return [upstream for group in (self._upstreams, *self._zones.values()) for upstream in group]

    def attach(self, spawn: Callable[[Coroutine[Any, Any, None]], object] | None) -> None:
        """Take what runs a coroutine in a task, which DNS over HTTPS needs."""
        for upstream in self.upstreams:
            upstream.spawn = spawn

    def ask(self, message: bytes, query: Query, done: Done, *, tcp: bool, only: Upstream | None = None) -> None:
        """Ask for `query` with this message, which is without an id, and hand the answer or a Failure to `done` once.

        The answer has an id and a spelling that are not the client's. `done` may be called before this returns.
        `only`: ask nobody else.
        """
        upstreams = [only] if only is not None else self._group(query)
        if not upstreams:
            done(Failure.NO_UPSTREAM)
            return
        if self.waiting >= self._max_in_flight or self._closed:
            done(Failure.CLOSED if self._closed else Failure.OVERLOADED)
            return
        now = self._loop.time()
        name_stop = HEADER_SIZE - 2 + len(query.name)
        key = b"%d" % tcp + message[: HEADER_SIZE - 2] + query.name + message[name_stop:]
        exchange = self._exchanges.get(key)
        if exchange is None:
            order = upstreams
            if only is None:
                order = [upstream for upstream in upstreams if not upstream.looping]
                if not order:
                    done(Failure.LOOP)
                    return
                if len(order) > 1:
                    order.sort(key=lambda upstream: upstream.is_down(now))
            if self._random_case:
                message = _respelled(message, name_stop)
            question = message[HEADER_SIZE - 2 : name_stop + 4]
            exchange = Exchange(
                key, message, question, now + self._total_s, tcp=tcp, order=order, spelled=self._random_case
            )
            exchange.waiting.append(done)
            self.waiting += 1
            self._exchanges[key] = exchange
            self._attempt(exchange)
            return
        self.waiting += 1
        self._metrics.coalesced += 1
        exchange.waiting.append(done)

    def _group(self, query: Query) -> list[Upstream]:
        """The upstreams for a name: those of the longest zone that it is in."""
        if self._zones:
            for start in (*query.labels, len(query.name) - 1):
                group = self._zones.get(query.name[start:])
                if group is not None:
                    return group
        return self._upstreams

    def close(self) -> None:
        """Stop asking: whoever waits is told so, and so is whoever asks from now on."""
        self._closed = True
        for upstream in self.upstreams:
            upstream.close()
        for exchange in list(self._exchanges.values()):
            self._finish(exchange, Failure.CLOSED)

    async def ended(self) -> None:
        """Wait for the end of what cannot be closed at once; after `close`."""
        for upstream in self.upstreams:
            await upstream.ended()

    def _attempt(self, exchange: Exchange) -> None:
        """Ask the next upstream; one that is known at once not to be there is passed over."""
        now = self._loop.time()
        if exchange.timer is not None:
            exchange.timer.cancel()
        while exchange.refusals < max(len(exchange.order), 2):  # each upstream once; twice if there is but one
            exchange.attempts += 1
            upstream = exchange.order[(exchange.attempts - 1) % len(exchange.order)]
            try:
                upstream.ask(exchange, now)
            except OSError:
                self._refused(exchange, now)
                continue
            exchange.racing = self._race_s < self._attempt_s and exchange.attempts < len(exchange.order)
            wait_s = min(self._race_s if exchange.racing else self._attempt_s, exchange.deadline - now)
            exchange.timer = self._loop.call_later(max(wait_s, 0), self._elapsed, exchange)
            return
        if exchange.open:  # an earlier attempt may still be answered
            exchange.timer = self._loop.call_later(max(exchange.deadline - now, 0), self._elapsed, exchange)
            return
        self._finish(exchange, exchange.fallback or Failure.UNREACHABLE)

    def _refused(self, exchange: Exchange, now: float) -> None:
        self._metrics.upstream[UpstreamOutcome.UNREACHABLE] += 1
        exchange.refusals += 1
        exchange.order[(exchange.attempts - 1) % len(exchange.order)].failed(now)

    def _elapsed(self, exchange: Exchange) -> None:
        now = self._loop.time()
        over = now >= exchange.deadline - _TICK_S
        if exchange.racing and not over:
            self._metrics.upstream[UpstreamOutcome.RACED] += 1
            self._attempt(exchange)
            return
        self._metrics.upstream[UpstreamOutcome.TIMEOUT] += 1
        exchange.order[(exchange.attempts - 1) % len(exchange.order)].failed(now)
        all_asked = exchange.fallback is not None and exchange.attempts >= len(exchange.order)
        if all_asked or over:
            self._finish(exchange, exchange.fallback or Failure.TIMEOUT)
        else:
            self._attempt(exchange)

    def _on_packet(self, packet: bytes, pending: Pending) -> None:
        exchange = pending.get(int.from_bytes(packet[:2], "big"))
        if exchange is None or not is_answer(packet, exchange.question):
            self._metrics.upstream[UpstreamOutcome.UNWANTED] += 1
            return
        if (
            exchange.spelled
            and not exchange.tcp
            and packet[5]
            and not packet.startswith(exchange.question, HEADER_SIZE)
        ):
            # Forged, or from a server that does not keep the spelling. Nobody forges a TCP connection.
            self._metrics.upstream[UpstreamOutcome.MISSPELLED] += 1
            exchange.tcp = True
            exchange.attempts -= 1
            self._attempt(exchange)
            return
        if packet[3] & 0xF in _TRY_ANOTHER and exchange.attempts < len(exchange.order):
            self._metrics.upstream[UpstreamOutcome.FAILED_OVER] += 1
            exchange.fallback = packet
            self._forget(exchange, pending)
            self._attempt(exchange)
            return
        self._metrics.upstream[UpstreamOutcome.ANSWERED] += 1
        now = self._loop.time()
        for waited, _, upstream in exchange.open:
            if waited is pending:
                upstream.answered()
            else:
                upstream.failed(now)  # it was asked earlier, or is no faster than one that was asked earlier
        self._finish(exchange, packet)

    def _on_lost(self, pending: Pending) -> None:
        now = self._loop.time()
        for exchange in dict.fromkeys(pending.values()):
            self._refused(exchange, now)
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
        for pending, ident, _ in exchange.open:
            pending.pop(ident, None)
        exchange.open.clear()
        waiting, exchange.waiting = exchange.waiting, []
        self.waiting -= len(waiting)
        for done in waiting:
            try:
                done(result)
            except Exception:
                log.exception("dns_answer_failed")


def _respelled(message: bytes, name_stop: int) -> bytes:
    """The message with the letters of its name in random case (DNS 0x20): more that a forger has to guess."""
    begin = HEADER_SIZE - 2
    bits = secrets.randbits(8 * (name_stop - begin))
    name = bytearray(message[begin:name_stop].lower())
    for n, letter in enumerate(name):
        if 0x61 <= letter <= 0x7A and bits >> n & 1:
            name[n] = letter - 0x20
    return message[:begin] + bytes(name) + message[name_stop:]
