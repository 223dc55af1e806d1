"""From a packet to its reply: who may ask, what we answer ourselves, what upstream is asked, and in which order.

A question that was answered before is answered within `handle`; nothing is allocated for it but the reply. For the others
the reply comes later, from a callback of the loop. Nothing that a client or an upstream sends makes `handle` raise.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from discovery.imports import Imports
from discovery.model import Mesh
from dnsgw import cookie
from dnsgw.admission import Clients, Host
from dnsgw.cache import answer_cached, key_of
from dnsgw.config import DnsConfig
from dnsgw.exchange import Failure
from dnsgw.foreign import Foreign, Heard
from dnsgw.forward import Forwarder
from dnsgw.intercept import NOT_READY, Disposition, Table
from dnsgw.message import Malformed, Message, joined, retargeted, with_option
from dnsgw.metrics import DnsMetrics, Outcome
from dnsgw.recent import Recent
from dnsgw.reply import Answer, Presence, presence, truncate
from dnsgw.wire import (
    HEADER_SIZE,
    MAX_TCP_REPLY,
    BadQuery,
    ExtendedError,
    Qtype,
    Query,
    Rcode,
    extended_error,
    forwardable,
    option,
    scan,
)

log = logging.getLogger(__name__)

HOLD_S = 1.0  # before the first news of discovery; Java would remember a failure for 10 s
MAX_HELD = 1024
MAX_ALIASES = 4  # from upstream's aliases to a name of ours and on from there: more than one is odd already
RECENT = 256  # questions looked through for halves of pairs
PAIR_S = 0.05  # between two packets that were sent at once
_HALVES = {b"\0\x01": b"\0\x1c", b"\0\x1c": b"\0\x01"}  # A and AAAA
_WINDOW_S = 1.0
_SLIP = 8  # of the questions that are too many one is answered by TC: whoever is real may come over TCP
MAX_VERDICTS = 4096
_LOG_EVERY_S = 1.0

Send: TypeAlias = Callable[[bytes, Any], None]
"""Called once for each packet handled: with the reply, or with nothing when nothing is to be said, and with `where`."""


def _failure(rcode: Rcode, code: ExtendedError, why: str) -> Answer:
    return Answer(rcode, authoritative=False, options=extended_error(code, why))


_REFUSED = Answer(Rcode.REFUSED, authoritative=False)
_FORMAT_ERROR = Answer(Rcode.FORMERR, authoritative=False)
_TOO_MANY = _failure(Rcode.REFUSED, ExtendedError.OTHER, "too many questions in one second")
_FAILURES = {
    Failure.TIMEOUT: _failure(Rcode.SERVFAIL, ExtendedError.NO_REACHABLE_AUTHORITY, "no upstream answered in time"),
    Failure.UNREACHABLE: _failure(Rcode.SERVFAIL, ExtendedError.NETWORK_ERROR, "no upstream can be reached"),
    Failure.NO_UPSTREAM: _failure(Rcode.SERVFAIL, ExtendedError.NO_REACHABLE_AUTHORITY, "no upstream is configured"),
    Failure.OVERLOADED: _failure(Rcode.REFUSED, ExtendedError.OTHER, "too many questions wait for an upstream"),
    Failure.MALFORMED: _failure(Rcode.SERVFAIL, ExtendedError.NETWORK_ERROR, "upstream's answer is malformed"),
    Failure.LOOP: _failure(Rcode.SERVFAIL, ExtendedError.OTHER, "what upstream is asked comes back here: a loop"),
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


def _send_with(send: Send, added: bytes, reply: bytes, where: Any) -> None:
    """Send a reply with one option more."""
    try:
        send(with_option(reply, added) if reply else reply, where)
    except Malformed:
        send(reply, where)


class _Asked:
    """A question that was not answered at once."""

    __slots__ = ("depth", "extra", "held", "host", "message", "most", "query", "send", "tcp", "where")

    def __init__(
        self, query: Query, message: bytes, host: Host, send: Send, where: Any, *, tcp: bool, most: int, depth: int = 0
    ) -> None:
        self.query = query
        self.message = message
        self.host = host
        self.send = send
        self.where = where
        self.tcp = tcp
        self.most = most
        self.depth = depth
        self.extra = 0
        """Bytes to leave for what is added to the reply."""

        self.held: asyncio.TimerHandle | None = None

    @property
    def limit(self) -> int:
        return MAX_TCP_REPLY if self.tcp else min(self.query.limit, self.most) - self.extra


class Resolver:
    """Answers questions from the current table, from what upstream said, and from upstream."""

    def __init__(self, config: DnsConfig, metrics: DnsMetrics) -> None:
        """Prepare; `attach` comes before the first question. Raises BadName for a bad domain."""
        self._config = config
        self._metrics = metrics
        self._counts = metrics.queries
        self._secret = config.cookie_secret or os.urandom(cookie.SECRET_SIZE)
        self._probes: dict[bytes, Callable[[], None]] = {}
        self._recent: deque[tuple[Host, bytes]] = deque(maxlen=RECENT)
        self._open_pairs: dict[tuple[Host, bytes], Table] = {}
        self._pairs_end: asyncio.TimerHandle | None = None
        self._relayed: Mesh | None = None
        """The last mesh in which a relay was alive, and when that was no longer so."""
        self._relayed_until: float | None = None
        self._stale_end: asyncio.TimerHandle | None = None
        self._table = self._make_table(None)
        self._foreign = Foreign(config.cache, metrics, max_in_flight=config.max_in_flight)
        self._cache = self._foreign.cache
        self._clients = Clients(config.allow, config.rate_limit)
        self._left = self._clients.left
        self._limited = 0
        self._most = config.max_udp_reply
        self._verdicts: Recent[tuple[float, bool]] = Recent(MAX_VERDICTS)
        self._held: dict[_Asked, None] = {}
        self._next_log = 0.0
        self._window: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop

    def attach(self, loop: asyncio.AbstractEventLoop, forwarder: Forwarder) -> None:
        """Take the loop to run on and the way to upstream."""
        self._loop = loop
        self._foreign.attach(loop, forwarder)

    def reimport(self, imports: Imports) -> None:
        """Take these imports into the tables to come."""
        self._config = replace(self._config, imports=imports)

    def apply(self, mesh: Mesh) -> None:
        """Answer from this state of discovery from now on."""
        if self._stale_end is not None:
            self._stale_end.cancel()
            self._stale_end = None
        before, self._table = self._table, self._make_table(mesh, self._stale_relays(mesh))
        self._keep_pairs(before)
        self._cache.cool()  # what was upstream's may be ours now
        held, self._held = self._held, {}
        for asked in held:
            if asked.held is not None:
                asked.held.cancel()
            self._guarded(self._dispatch, asked)

    # libc asks for the two addresses of a name in two packets at once. When discovery changes between them, the second is
    # answered from what the first was: an IPv6-only relay that gives way to an IPv4-only one must not look like no address.

    def _keep_pairs(self, before: Table) -> None:
        """Remember who asked for one half of a pair lately and not for the other."""
        pairs: dict[tuple[Host, bytes], set[bytes]] = {}
        for host, data in self._recent:
            stop = data.find(0, HEADER_SIZE) + 1
            qtype = data[stop : stop + 2]
            if qtype in _HALVES:
                pairs.setdefault((host, data[HEADER_SIZE:stop].lower()), set()).add(qtype)
        self._recent.clear()
        for (host, name), seen in pairs.items():
            if len(seen) == 1:
                self._open_pairs[host, name + _HALVES[seen.pop()]] = before
        if self._open_pairs and self._pairs_end is None:
            self._pairs_end = self._loop.call_later(PAIR_S, self._forget_pairs)

    def _forget_pairs(self) -> None:
        self._open_pairs.clear()
        self._pairs_end = None

    def _complete_pair(self, data: bytes, host: Host, send: Send, where: Any) -> bool:
        """Answer the other half of a pair as the first half was; False: it is none."""
        stop = data.find(0, HEADER_SIZE) + 1
        table = self._open_pairs.pop((host, data[HEADER_SIZE:stop].lower() + data[stop : stop + 2]), None)
        reply = None
        if table is not None:
            reply = table.answer_at_once(data)
            if reply is None:
                try:
                    query = scan(data)
                except BadQuery:
                    return False
                answer = table.decide(query)
                if isinstance(answer, Answer):
                    reply = answer.reply(query, min(query.limit, self._most))
        if reply is None:
            return False
        self._count(reply)
        send(reply, where)
        return True

    def close(self) -> None:
        """Answer what is held."""
        for timer in (self._window, self._stale_end, self._pairs_end):
            if timer is not None:
                timer.cancel()
        for asked in list(self._held):
            self._release(asked)

    def handle(self, data: bytes, host: Host, send: Send, where: Any, tcp: bool) -> None:
        """Answer a packet that came from `host`, now or later, by `send`. Never raises."""
        try:
            left = self._left.get(host)
            if left is None:
                left = self._admit(host)
            if left > 0:
                self._left[host] = left - 1
                self._recent.append((host, data))
                if self._open_pairs and self._complete_pair(data, host, send, where):
                    return
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
        except Exception as error:  # noqa: BLE001 - the last resort, or one packet would end the server
            self._log(error)
            send(b"", where)

    def _make_table(self, mesh: Mesh | None, stale: Mesh | None = None) -> Table:
        config = self._config
        return Table(
            mesh,
            imports=config.imports,
            network=config.network,
            domain=config.domain,
            ttl_s=config.ttl_s,
            stale=stale,
            vips=config.vip,
        )

    def _stale_relays(self, mesh: Mesh) -> Mesh | None:
        """The mesh whose relays are answered if this one has none, for a while."""
        if mesh.relays(self._config.network):
            self._relayed, self._relayed_until = mesh, None
            return None
        if self._relayed is None or not self._config.stale_relays_for_s:
            return None
        now = self._loop.time()
        if self._relayed_until is None:
            self._relayed_until = now + self._config.stale_relays_for_s
        if now >= self._relayed_until:
            return None
        self._stale_end = self._loop.call_later(self._relayed_until - now, self.apply, mesh)
        return self._relayed

    def _admit(self, host: Host) -> int:
        if self._window is None and self._clients.limited:
            self._window = self._loop.call_later(_WINDOW_S, self._renew)
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
            send(_REFUSED.reply(query, query.limit), where)
        elif left == 0:
            self._counts[Outcome.LIMITED] += 1
            self._limited += 1
            if tcp:
                send(_TOO_MANY.reply(query, MAX_TCP_REPLY), where)
            else:
                send(b"" if self._limited % _SLIP else truncate(_TOO_MANY.reply(query, query.limit), query), where)
        else:
            self._probe_or_dispatch(
                _Asked(query, forwardable(data, query), host, send, where, tcp=tcp, most=self._most)
            )

    def _probe_or_dispatch(self, asked: _Asked) -> None:
        query = asked.query
        if self._probes and query.name in self._probes:
            self._probes.pop(query.name)()
            self._answer(asked, _FAILURES[Failure.LOOP])
            return
        value = (
            next((value for code, value in query.edns.options if code == cookie.OPTION), None) if query.edns else None
        )
        if value is not None:
            if not cookie.is_well_formed(value):
                self._counts[Outcome.MALFORMED] += 1
                asked.send(_FORMAT_ERROR.reply(query, asked.limit), asked.where)
                return
            added = option(cookie.OPTION, cookie.answer(value, asked.host, self._secret, time.time()))
            asked.extra = len(added)
            asked.send = partial(_send_with, asked.send, added)
        self._dispatch(asked)

    def expect_probe(self, name: bytes, seen: Callable[[], None]) -> Callable[[], None]:
        """Have `seen` called, once, if somebody asks for this name; what is returned ends that."""
        self._probes[name] = seen
        return lambda: self._probes.pop(name, None) and None

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

    def _ask(self, asked: _Asked, then: Callable[[_Asked, Heard | Failure], None], qtype: int | None = None) -> None:
        """Ask upstream the question itself, or the same about another type."""
        self._foreign.ask(
            asked.query, asked.message, asked.host, partial(self._guarded, then, asked), tcp=asked.tcp, qtype=qtype
        )

    def _ask_anew(
        self, asked: _Asked, then: Callable[[_Asked, Heard | Failure], None], qtype: int | None = None
    ) -> None:
        """As `_ask`, of a name that may be ours too: what upstream said before the last `ttl_s` does not count."""
        self._foreign.ask(
            asked.query,
            asked.message,
            asked.host,
            partial(self._guarded, then, asked),
            tcp=asked.tcp,
            qtype=qtype,
            max_age_s=self._config.ttl_s,
        )

    def _forwarded(self, asked: _Asked, result: Heard | Failure) -> None:
        if isinstance(result, Failure):
            self._counts[Outcome.OVERLOADED if result is Failure.OVERLOADED else Outcome.UPSTREAM_FAILED] += 1
            asked.send(_FAILURES[result].reply(asked.query, asked.limit), asked.where)
            return
        ours = self._ours(asked, result) if result.targets and asked.depth < MAX_ALIASES else 0
        if ours:
            self._finish_chain(asked, result, ours)
            return
        self._counts[result.outcome] += 1
        if result.outcome is Outcome.CACHED and result.entry is not None and not asked.depth:
            key = key_of(asked.query)
            if key is not None and self._table.decide(asked.query) is Disposition.FORWARD:
                self._cache.heat(key, result.entry)
        wire = result.wire
        asked.send(wire if len(wire) <= asked.limit else truncate(wire, asked.query), asked.where)

    # A chain of aliases from upstream that leads to a name of ours is finished by us: upstream does not have the name, or
    # has another network's private address for it.

    def _ours(self, asked: _Asked, heard: Heard) -> int:
        """How many aliases lead to the first name of ours; 0: none is."""
        for count, target in enumerate(heard.targets, 1):
            decision = self._table.decide(retargeted(asked.query, target))
            if decision is Disposition.LOCAL_FIRST:
                # Upstream goes first: it is ours only if upstream's answer ends there.
                if count == len(heard.targets) and not Message(heard.wire).has_data(asked.query.qtype):
                    return count
            elif decision is not Disposition.FORWARD:
                return count
        return 0

    def _finish_chain(self, asked: _Asked, heard: Heard, count: int) -> None:
        target = retargeted(asked.query, heard.targets[count - 1])
        size = HEADER_SIZE - 2
        message = asked.message[:size] + target.question + asked.message[size + len(asked.query.question) :]
        send = partial(self._join, asked, heard, count)
        self._dispatch(
            _Asked(target, message, asked.host, send, None, tcp=True, most=asked.most, depth=asked.depth + 1)
        )

    def _join(self, asked: _Asked, heard: Heard, count: int, reply: bytes, where: Any) -> None:  # noqa: ARG002
        wire = b""
        if reply:
            try:
                wire = joined(asked.query, Message(heard.wire), count, Message(reply))
            except Malformed:
                wire = _FAILURES[Failure.MALFORMED].reply(asked.query, asked.limit)
        asked.send(wire if len(wire) <= asked.limit else truncate(wire, asked.query), asked.where)

    # Imported names of which upstream has the first word. Whether a name is upstream's is one verdict for all its types:
    # a name with an A record there and no AAAA must not get our AAAA, nor the other way round.

    def _local_first(self, asked: _Asked) -> None:
        verdict = self._verdicts.get(asked.query.name)
        if verdict is not None and verdict[0] <= self._loop.time():
            verdict = None
        if verdict is None and asked.query.qtype not in (Qtype.A, Qtype.AAAA):
            self._ask_anew(asked, partial(self._probed, Qtype.A, None), Qtype.A)
        elif verdict is None or not verdict[1]:
            self._ask_anew(asked, partial(self._heard, verdict is not None))
        else:
            self._answer_import(asked)

    def _heard(self, known: bool, asked: _Asked, result: Heard | Failure) -> None:
        """Upstream's answer to the question itself; `known`: the name was upstream's a moment ago."""
        said = presence(result.wire) if isinstance(result, Heard) else Presence.FAILED
        if said is Presence.NXDOMAIN:
            self._decide(asked, ours=True)
        elif said is Presence.NODATA and not known:
            other = Qtype.AAAA if asked.query.qtype == Qtype.A else Qtype.A
            self._ask_anew(asked, partial(self._probed, other, result), other)
        else:
            if said is Presence.DATA:
                self._remember(asked, ours=False)
            self._forwarded(asked, result)

    def _probed(self, qtype: Qtype, kept: Heard | Failure | None, asked: _Asked, result: Heard | Failure) -> None:
        """Upstream's answer about an address type that was not asked for; `kept` is its answer to the question."""
        said = presence(result.wire) if isinstance(result, Heard) else Presence.FAILED
        if said is Presence.FAILED:
            self._answer(asked, _UNDECIDED)
        elif said is Presence.DATA:
            self._remember(asked, ours=False)
            if kept is None:
                self._ask_anew(asked, self._forwarded)
            else:
                self._forwarded(asked, kept)
        elif said is Presence.NODATA and kept is None and qtype is Qtype.A:
            self._ask_anew(asked, partial(self._probed, Qtype.AAAA, None), Qtype.AAAA)
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
