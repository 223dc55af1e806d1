"""Forwards questions: asks one upstream after the other until one answers or time is up.

Upstreams that answered lately are asked in the order of the configuration, the others after them. If one is slow, the next is
asked as well, and the first answer wins. An upstream that was slower twice in a row comes last for a while.

Questions with the same answer are asked once, however many clients wait for it. At most `outstanding.MAX_ALIKE` questions about
one name and type are outstanding, each at most twice at one upstream (RFC 5452 section 5: more in flight are more chances to guess
an id). `suspicion.py` deals with packets that may be forged. All of this runs in callbacks of the loop: a question needs no task.
Every exchange ends within `TOTAL_S`.
"""

import asyncio
import logging
import ssl
from collections.abc import Mapping, Sequence

from dnsgw.message.question import Query, Rcode, wire_name
from dnsgw.message.upstream_query import question_key, restored, subnet_of
from dnsgw.metrics import DnsMetrics, UpstreamOutcome
from dnsgw.upstream.address import UpstreamAddress
from dnsgw.upstream.exchange import Attempt, Done, Exchange, Failure, Pending, QueryTarget, Trust
from dnsgw.upstream.host_resolvers import Endpoint
from dnsgw.upstream.limits import UPSTREAM_LIMITS, UpstreamLimits
from dnsgw.upstream.outstanding import OutstandingQueries
from dnsgw.upstream.server import Upstream
from dnsgw.upstream.stream_client import Spawn
from dnsgw.upstream.suspicion import Suspicion
from dnsgw.upstream.verify import Opt, Verdict, judge

log = logging.getLogger(__name__)

TOTAL_S = 1.8  # below the 2 s after which CoreDNS and NodeLocal DNSCache give up, and glibc's 5 s
ATTEMPT_S = 0.8  # so that a second upstream has time to answer
RACE_S = 0.25  # until another upstream is asked as well: most answers of a resolver with a cache take far less
MAX_IN_FLIGHT = 4096  # waiting clients, some 2 kB each
_TICK_S = 0.002  # the loop's timers have a resolution of 1 ms and may fire 1 ms early

# These say more about the server than about the name, and another server may do better. libc does the same.
_TRY_ANOTHER = frozenset({Rcode.SERVFAIL, Rcode.REFUSED})


