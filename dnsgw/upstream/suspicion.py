"""Packets that are not answers, or may be forged: what is accepted, and how a question is asked instead.

A packet that answers no outstanding question is counted, and the question keeps waiting. If somebody seems to forge answers to a
question, it is asked over TCP; if that fails, over UDP with a new id and port. If an answer lacks a feature that its server
supports, the question is asked again.
"""

import asyncio
import logging
from collections.abc import Callable

from dnsgw.metrics import DnsMetrics, UpstreamOutcome
from dnsgw.upstream.exchange import Attempt, Exchange, Pending, QueryTarget, Trust
from dnsgw.upstream.outstanding import OutstandingQueries
from dnsgw.upstream.verify import Opt, Verdict, question_of

log = logging.getLogger(__name__)

MAX_FORGED = 3  # answers with a wrong id that may be late ones; more mean that somebody is guessing
MAX_BAD_COOKIES = 1  # RFC 7873 section 5.3: once again with the new cookie, then over TCP
MAX_UNWANTED = 100  # unsolicited packets at one socket or connection, after which it is closed
_LOG_EVERY_S = 60.0

_OUTCOMES = {
    Verdict.MISSPELLED: UpstreamOutcome.MISSPELLED,
    Verdict.NO_COOKIE: UpstreamOutcome.WRONG_COOKIE,
    Verdict.BARE: UpstreamOutcome.UNPROVEN,
}


class Suspicion:
    """Handles the suspicious packets of all upstreams."""

    def __init__(
        self, metrics: DnsMetrics, out: OutstandingQueries, ask_again: Callable[[Exchange, QueryTarget], None]
    ) -> None:
        """Runs on the running loop.

        Args:
            metrics: counts the packets.
            out: the outstanding exchanges over UDP.
            ask_again: asks the same upstream again, in the way that the exchange now requires.
        """
        self._loop = asyncio.get_running_loop()
        self._counts = metrics.upstream
        self._alike = out
        self._again = ask_again
        self._next_log = 0.0

    def doubt(self, attempt: Attempt, verdict: Verdict, packet: bytes, opt: Opt | None) -> None:
        """Ask the same upstream again, in a way that it can answer or that is harder to forge."""
        self._counts[_OUTCOMES.get(verdict, UpstreamOutcome.ASKED_AGAIN)] += 1
        exchange, upstream = attempt.exchange, attempt.pending.upstream
        abilities, stream = upstream.abilities, attempt.pending.stream
        if verdict is Verdict.NO_EDNS:
            abilities.refused_edns(self._loop.time())
            exchange.plain = True
        elif verdict is Verdict.BAD_COOKIE and opt is not None:
            abilities.learned_cookie(attempt.source, opt.cookie)
            exchange.bad_cookies += 1
            exchange.no_cookie = stream
            if exchange.bad_cookies > MAX_BAD_COOKIES and not stream:
                self._over_tcp(exchange, upstream)
                return
        elif stream:  # not forged over TCP, so the server cannot do better
            if verdict is Verdict.MISSPELLED:
                upstream.lost_case(self._loop.time())
            else:
                abilities.lost_cookies()
                exchange.no_cookie = True
        else:
            exchange.doubted = True
            if verdict is Verdict.BARE:
                exchange.fallback = exchange.fallback or packet
            if upstream not in exchange.trust:
                self._over_tcp(exchange, upstream)
                return
            # TCP failed. An answer in the wrong case is never accepted, but a server may have lost its cookies.
            if verdict is Verdict.MISSPELLED or (exchange.plain and exchange.no_cookie):
                return
            exchange.no_cookie = True
            exchange.plain = verdict is Verdict.BARE
        exchange.drop(attempt)
        self._again(exchange, upstream)

    def unmatched(self, packet: bytes, pending: Pending) -> None:
        """Count a packet whose id matches no question at this socket: a late answer, or a guess."""
        upstream = pending.upstream
        found = () if pending.stream else self._alike.find(question_of(packet))
        if found:
            self._counts[UpstreamOutcome.WRONG_ID] += 1
            for exchange in found:
                self._suspect(exchange, upstream)
        else:
            self._counts[UpstreamOutcome.UNWANTED] += 1
        self._unwanted(pending)

    def _unwanted(self, pending: Pending) -> None:
        """Count an unsolicited packet; close a socket that has received too many."""
        upstream = pending.upstream
        pending.unwanted += 1
        if pending.unwanted != MAX_UNWANTED:
            return
        self._counts[UpstreamOutcome.FLOODED] += 1
        attempts = list(pending.values())
        upstream.shed(pending)
        for attempt in attempts if not pending.stream else ():
            exchange = attempt.exchange
            if attempt not in exchange.open:
                continue
            if upstream in exchange.trust:
                exchange.drop(attempt)
                self._again(exchange, upstream)
            else:
                self.report(exchange, upstream, self._loop.time())
                self._over_tcp(exchange, upstream)

    def wrong_question(self, exchange: Exchange, pending: Pending) -> None:
        """Count a packet whose id matches a question that it does not answer."""
        self._counts[UpstreamOutcome.WRONG_QUESTION] += 1
        self._unwanted(pending)
        if not pending.stream:
            self._suspect(exchange, pending.upstream)

    def _suspect(self, exchange: Exchange, upstream: QueryTarget) -> None:
        """Count an answer that no honest server should have sent; after a few, ask over TCP."""
        exchange.forged += 1
        if exchange.forged > MAX_FORGED and upstream not in exchange.trust:
            self.report(exchange, upstream, self._loop.time())
            self._over_tcp(exchange, upstream)

    def _over_tcp(self, exchange: Exchange, upstream: QueryTarget) -> None:
        """Stop waiting for this upstream's answers over UDP, and ask it over TCP."""
        at_stake = [each for each in exchange.open if each.pending.upstream is upstream and not each.pending.stream]
        if upstream in exchange.trust or not at_stake:
            return
        now = self._loop.time()
        self._counts[UpstreamOutcome.DISTRUSTED] += 1
        for attempt in at_stake:
            exchange.drop(attempt)
        exchange.trust[upstream] = Trust.STREAM if upstream.abilities.takes_streams(now) else Trust.RENEWED
        self._again(exchange, upstream)

    def stream_failed(self, exchange: Exchange, upstream: QueryTarget, now: float) -> None:
        """Note that this upstream does not accept connections now, so the exchange continues over UDP with a new id and port."""
        exchange.trust[upstream] = Trust.RENEWED
        upstream.abilities.refused_stream(now)

    def report(self, exchange: Exchange, upstream: QueryTarget, now: float) -> None:
        """Log that answers seem forged, at most once a minute: an attacker can cause any number of them."""
        if now < self._next_log:
            return
        self._next_log = now + _LOG_EVERY_S
        counts = self._counts
        log.warning(
            "dns_forging_suspected",
            extra={
                "event": {
                    "upstream": str(upstream.destination),
                    "name": ascii(exchange.query.text() or "")[1:-1],
                    "wrong_id": counts[UpstreamOutcome.WRONG_ID],
                    "wrong_question": counts[UpstreamOutcome.WRONG_QUESTION],
                    "misspelled": counts[UpstreamOutcome.MISSPELLED],
                    "wrong_cookie": counts[UpstreamOutcome.WRONG_COOKIE],
                    "detail": "it is asked over TCP",
                }
            },
        )
