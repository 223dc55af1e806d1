"""From a packet to its reply: which clients may ask, what we answer ourselves, what upstream is asked, and in which order.

A question whose answer is prepared or cached is answered within `handle`, and only the reply is allocated for it. For other
questions the reply may come later, from a callback of the loop. Nothing that a client or an upstream sends makes `handle` raise.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from discovery.model.imports import Imports
from discovery.model.mesh import Mesh
from dnsgw.client_limits import Client, Clients, Host
from dnsgw.config import DnsConfig
from dnsgw.mesh_zone.current import Tables
from dnsgw.mesh_zone.dual_stack import PAIR_S, DualStackConsistency
from dnsgw.mesh_zone.ownership_changes import changed_owner
from dnsgw.mesh_zone.zone import NOT_READY, Disposition
from dnsgw.message import cookie
from dnsgw.message.compose import joined, retargeted
from dnsgw.message.names import Malformed
from dnsgw.message.question import MAX_TCP_REPLY, BadQuery, Qtype, Rcode, option, scan, wire_name
from dnsgw.message.reply import Answer, truncate
from dnsgw.message.upstream_reply import Message
from dnsgw.metrics import DnsMetrics, Outcome
from dnsgw.pending_query import FAILURES, FORMAT_ERROR, REFUSED, TOO_MANY, UNDECIDED, PendingQuery, Send
from dnsgw.precedence import Owner, Precedence, Then
from dnsgw.upstream.cache import answer_cached, key_of
from dnsgw.upstream.exchange import Failure
from dnsgw.upstream.forwarder import Forwarder
from dnsgw.upstream.resolver import FAILURE_TTL_S, UpstreamReply, UpstreamResolver

log = logging.getLogger(__name__)

MAX_ALIASES = 4  # times that a chain may lead from upstream's aliases to a name of ours; more than one is unusual
_SLIP = 8  # one in so many questions above the rate limit gets TC, so that a client whose address is real can use TCP
_LOG_EVERY_S = 1.0
_UNFOLLOWED = (Qtype.CNAME, Qtype.ANY)  # questions for the alias itself (RFC 1034 section 3.6.2)

_OUTCOMES: dict[int, Outcome] = {
    Rcode.NOERROR: Outcome.NODATA,
    Rcode.NXDOMAIN: Outcome.NXDOMAIN,
    Rcode.REFUSED: Outcome.REFUSED,
    Rcode.SERVFAIL: Outcome.SERVFAIL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolverLimits:
    """Times and limits of a resolver. The defaults are for production; tests choose others."""

    hold_s: float = 1.0
    """How long a question about our names waits for the first state of discovery; Java would remember a failure for 10 s."""

    max_held: int = 1024
    """Questions that may wait for it; more are answered SERVFAIL at once."""

    rate_window_s: float = 1.0
    """The period that `DnsConfig.rate_limit` applies to."""

    failure_ttl_s: float = FAILURE_TTL_S
    """How long a failure of upstream is remembered; until then the question is not forwarded again."""

    pair_s: float = PAIR_S
    """How far apart a client's A and AAAA question may be and still be answered from the same state of discovery."""


RESOLVER_LIMITS = ResolverLimits()


