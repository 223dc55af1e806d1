"""Answers for names that are not ours, from the cache or from upstream.

Every question gets exactly one answer, through a callback that may be called before `ask` returns. If upstream does not answer,
the last answer is used for a limited time; the forwarder gives up after 1.8 s, when RFC 8767 section 5 wants such an answer sent.
A question that failed is not asked again within a second (RFC 9520).
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from dnsgw.client_limits import Client, Host, client_of
from dnsgw.message.names import Malformed
from dnsgw.message.question import AD, HEADER, TC, ExtendedError, Query, Rcode, extended_error, retyped
from dnsgw.message.reply import truncate
from dnsgw.message.upstream_query import subnet_of
from dnsgw.message.upstream_reply import Message, flags_to_client
from dnsgw.metrics import DnsMetrics, Outcome
from dnsgw.two_generation_cache import TwoGenerationCache
from dnsgw.upstream.cache import MIN_PREFETCH_USES, RETRY_STALE_S, Cache, CacheConfig, Entry, key_of
from dnsgw.upstream.exchange import Failure
from dnsgw.upstream.forwarder import Forwarder

FAILURE_TTL_S = 1.0  # RFC 9520 section 3.2: at least one second
MAX_FAILURES = 4096
CLIENT_SHARE = 4  # one client may have a quarter of the questions that wait for upstream

_STALE = {
    Rcode.NOERROR: extended_error(ExtendedError.STALE_ANSWER, "upstream gives no answer"),
    Rcode.NXDOMAIN: extended_error(ExtendedError.STALE_NXDOMAIN, "upstream gives no answer"),
}


class UpstreamReply:
    """Upstream's answer as a reply to the client's question, of any length."""

    __slots__ = ("bindings", "entry", "outcome", "targets", "wire")

    def __init__(
        self,
        wire: bytes,
        outcome: Outcome,
        entry: Entry | None = None,
        *,
        targets: tuple[bytes, ...] = (),
        bindings: tuple[bytes, ...] = (),
    ) -> None:
        """Hold a reply.

        Args:
            wire: the whole message.
            outcome: whether it is cached, stale or forwarded.
            entry: its cache entry, if it has one.
            targets: as in Message.
            bindings: as in Message.
        """
        self.wire = wire
        self.outcome = outcome
        self.entry = entry
        self.targets = targets
        self.bindings = bindings

    @property
    def denies_name(self) -> bool:
        """Whether it says that the name, or the last one of its alias chain, does not exist."""
        return self.wire[3] & 0xF == Rcode.NXDOMAIN

    def as_nodata(self) -> "UpstreamReply":
        """Return the same as NODATA in place of NXDOMAIN, for a name that exists. It is upstream's no more, so without AD."""
        wire = self.wire[:3] + bytes((self.wire[3] & ~(0xF | AD) & 0xFF,)) + self.wire[4:]
        return UpstreamReply(wire, self.outcome, targets=self.targets, bindings=self.bindings)


Done: TypeAlias = Callable[[UpstreamReply | Failure], None]


