"""From a packet to its reply: who may ask, what we answer ourselves, what upstream is asked, and in which order.

A question that was answered before is answered within `handle`; nothing is allocated for it but the reply. For the others
the reply comes later, from a callback of the loop. Nothing that a client or an upstream sends makes `handle` raise.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import Any, TypeAlias

from discovery.model import Mesh
from dnsgw.config import DnsConfig
from dnsgw.exchange import Failure
from dnsgw.forward import Forwarder
from dnsgw.intercept import NOT_READY, Disposition, Recent, Table
from dnsgw.metrics import DnsMetrics, Outcome
from dnsgw.reply import Answer, Presence, presence, relayed
from dnsgw.wire import (
    MAX_TCP_REPLY,
    BadQuery,
    ExtendedError,
    Qtype,
    Query,
    Rcode,
    extended_error,
    forwardable,
    scan,
    with_qtype,
)

log = logging.getLogger(__name__)

HOLD_S = 1.0  # before the first news of discovery; Java would remember a failure for 10 s
MAX_HELD = 1024
MAX_KNOWN_CLIENTS = 65536
MAX_VERDICTS = 4096
_LOG_EVERY_S = 1.0

Send: TypeAlias = Callable[[bytes, Any], None]
"""Called once for each packet handled: with the reply, or with nothing when nothing is to be said, and with `where`."""


def _failure(rcode: Rcode, code: ExtendedError, why: str) -> Answer:
    return Answer(rcode, authoritative=False, options=extended_error(code, why))


_REFUSED = Answer(Rcode.REFUSED, authoritative=False)
_FAILURES = {
    Failure.TIMEOUT: _failure(Rcode.SERVFAIL, ExtendedError.NO_REACHABLE_AUTHORITY, "no upstream answered in time"),
    Failure.UNREACHABLE: _failure(Rcode.SERVFAIL, ExtendedError.NETWORK_ERROR, "no upstream can be reached"),
    Failure.NO_UPSTREAM: _failure(Rcode.SERVFAIL, ExtendedError.NO_REACHABLE_AUTHORITY, "no upstream is configured"),
    Failure.OVERLOADED: _failure(Rcode.REFUSED, ExtendedError.OTHER, "too many questions wait for an upstream"),
    Failure.CLOSED: _failure(Rcode.SERVFAIL, ExtendedError.NOT_READY, "shutting down"),
}
_UNDECIDED = _failure(
    Rcode.SERVFAIL, ExtendedError.NO_REACHABLE_AUTHORITY, "upstream does not say whether it has this name"
)

_OUTCOMES: dict[int, Outcome] = {
    Rcode.NOERROR: Outcome.NODATA,
    Rcode.NXDOMAIN: Outcome.NXDOMAIN,
    Rcode.REFUSED: Outcome.REFUSED,
    Rcode.SERVFAIL: Outcome.SERVFAIL,
}


class _Asked:
    """A question that was not answered at once."""

    __slots__ = ("held", "message", "query", "send", "tcp", "where")

    def __init__(self, query: Query, message: bytes, send: Send, where: Any, *, tcp: bool) -> None:
        self.query = query
        self.message = message
        self.send = send
        self.where = where
        self.tcp = tcp
        self.held: asyncio.TimerHandle | None = None

    @property
    def limit(self) -> int:
        return MAX_TCP_REPLY if self.tcp else self.query.limit


class Resolver:
    """Answers questions from the current table and from upstream."""

    def __init__(self, config: DnsConfig, metrics: DnsMetrics) -> None:
        """Prepare; `attach` comes before the first question. Raises BadName for a bad domain."""
        self._config = config
        self._metrics = metrics
        self._counts = metrics.queries
        self._table = self._make_table(None)
        self._clients: dict[str, bool] = {}
        self._verdicts: Recent[tuple[float, bool]] = Recent(MAX_VERDICTS)
        self._held: dict[_Asked, None] = {}
        self._next_log = 0.0
        self._loop: asyncio.AbstractEventLoop
        self._forwarder: Forwarder

    def attach(self, loop: asyncio.AbstractEventLoop, forwarder: Forwarder) -> None:
        """Take the loop to run on and the way to upstream."""
        self._loop = loop
        self._forwarder = forwarder

    def apply(self, mesh: Mesh) -> None:
        """Answer from this state of discovery from now on."""
        self._table = self._make_table(mesh)
        held, self._held = self._held, {}
        for asked in held:
            if asked.held is not None:
                asked.held.cancel()
            self._guarded(self._dispatch, asked)

    def close(self) -> None:
        """Answer what is held."""
        for asked in list(self._held):
            self._release(asked)

    def handle(self, data: bytes, host: str, send: Send, where: Any, tcp: bool) -> None:
        """Answer a packet that came from `host`, now or later, by `send`. Never raises."""
        try:
            allowed = self._clients.get(host)
            if allowed is None:
                allowed = self._admit(host)
            if allowed:
                reply = self._table.answer_at_once(data)
                if reply is not None:
                    self._count(reply)
                    send(reply, where)
                    return
            self._look(data, send, where, tcp=tcp, allowed=allowed)
        except Exception as error:  # noqa: BLE001 - the last resort, or one packet would end the server
            self._log(error)
            send(b"", where)

    def _make_table(self, mesh: Mesh | None) -> Table:
        config = self._config
        return Table(mesh, imports=config.imports, network=config.network, domain=config.domain, ttl_s=config.ttl_s)

    def _admit(self, host: str) -> bool:
        address = ip_address(host)
        allowed = any(address in network for network in self._config.allow)
        if len(self._clients) >= MAX_KNOWN_CLIENTS:
            self._clients.clear()
        self._clients[host] = allowed
        return allowed

    def _look(self, data: bytes, send: Send, where: Any, *, tcp: bool, allowed: bool) -> None:
        try:
            query = scan(data)
        except BadQuery as bad:
            self._counts[Outcome.MALFORMED if bad.reply else Outcome.IGNORED] += 1
            send(bad.reply, where)
            return
        if not allowed:
            self._counts[Outcome.DENIED] += 1
            send(_REFUSED.reply(query, query.limit), where)
            return
        self._dispatch(_Asked(query, forwardable(data, query), send, where, tcp=tcp))

    def _dispatch(self, asked: _Asked) -> None:
        decision = self._table.decide(asked.query)
        if isinstance(decision, Answer):
            self._answer(asked, decision)
        elif decision is Disposition.FORWARD:
            self._ask(asked, self._forwarded)
        elif decision is Disposition.LOCAL_FIRST:
            self._local_first(asked)
        else:
            self._hold(asked)

    def _answer(self, asked: _Asked, answer: Answer) -> None:
        reply = answer.reply(asked.query, asked.limit)
        self._count(reply)
        asked.send(reply, asked.where)

    def _count(self, reply: bytes) -> None:
        """Count an answer of ours by its RCODE and whether it holds a record."""
        self._counts[Outcome.ANSWERED if reply[7] else _OUTCOMES[reply[3] & 0xF]] += 1

    # Upstream's answers

    def _ask(self, asked: _Asked, then: Callable[[_Asked, bytes | Failure], None], qtype: int | None = None) -> None:
        """Ask upstream the question itself, or the same about another type."""
        message = asked.message if qtype is None else with_qtype(asked.message, asked.query, qtype)
        self._forwarder.ask(message, asked.query, partial(self._guarded, then, asked), tcp=asked.tcp)

    def _forwarded(self, asked: _Asked, result: bytes | Failure) -> None:
        if isinstance(result, bytes):
            self._counts[Outcome.FORWARDED] += 1
            asked.send(relayed(result, asked.query, asked.limit), asked.where)
            return
        self._counts[Outcome.OVERLOADED if result is Failure.OVERLOADED else Outcome.UPSTREAM_FAILED] += 1
        asked.send(_FAILURES[result].reply(asked.query, asked.limit), asked.where)

    # Imported names of which upstream has the first word. Whether a name is upstream's is one verdict for all its types:
    # a name with an A record there and no AAAA must not get our AAAA, nor the other way round.

    def _local_first(self, asked: _Asked) -> None:
        verdict = self._verdicts.get(asked.query.name)
        if verdict is not None and verdict[0] <= self._loop.time():
            verdict = None
        if verdict is None and asked.query.qtype not in (Qtype.A, Qtype.AAAA):
            self._ask(asked, partial(self._probed, Qtype.A, None), Qtype.A)
        elif verdict is None or not verdict[1]:
            self._ask(asked, partial(self._heard, verdict is not None))
        else:
            self._answer_import(asked)

    def _heard(self, known: bool, asked: _Asked, result: bytes | Failure) -> None:
        """Upstream's answer to the question itself; `known`: the name was upstream's a moment ago."""
        said = presence(result) if isinstance(result, bytes) else Presence.FAILED
        if said is Presence.NXDOMAIN:
            self._decide(asked, ours=True)
        elif said is Presence.NODATA and not known:
            other = Qtype.AAAA if asked.query.qtype == Qtype.A else Qtype.A
            self._ask(asked, partial(self._probed, other, result), other)
        else:
            if said is Presence.DATA:
                self._remember(asked, ours=False)
            self._forwarded(asked, result)

    def _probed(self, qtype: Qtype, kept: bytes | Failure | None, asked: _Asked, result: bytes | Failure) -> None:
        """Upstream's answer about an address type that was not asked for; `kept` is its answer to the question."""
        said = presence(result) if isinstance(result, bytes) else Presence.FAILED
        if said is Presence.FAILED:
            self._answer(asked, _UNDECIDED)
        elif said is Presence.DATA:
            self._remember(asked, ours=False)
            if kept is None:
                self._ask(asked, self._forwarded)
            else:
                self._forwarded(asked, kept)
        elif said is Presence.NODATA and kept is None and qtype is Qtype.A:
            self._ask(asked, partial(self._probed, Qtype.AAAA, None), Qtype.AAAA)
        else:
            self._decide(asked, ours=True)

    def _decide(self, asked: _Asked, *, ours: bool) -> None:
        self._remember(asked, ours=ours)
        self._answer_import(asked)

    def _remember(self, asked: _Asked, *, ours: bool) -> None:
        self._verdicts[asked.query.name] = (self._loop.time() + self._config.ttl_s, ours)

    def _answer_import(self, asked: _Asked) -> None:
        answer = self._table.imported(asked.query)
        if isinstance(answer, Answer):
            self._answer(asked, answer)
        elif answer is Disposition.NOT_READY:
            self._hold(asked)
        else:
            self._ask(asked, self._forwarded)  # not imported any more

    # Questions from before the first news of discovery

    def _hold(self, asked: _Asked) -> None:
        if len(self._held) >= MAX_HELD:
            self._answer(asked, NOT_READY)
            return
        asked.held = self._loop.call_later(HOLD_S, self._release, asked)
        self._held[asked] = None

    def _release(self, asked: _Asked) -> None:
        if asked in self._held:
            del self._held[asked]
            self._guarded(self._answer, asked, NOT_READY)

    def _guarded(self, step: Callable[..., None], asked: _Asked, *arguments: object) -> None:
        try:
            step(asked, *arguments)
        except Exception as error:  # noqa: BLE001 - as above
            self._log(error)
            asked.send(b"", asked.where)

    def _log(self, error: Exception) -> None:
        """Log a fault of ours, once a second at most: whoever caused it can cause more."""
        self._counts[Outcome.ERROR] += 1
        now = self._loop.time()
        if now >= self._next_log:
            self._next_log = now + _LOG_EVERY_S
            log.error("dns_error", exc_info=error, extra={"event": {"count": self._counts[Outcome.ERROR]}})