class Forwarder:
    """All upstreams of a server, and the outstanding questions to them."""

    def __init__(
        self,
        destinations: Sequence[UpstreamAddress | Endpoint],
        metrics: DnsMetrics,
        *,
        zones: Mapping[str, Sequence[UpstreamAddress]] | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        attempt_s: float = ATTEMPT_S,
        total_s: float = TOTAL_S,
        race_s: float | None = None,
        tls: ssl.SSLContext | None = None,
        random_case: bool = True,
        client_subnet: bool = False,
        limits: UpstreamLimits = UPSTREAM_LIMITS,
    ) -> None:
        """Runs on the running loop. Sockets are opened when they are needed.

        Args:
            destinations: the upstreams, in order of preference.
            metrics: counts attempts.
            zones: other upstreams for these names and all below them.
            max_in_flight: clients that may wait for answers.
            attempt_s: how long one attempt may take, in seconds.
            total_s: how long a question may take in all.
            race_s: time until the next upstream is asked as well; None: no sooner than `attempt_s`.
            tls: for upstreams over TLS and HTTPS.
            random_case: ask in random case (DNS 0x20).
            client_subnet: forward the clients' subnet option (RFC 7871).
            limits: of the sockets to each upstream.
        """
        self._loop = asyncio.get_running_loop()
        self._tls = tls
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._attempt_s = attempt_s
        self._total_s = total_s
        self._race_s = attempt_s if race_s is None else min(race_s, attempt_s)
        self._random_case = random_case
        self._client_subnet = client_subnet
        self._limits = limits
        self._upstreams = [self._upstream(destination) for destination in destinations]
        self._zones = {
            wire_name(zone): [self._upstream(destination) for destination in found]
            for zone, found in (zones or {}).items()
        }
        self._exchanges: dict[bytes, Exchange] = {}
        self._alike = OutstandingQueries(lambda exchange: self._loop.call_soon(self._let_out, exchange))
        self._suspicion = Suspicion(metrics, self._alike, self._again)
        self._closed = False
        self.waiting = 0
        """Clients that are waiting for an answer."""

    def _upstream(self, destination: UpstreamAddress | Endpoint) -> Upstream:
        if not isinstance(destination, UpstreamAddress):
            destination = UpstreamAddress(*destination)
        return Upstream(
            destination,
            self._loop,
            received=self._on_packet,
            lost=self._on_lost,
            moved=self._on_moved,
            tls=self._tls,
            random_case=self._random_case,
            client_subnet=self._client_subnet,
            limits=self._limits,
        )

    @property
    def upstreams(self) -> list[Upstream]:
        """All upstreams, including those of zones."""
        return [upstream for group in (self._upstreams, *self._zones.values()) for upstream in group]

    def attach(self, spawn: Spawn | None) -> None:
        """Set the function that runs coroutines in tasks, which connections need; None: open no more connections."""
        for upstream in self.upstreams:
            upstream.spawn = spawn

    def ask(self, query: Query, done: Done, *, tcp: bool, only: Upstream | None = None) -> None:
        """Ask a question, and call `done` once with the answer or a Failure, perhaps before this returns.

        The answer's id and spelling are not the client's. `tcp`: the client asked over TCP, so ask over TCP. `only`: ask only
        this upstream.
        """
        upstreams = [only] if only is not None else self._group(query)
        if not upstreams:
            done(Failure.NO_UPSTREAM)
            return
        if self.waiting >= self._max_in_flight or self._closed:
            done(Failure.CLOSED if self._closed else Failure.OVERLOADED)
            return
        tcp = tcp or bool(query.verbatim)
        subnet = subnet_of(query) if self._client_subnet else b""
        key = b"%d" % tcp + question_key(query, subnet=subnet)
        exchange = self._exchanges.get(key)
        if exchange is not None:
            self.waiting += 1
            self._metrics.coalesced += 1
            exchange.waiting.append(done)
            return
        now = self._loop.time()
        order = upstreams
        if only is None:
            order = [upstream for upstream in upstreams if not upstream.looping]
            if not order:
                done(Failure.LOOP)
                return
            if len(order) > 1:
                order.sort(key=lambda upstream: upstream.is_down(now))
        exchange = Exchange(key, query, now + self._total_s, tcp=tcp, order=order)
        exchange.waiting.append(done)
        self.waiting += 1
        self._exchanges[key] = exchange
        if tcp or self._alike.admit(exchange):
            self._attempt(exchange)
        else:
            exchange.timer = self._loop.call_later(self._total_s, self._finish, exchange, Failure.TIMEOUT)

    def _group(self, query: Query) -> list[Upstream]:
        """Return the upstreams for a name: those of the most specific zone that contains it."""
        if self._zones:
            for start in (*query.labels, len(query.name) - 1):
                group = self._zones.get(query.name[start:])
                if group is not None:
                    return group
        return self._upstreams

    def close(self) -> None:
        """Close the sockets. Outstanding and new questions fail with Failure.CLOSED."""
        self._closed = True
        for upstream in self.upstreams:
            upstream.close()
        for exchange in list(self._exchanges.values()):
            self._finish(exchange, Failure.CLOSED)

    def renew(self) -> None:
        """Give up sockets and connections whose local address is not the one that the kernel would choose now."""
        for upstream in self.upstreams:
            upstream.renew()

    async def ended(self) -> None:
        """Wait until all connections are closed; call `close` first."""
        for upstream in self.upstreams:
            await upstream.ended()

    def _attempt(self, exchange: Exchange) -> None:
        """Ask the next upstream. One that fails at once is skipped."""
        now = self._loop.time()
        while exchange.refusals < max(len(exchange.order), 2):  # each upstream once; twice if there is only one
            exchange.attempts += 1
            upstream = exchange.order[(exchange.attempts - 1) % len(exchange.order)]
            if self._ask(exchange, upstream, now):
                exchange.racing = self._race_s < self._attempt_s and exchange.attempts < len(exchange.order)
                self._wait(exchange, self._race_s if exchange.racing else self._attempt_s, now)
                return
        if exchange.open:  # an earlier attempt may still be answered
            self._wait(exchange, self._total_s, now)
            return
        self._finish(exchange, exchange.fallback or Failure.UNREACHABLE)

    def _let_out(self, exchange: Exchange) -> None:
        """Start an exchange that had to wait, unless it has ended meanwhile."""
        if self._exchanges.get(exchange.key) is exchange:
            self._attempt(exchange)

    def _again(self, exchange: Exchange, upstream: QueryTarget) -> None:
        """Ask the same upstream again, in another way."""
        now = self._loop.time()
        if self._ask(exchange, upstream, now):
            exchange.racing = False
            self._wait(exchange, self._attempt_s, now)
        else:
            self._attempt(exchange)

    def _ask(self, exchange: Exchange, upstream: QueryTarget, now: float) -> bool:
        """Make one attempt; False: it failed at once."""
        if len(exchange.open) > 1:
            earlier = [attempt for attempt in exchange.open if attempt.pending.upstream is upstream]
            if len(earlier) > 1:
                exchange.drop(earlier[0])
        exchange.last = upstream
        if exchange.trust.get(upstream) is Trust.STREAM:
            try:
                upstream.ask(exchange, now, stream=True)
            except OSError:
                self._suspicion.stream_failed(exchange, upstream, now)
            else:
                return True
        try:
            upstream.ask(exchange, now, stream=exchange.tcp)
        except OSError:
            self._refused(exchange, upstream, now)
            return False
        return True

    def _wait(self, exchange: Exchange, wait_s: float, now: float) -> None:
        if exchange.timer is not None:
            exchange.timer.cancel()
        wait_s = max(min(wait_s, exchange.deadline - now), 0)
        exchange.timer = self._loop.call_later(wait_s, self._elapsed, exchange)

    def _refused(self, exchange: Exchange, upstream: QueryTarget, now: float) -> None:
        self._metrics.upstream[UpstreamOutcome.UNREACHABLE] += 1
        exchange.refusals += 1
        upstream.failed(now)

    def _elapsed(self, exchange: Exchange) -> None:
        now = self._loop.time()
        over = now >= exchange.deadline - _TICK_S
        if exchange.racing and not over:
            self._metrics.upstream[UpstreamOutcome.RACED] += 1
            self._attempt(exchange)
            return
        self._metrics.upstream[UpstreamOutcome.TIMEOUT] += 1
        upstream = exchange.last
        if upstream is not None:
            if exchange.trust.get(upstream) is Trust.STREAM and not over:
                self._suspicion.stream_failed(exchange, upstream, now)
                self._again(exchange, upstream)
                return
            upstream.failed(now)
            edns = exchange.query.edns
            if not upstream.abilities.edns_seen and not (edns is not None and edns.do):
                exchange.plain = True  # some servers do not answer what they do not understand
        all_asked = exchange.fallback is not None and exchange.attempts >= len(exchange.order)
        if all_asked or over:
            self._finish(exchange, exchange.fallback or Failure.TIMEOUT)
        else:
            self._attempt(exchange)

    # Incoming packets

    def _on_packet(self, packet: bytes, pending: Pending) -> None:
        attempt = pending.get(int.from_bytes(packet[:2], "big"))
        if attempt is None:
            self._suspicion.unmatched(packet, pending)
            return
        exchange, upstream = attempt.exchange, pending.upstream
        verdict, opt = judge(
            packet,
            attempt.question,
            spelled=attempt.spelled,
            edns=attempt.edns,
            client_cookie=attempt.client_cookie,
            expects_cookie=upstream.abilities.has_cookies and not pending.stream,
            stream=pending.stream,
        )
        if verdict is Verdict.ANSWER:
            self._learn(upstream, attempt, opt)
            self._answered(exchange, attempt, upstream, packet)
        elif verdict is Verdict.NO_ANSWER:
            self._suspicion.wrong_question(exchange, pending)
        else:
            self._suspicion.doubt(attempt, verdict, packet, opt)

    def _learn(self, upstream: QueryTarget, attempt: Attempt, opt: Opt | None) -> None:
        """Remember what an answer shows about its server's capabilities."""
        said = opt.cookie if opt is not None else b""
        if opt is not None:
            upstream.abilities.edns_seen = True
        # A server that sends no cookie over TCP may still send them over UDP, unless a missing one is why we use TCP.
        if attempt.client_cookie and (said or attempt.exchange.doubted):
            upstream.abilities.learned_cookie(attempt.source, said)

    def _answered(self, exchange: Exchange, attempt: Attempt, upstream: QueryTarget, packet: bytes) -> None:
        if packet[3] & 0xF in _TRY_ANOTHER and exchange.attempts < len(exchange.order):
            self._metrics.upstream[UpstreamOutcome.FAILED_OVER] += 1
            exchange.fallback = packet
            exchange.forget(attempt.pending)
            self._attempt(exchange)
            return
        self._metrics.upstream[UpstreamOutcome.ANSWERED] += 1
        now = self._loop.time()
        upstream.answered()
        if exchange.doubted and attempt.pending.stream and attempt.spelled:
            self._suspicion.report(exchange, upstream, now)  # over TCP it supports what the other answer lacked
        if len(exchange.open) > 1:
            for other in {each.pending.upstream for each in exchange.open}:
                if other is not upstream:
                    other.failed(now)  # it was asked earlier, or is not faster than one that was
        if attempt.spelled:
            packet = restored(packet, attempt.question[:-4], exchange.query.name)
        self._finish(exchange, packet)

    def _on_lost(self, pending: Pending) -> None:
        now = self._loop.time()
        upstream = pending.upstream
        for exchange in dict.fromkeys(attempt.exchange for attempt in list(pending.values())):
            exchange.forget(pending)
            if pending.stream and not exchange.tcp and exchange.trust.get(upstream) is Trust.STREAM:
                self._suspicion.stream_failed(exchange, upstream, now)
                self._again(exchange, upstream)
            else:
                self._refused(exchange, upstream, now)
                self._attempt(exchange)

    def _on_moved(self, pending: Pending) -> None:
        """Ask again from another local address. The first attempt may still be answered."""
        for exchange in dict.fromkeys(attempt.exchange for attempt in list(pending.values())):
            if self._exchanges.get(exchange.key) is exchange:
                self._again(exchange, pending.upstream)

    def _finish(self, exchange: Exchange, result: bytes | Failure) -> None:
        if exchange.timer is not None:
            exchange.timer.cancel()
        if self._exchanges.pop(exchange.key, None) is None:
            return
        for attempt in exchange.open:
            attempt.pending.pop(attempt.ident, None)
        exchange.open.clear()
        waiting, exchange.waiting = exchange.waiting, []
        self.waiting -= len(waiting)
        if not exchange.tcp:
            self._alike.ended(exchange, closed=self._closed)
        for done in waiting:
            try:
                done(result)
            except Exception:
                log.exception("dns_answer_failed")