class UpstreamResolver:
    """The cache, recent failures, and outstanding questions to upstream."""

    def __init__(
        self,
        config: CacheConfig,
        metrics: DnsMetrics,
        *,
        max_in_flight: int,
        client_subnet: bool = False,
        failure_ttl_s: float = FAILURE_TTL_S,
    ) -> None:
        """Call `attach` before the first question. `failure_ttl_s`: how long a failure is remembered, in seconds."""
        self.cache = Cache(config)
        self._metrics = metrics
        self._most = max(max_in_flight // CLIENT_SHARE, 1)
        self._client_subnet = client_subnet
        self._failure_ttl_s = failure_ttl_s
        self._failed: TwoGenerationCache[tuple[float, bytes | Failure]] = TwoGenerationCache(MAX_FAILURES)
        self._waiting: dict[Client, int] = {}
        self._prefetching: set[bytes] = set()
        self._read: tuple[bytes, Message] | None = None
        self._generation = 0
        self._loop: asyncio.AbstractEventLoop
        self._forwarder: Forwarder
        metrics.cache_entries = lambda: len(self.cache)
        metrics.cache_bytes = lambda: self.cache.size
        metrics.cache_evicted = lambda: self.cache.evicted

    def attach(self, loop: asyncio.AbstractEventLoop, forwarder: Forwarder) -> None:
        """Set the loop to run on, and the forwarder that asks upstream from now on."""
        self._loop = loop
        self._forwarder = forwarder

    def reconfigure(self, config: CacheConfig, *, max_in_flight: int, client_subnet: bool = False) -> None:
        """Use other settings from now on; they are those of the constructor."""
        self._client_subnet = client_subnet
        self.cache.reconfigure(config)
        self._most = max(max_in_flight // CLIENT_SHARE, 1)

    def forget(self) -> None:
        """Drop all answers, and do not cache those to outstanding questions: the upstreams are others."""
        self.cache.clear()
        self._failed = TwoGenerationCache(MAX_FAILURES)
        self._generation += 1

    def ask(
        self,
        query: Query,
        host: Host,
        done: Done,
        *,
        tcp: bool,
        qtype: int | None = None,
        max_age_s: float | None = None,
    ) -> None:
        """Answer a question from the cache or by asking upstream, and call `done` once.

        Args:
            query: the client's question.
            host: the client's address.
            done: called with the reply or a Failure, perhaps before this returns.
            tcp: the client asked over TCP.
            qtype: ask for this type in place of the question's.
            max_age_s: do not use older answers, even if their TTL has not expired.
        """
        if qtype is not None:
            query = retyped(query, qtype)
        key = key_of(query)
        if self._client_subnet and subnet_of(query):
            key = None  # the answer may be for that subnet only
        if key is not None:
            now = self._loop.time()
            known = self._recall(query, key, now, max_age_s)
            if known is not None:
                entry = known.entry if isinstance(known, UpstreamReply) else None
                if entry is not None and now >= entry.fresh_until and entry.uses >= MIN_PREFETCH_USES:
                    self._prefetch(query, key)
                done(known)
                return
        client = client_of(host)
        waiting = self._waiting.get(client, 0)
        if waiting >= self._most:
            self._give_up(query, key, done, Failure.OVERLOADED)
            return
        self._waiting[client] = waiting + 1
        self._forwarder.ask(query, partial(self._heard, self._generation, query, key, client, done), tcp=tcp)

    def _recall(self, query: Query, key: bytes, now: float, max_age_s: float | None) -> UpstreamReply | Failure | None:
        entry = self.cache.get(key)
        if entry is not None:
            if now < entry.expires and (max_age_s is None or now - entry.stored < max_age_s):
                entry.uses += 1
                wire = entry.reply(query, now)
                return UpstreamReply(wire, Outcome.CACHED, entry, targets=entry.targets, bindings=entry.bindings)
            if entry.expires <= now < entry.retry_at and self.cache.may_be_stale(entry, now):
                return self._stale(query, entry)
        failed = self._failed.get(key)
        if failed is not None and now < failed[0]:
            return failed[1] if isinstance(failed[1], Failure) else self._understood(query, None, failed[1], now)
        return None

    def _prefetch(self, query: Query, key: bytes) -> None:
        if key in self._prefetching:
            return
        self._prefetching.add(key)
        self._metrics.prefetched += 1
        self._forwarder.ask(query, partial(self._prefetched, self._generation, query, key), tcp=False)

    def _prefetched(self, generation: int, query: Query, key: bytes, result: bytes | Failure) -> None:
        self._prefetching.discard(key)
        if isinstance(result, bytes) and generation == self._generation:
            self._understood(query, key, result, self._loop.time())

    def _heard(
        self, generation: int, query: Query, key: bytes | None, client: Client, done: Done, result: bytes | Failure
    ) -> None:
        waiting = self._waiting.pop(client, 1) - 1
        if waiting:
            self._waiting[client] = waiting
        if generation != self._generation:
            key = None
        if isinstance(result, Failure):
            self._give_up(query, key, done, result)
            return
        if result[3] & 0xF == Rcode.SERVFAIL and key is not None:
            stale = self._last_good(query, key)
            if stale is not None:
                done(stale)
                return
            self._failed[key] = (self._loop.time() + self._failure_ttl_s, result)
        heard = self._understood(query, key, result, self._loop.time())
        if isinstance(heard, Failure):
            self._give_up(query, key, done, heard)
        else:
            done(heard)

    def _understood(self, query: Query, key: bytes | None, result: bytes, now: float) -> UpstreamReply | Failure:
        try:
            # All clients that waited for an answer get the same object, so it is parsed once.
            if self._read is None or self._read[0] is not result:
                self._read = (result, Message(result))
            message = self._read[1]
            entry = self.cache.put(key, message, now) if key is not None else None
            return UpstreamReply(
                message.as_reply(query),
                Outcome.FORWARDED,
                entry,
                targets=message.targets,
                bindings=message.bindings,
            )
        except Malformed:
            flags = int.from_bytes(result[2:4], "big")
            if flags & TC:  # truncated anywhere: what is left does not matter
                head = HEADER.pack(query.id, flags_to_client(flags, query), 1, 0, 0, 0)
                return UpstreamReply(truncate(head, query), Outcome.FORWARDED)
            return Failure.MALFORMED

    def _give_up(self, query: Query, key: bytes | None, done: Done, failure: Failure) -> None:
        if key is not None:
            stale = self._last_good(query, key)
            if stale is not None:
                done(stale)
                return
            if failure is not Failure.OVERLOADED and failure is not Failure.CLOSED:
                self._failed[key] = (self._loop.time() + self._failure_ttl_s, failure)
        done(failure)

    def _last_good(self, query: Query, key: bytes) -> UpstreamReply | None:
        """Return the last good answer if it may be used after its expiry."""
        entry = self.cache.get(key)
        now = self._loop.time()
        if entry is None or not self.cache.may_be_stale(entry, now):
            return None
        entry.retry_at = now + RETRY_STALE_S
        return self._stale(query, entry)

    @staticmethod
    def _stale(query: Query, entry: Entry) -> UpstreamReply:
        wire = entry.stale_reply(query, _STALE[Rcode(entry.rcode)])
        return UpstreamReply(wire, Outcome.STALE, targets=entry.targets, bindings=entry.bindings)