class Resolver:
    """Answers questions from the current table, from the cache, and by asking upstream."""

    def __init__(self, config: DnsConfig, metrics: DnsMetrics, limits: ResolverLimits = RESOLVER_LIMITS) -> None:
        """Raises BadName for a bad domain. Call `attach` before the first question."""
        self._config = config
        self._limits = limits
        self._metrics = metrics
        self._counts = metrics.queries
        self._drawn = os.urandom(cookie.SECRET_SIZE)
        self._secret = config.cookie_secret or self._drawn
        self._probes: dict[bytes, Callable[[], None]] = {}
        self._pairs = DualStackConsistency(limits.pair_s)
        self._note = self._pairs.recent.append
        self._mesh: Mesh | None = None
        self._stale_end: asyncio.TimerHandle | None = None
        self._tables = Tables(config)
        self._table = self._tables.make(None, 0.0)
        self._foreign = UpstreamResolver(
            config.cache,
            metrics,
            max_in_flight=config.max_in_flight,
            client_subnet=config.client_subnet,
            failure_ttl_s=limits.failure_ttl_s,
        )
        self._cache = self._foreign.cache
        self._clients = Clients(config.allow, config.rate_limit)
        self._left = self._clients.left
        self._limited = 0
        self._most = config.max_udp_reply
        self._precedence = Precedence(self._ask_anew, lambda: self._loop.time(), config.ttl_s)
        self._held: dict[PendingQuery, None] = {}
        self._next_log = 0.0
        self._window: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop

    def attach(self, loop: asyncio.AbstractEventLoop, forwarder: Forwarder) -> None:
        """Set the loop to run on, and the forwarder that asks upstream."""
        self._loop = loop
        self._foreign.attach(loop, forwarder)

    def reconfigure(self, config: DnsConfig, *, elsewhere: bool) -> None:
        """Use another configuration. `elsewhere`: the upstreams are others, so their cached answers are dropped."""
        before, self._config = self._config, config
        self._tables.reconfigure(config)
        self._clients = Clients(config.allow, config.rate_limit)
        self._left = self._clients.left
        self._most = config.max_udp_reply
        self._secret = config.cookie_secret or self._drawn
        self._precedence.ttl_s = config.ttl_s
        self._precedence.forget()
        self._foreign.reconfigure(config.cache, max_in_flight=config.max_in_flight, client_subnet=config.client_subnet)
        if elsewhere:
            self._foreign.forget()
        if self._mesh is None:
            self._table = self._tables.make(None, 0.0)
        else:
            self._apply(self._mesh, before.imports)

    def apply(self, mesh: Mesh) -> None:
        """Use this state of discovery from now on, and answer the questions that waited for it."""
        self._apply(mesh, self._config.imports)

    def _apply(self, mesh: Mesh, imports_before: Imports) -> None:
        if self._stale_end is not None:
            self._stale_end.cancel()
            self._stale_end = None
        if self._mesh is not None:
            names = changed_owner(self._mesh, imports_before, mesh, self._config.imports)
            self._cache.flush(map(wire_name, names))
        self._mesh = mesh
        now = time.monotonic()
        before, self._table = self._table, self._tables.make(mesh, now)
        if self._tables.holds_s:
            self._stale_end = self._loop.call_later(self._tables.holds_s, self.apply, mesh)
        self._pairs.keep(before, now)
        self._cache.cool()  # names that were upstream's may be ours now
        held, self._held = self._held, {}
        for asked in held:
            if asked.held is not None:
                asked.held.cancel()
            self._guarded(self._dispatch, asked)

    def close(self) -> None:
        """Stop the timers, and answer SERVFAIL to the questions that wait for discovery."""
        for timer in (self._window, self._stale_end):
            if timer is not None:
                timer.cancel()
        for asked in list(self._held):
            self._release(asked)

    def handle(self, data: bytes, host: Host, send: Send, where: Any, tcp: bool) -> None:
        """Answer a packet from `host` by calling `send`, now or later. Never raises."""
        try:
            client, left = host, self._left.get(host)
            if left is None:
                client, left = self._admit(host)
            if left > 0:
                self._left[client] = left - 1
                self._note((host, data))
                reply = None
                if self._pairs.open:
                    reply = self._pairs.reply(data, host, time.monotonic(), self._most)
                if reply is None:
                    reply = self._table.answer_at_once(data)
                if reply is not None:
                    self._count(reply)
                    send(reply, where)
                    return
                if self._cache.hot:
                    reply = answer_cached(data, self._cache.hot, self._loop.time(), self._most)
                    if reply is not None:
                        self._counts[Outcome.CACHED] += 1
                        send(reply, where)
                        return
            self._look(data, host, send, where, tcp=tcp, left=left)
        except Exception as error:  # noqa: BLE001 - one packet must not end the server
            self._log(error)
            send(b"", where)

    def _admit(self, host: Host) -> tuple[Client, int]:
        if self._window is None and self._clients.limited:
            self._window = self._loop.call_later(self._limits.rate_window_s, self._renew)
        return self._clients.admit(host)

    def _renew(self) -> None:
        self._clients.renew()
        self._window = None

    def _look(self, data: bytes, host: Host, send: Send, where: Any, *, tcp: bool, left: int) -> None:
        try:
            query = scan(data)
        except BadQuery as bad:
            self._counts[Outcome.MALFORMED if bad.reply else Outcome.IGNORED] += 1
            send(bad.reply if left > 0 else b"", where)
            return
        if left < 0:
            self._counts[Outcome.DENIED] += 1
            send(REFUSED.reply(query, query.limit), where)
        elif left == 0:
            self._counts[Outcome.LIMITED] += 1
            self._limited += 1
            if tcp:
                send(TOO_MANY.reply(query, MAX_TCP_REPLY), where)
            else:
                send(b"" if self._limited % _SLIP else truncate(TOO_MANY.reply(query, query.limit), query), where)
        else:
            self._probe_or_dispatch(PendingQuery(query, host, send, where, tcp=tcp, most=self._most))

    def _probe_or_dispatch(self, asked: PendingQuery) -> None:
        query = asked.query
        if self._probes and query.name in self._probes:
            self._probes.pop(query.name)()
            self._answer(asked, FAILURES[Failure.LOOP])
            return
        value = (
            next((value for code, value in query.edns.options if code == cookie.OPTION), None) if query.edns else None
        )
        if value is not None:
            if not cookie.is_well_formed(value):
                self._counts[Outcome.MALFORMED] += 1
                asked.send(FORMAT_ERROR.reply(query, asked.limit), asked.where)
                return
            asked.add_option(option(cookie.OPTION, cookie.answer(value, asked.host, self._secret, time.time())))
        self._dispatch(asked)

    def expect_probe(self, name: bytes, seen: Callable[[], None]) -> Callable[[], None]:
        """Call `seen`, once, when somebody asks for this name. Returns a function that cancels this."""
        self._probes[name] = seen
        return lambda: self._probes.pop(name, None) and None

    def _dispatch(self, asked: PendingQuery) -> None:
        decision = self._table.decide(asked.query)
        if isinstance(decision, Answer):
            self._answer(asked, decision)
        elif decision is Disposition.FORWARD:
            self._ask(asked, self._forwarded)
        elif decision is Disposition.LOCAL_FIRST:
            self._precedence.settle(asked, self._settled)
        else:
            self._hold(asked)

    def _answer(self, asked: PendingQuery, answer: Answer) -> None:
        reply = answer.reply(asked.query, asked.limit)
        self._count(reply)
        asked.send(reply, asked.where)

    def _count(self, reply: bytes) -> None:
        """Count an answer of our own by its RCODE, and by whether it has a record."""
        self._counts[Outcome.ANSWERED if reply[7] else _OUTCOMES[reply[3] & 0xF]] += 1

    # Answers from upstream

    def _ask(self, asked: PendingQuery, then: Then, qtype: int | None = None) -> None:
        """Ask upstream the question itself, or the same question with another type."""
        self._foreign.ask(asked.query, asked.host, partial(self._guarded, then, asked), tcp=asked.tcp, qtype=qtype)

    def _ask_anew(self, asked: PendingQuery, then: Then, qtype: int | None = None) -> None:
        """As `_ask`, for a name that may be ours too: cached answers older than `ttl_s` are not used."""
        self._foreign.ask(
            asked.query,
            asked.host,
            partial(self._guarded, then, asked),
            tcp=asked.tcp,
            qtype=qtype,
            max_age_s=self._config.ttl_s,
        )

    def _forwarded(self, asked: PendingQuery, result: UpstreamReply | Failure) -> None:
        if isinstance(result, Failure):
            self._counts[Outcome.OVERLOADED if result is Failure.OVERLOADED else Outcome.UPSTREAM_FAILED] += 1
            asked.send(FAILURES[result].reply(asked.query, asked.limit), asked.where)
            return
        if result.denies_name and self._table.is_above(result.targets[-1] if result.targets else asked.query.name):
            result = result.as_nodata()
        followed = result.targets and asked.query.qtype not in _UNFOLLOWED and asked.depth < MAX_ALIASES
        ours = self._ours(asked, result) if followed else 0
        if ours:
            self._finish_chain(asked, result, ours)
            return
        if result.bindings:
            self._bound(asked, result, result.bindings)
        else:
            self._pass_on(asked, result)

    def _pass_on(self, asked: PendingQuery, result: UpstreamReply) -> None:
        """Reply with upstream's answer."""
        self._counts[result.outcome] += 1
        if result.outcome is Outcome.CACHED and result.entry is not None and not asked.depth and not result.bindings:
            key = key_of(asked.query)
            if key is not None and self._table.decide(asked.query) is Disposition.FORWARD:
                self._cache.heat(key, result.entry)
        wire = result.wire
        asked.send(wire if len(wire) <= asked.limit else truncate(wire, asked.query), asked.where)

    def _decide_on(self, asked: PendingQuery, name: bytes) -> Answer | Disposition:
        return self._table.decide(retargeted(asked.query, name))

    # Service bindings (RFC 9460) carry addresses, ports and keys of their target. If the target is one of our names, clients
    # would bypass the relay, or hide the SNI from it; without bindings they ask for addresses. A record set must not be split,
    # so all of it is withheld. AliasMode records carry nothing: a client that follows one asks us for the target.

    def _bound(self, asked: PendingQuery, result: UpstreamReply, names: tuple[bytes, ...]) -> None:
        """Reply with upstream's answer unless one of these names is ours."""
        for count, name in enumerate(names, 1):
            decision = self._decide_on(asked, name)
            if decision is Disposition.LOCAL_FIRST:
                then = partial(self._binding_settled, asked, result, names[count:])
                self._precedence.settle(asked.about(name, asked.send), then)
                return
            if decision is not Disposition.FORWARD:
                self._answer(asked, self._table.withheld)
                return
        self._pass_on(asked, result)

    def _binding_settled(
        self,
        asked: PendingQuery,
        result: UpstreamReply,
        rest: tuple[bytes, ...],
        _: PendingQuery,
        owner: Owner,
        __: UpstreamReply | Failure | None,
    ) -> None:
        if owner is Owner.UPSTREAM:
            self._guarded(self._bound, asked, result, rest)
        else:
            self._guarded(self._answer, asked, self._table.withheld if owner is Owner.OURS else UNDECIDED)

    # If a CNAME chain from upstream leads to one of our names, we complete it ourselves: upstream does not know the name, or
    # has another network's private address for it.

    def _ours(self, asked: PendingQuery, heard: UpstreamReply) -> int:
        """How many aliases lead to the first of our names; 0: none does."""
        for count, target in enumerate(heard.targets, 1):
            decision = self._decide_on(asked, target)
            if decision is Disposition.LOCAL_FIRST:
                # Upstream has precedence: the name is ours only if upstream's chain ends there.
                if count == len(heard.targets) and not Message(heard.wire).has_data(asked.query.qtype):
                    return count
            elif decision is not Disposition.FORWARD:
                return count
        return 0

    def _finish_chain(self, asked: PendingQuery, heard: UpstreamReply, count: int) -> None:
        self._dispatch(asked.about(heard.targets[count - 1], partial(self._join, asked, heard, count)))

    def _join(self, asked: PendingQuery, heard: UpstreamReply, count: int, reply: bytes, where: Any) -> None:  # noqa: ARG002
        wire = b""
        if reply:
            try:
                wire = joined(asked.query, Message(heard.wire), count, Message(reply))
            except Malformed:
                wire = FAILURES[Failure.MALFORMED].reply(asked.query, asked.limit)
        asked.send(wire if len(wire) <= asked.limit else truncate(wire, asked.query), asked.where)

    # Imported names for which upstream has precedence

    def _settled(self, asked: PendingQuery, owner: Owner, heard: UpstreamReply | Failure | None) -> None:
        if owner is Owner.OURS:
            self._answer_import(asked)
        elif owner is Owner.UNDECIDED:
            self._answer(asked, UNDECIDED)
        elif heard is None:
            self._ask_anew(asked, self._forwarded)
        else:
            self._forwarded(asked, heard)

    def _answer_import(self, asked: PendingQuery) -> None:
        answer = self._table.imported(asked.query)
        if isinstance(answer, Answer):
            self._answer(asked, answer)
        elif answer is Disposition.NOT_READY:
            self._hold(asked)
        else:
            self._ask(asked, self._forwarded)  # no longer imported

    # Questions that came before the first state of discovery

    def _hold(self, asked: PendingQuery) -> None:
        if len(self._held) >= self._limits.max_held:
            self._answer(asked, NOT_READY)
            return
        asked.held = self._loop.call_later(self._limits.hold_s, self._release, asked)
        self._held[asked] = None

    def _release(self, asked: PendingQuery) -> None:
        if asked in self._held:
            del self._held[asked]
            self._guarded(self._answer, asked, NOT_READY)

    def _guarded(self, step: Callable[..., None], asked: PendingQuery, *arguments: object) -> None:
        try:
            step(asked, *arguments)
        except Exception as error:  # noqa: BLE001 - as in `handle`
            self._log(error)
            asked.send(b"", asked.where)

    def _log(self, error: Exception) -> None:
        """Log an error in this program, at most once a second: a client that caused it can cause more."""
        self._counts[Outcome.ERROR] += 1
        now = self._loop.time()
        if now >= self._next_log:
            self._next_log = now + _LOG_EVERY_S
            log.error("dns_error", exc_info=error, extra={"event": {"count": self._counts[Outcome.ERROR]}})
