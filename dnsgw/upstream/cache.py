"""A cache of upstream's answers, for as long as their TTLs say.

An entry is the wire form of the answer and authority sections, with the positions of their TTLs. These are counted down at most
once a second, however often the entry is used. The cache is bounded in bytes. New entries go into a small queue, and into the main
queue only if they are used again, so a flood of names that are asked for once evicts only itself (S3-FIFO: Yang et al., SOSP 2023).
Expired entries are kept for a configured time, for when upstream does not answer (RFC 8767).

Sans-IO: time comes as an argument, in seconds of any one clock.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dnsgw.message.names import Malformed, name_at
from dnsgw.message.question import (
    AD,
    CD,
    CLASS_IN,
    DO,
    HEADER,
    HEADER_SIZE,
    MAX_UDP_REPLY,
    MIN_UDP_REPLY,
    OPT_FIXED,
    QR,
    RA,
    RD,
    TC,
    Qtype,
    Query,
    Rcode,
    opt_record,
)
from dnsgw.message.upstream_reply import Message, Section

MAX_TTL_S = 3600  # as CoreDNS; unannounced changes are seen within the hour
MAX_NEGATIVE_TTL_S = 900  # RFC 2308 section 5 suggests 1 to 3 hours, but a new name should not have to wait that long
STALE_TTL_S = 30  # RFC 8767 section 4
RETRY_STALE_S = 30.0  # RFC 8767 section 5: after a stale answer, upstream is not asked again at once
MIN_PREFETCH_S = 10  # entries with a shorter TTL are not prefetched
MIN_PREFETCH_USES = 2

_SMALL_SHARE = 0.1  # of the bytes, for entries that have not been used again
_MAX_COUNTED_USES = 3
_OVERHEAD = 800  # bytes of an entry in addition to its body, measured with tracemalloc on 64-bit CPython 3.11
_OF_TARGET = 400  # bytes of an alias target, and of the index from it to the entry
_MAX_TYPES = 64  # query types tracked for flushing a name; with more types, a flush searches all entries
_ANY_TYPE = b"\0\0"
_OTHER_ADDRESS = {b"\0\x01": b"\0\x1c", b"\0\x1c": b"\0\x01"}  # A and AAAA

_DO_BIT = 2  # of the last byte of a key; 1 is CD
_OPTS = (opt_record(do=False), opt_record(do=True))
_SUFFIXES = [bytes((bits,)) for bits in range(4)]
_UNKEPT = frozenset({Qtype.ANY, Qtype.AXFR, Qtype.IXFR})


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Size of the cache, and lifetimes."""

    max_bytes: int = 32 << 20
    """Some 33,000 answers; 0: nothing is cached."""

    max_ttl_s: int = MAX_TTL_S
    """Upper limit of TTLs."""

    max_negative_ttl_s: int = MAX_NEGATIVE_TTL_S
    """Likewise, of negative answers."""

    stale_for_s: float = 86400.0
    """How long after its expiry an answer may be used if upstream does not answer (RFC 8767 suggests 1 to 3 days); 0: never."""

    prefetch_share: float = 0.1
    """An entry in use is asked for again once this share of its lifetime is left, as unbound does."""


class Entry:
    """One answer from upstream."""

    __slots__ = (
        "_opt",
        "_ttls",
        "bindings",
        "body",
        "expires",
        "fresh_until",
        "heads",
        "hot",
        "key",
        "rcode",
        "retry_at",
        "size",
        "stored",
        "tails",
        "tails_until",
        "targets",
        "uses",
    )

    def __init__(self, key: bytes, message: Message, ttl_s: int, now: float, config: CacheConfig) -> None:
        """Store a message for `ttl_s` seconds; no record gets a TTL above `config.max_ttl_s`."""
        max_ttl_s = config.max_ttl_s
        self.key = key
        self.rcode = message.flags & 0xF
        self.targets = message.targets
        self.bindings = message.bindings
        self.body = message.data[message.body : message.records_stop]
        self.stored = now
        self.expires = now + ttl_s
        self.fresh_until = self.expires
        """From this time on, `answer_cached` leaves it to the full path: it is due for a prefetch, or has expired."""
        if ttl_s >= MIN_PREFETCH_S:
            self.fresh_until -= ttl_s * config.prefetch_share
        self.retry_at = 0.0
        """Until this time upstream is not asked again, since it did not answer."""
        self.uses = 0
        self.hot: list[bytes] = []
        """Its keys in `Cache.hot`."""
        self._ttls = [
            (place.fixed + 4 - message.body, min(place.ttl_s, ttl_s if place.rtype == Qtype.SOA else max_ttl_s))
            for place in message.places
        ]
        bits = key[-1]
        flags = QR | RA | RD | message.flags & 0xF | bits << 4 & CD  # as `flags_to_client`; only answers to RD are kept
        self.heads = tuple(
            HEADER.pack(0, flags | (message.flags & AD if ad else 0), 1, message.answers, message.authorities, edns)[2:]
            for ad in (0, 1)
            for edns in (0, 1)
        )
        """Headers of replies without the id: without and with EDNS, and again both for clients that want AD."""
        self._opt = _OPTS[bits >= _DO_BIT]
        self.tails = (b"", b"")
        """The part of a reply behind the question, without and with EDNS, valid until `tails_until`."""

        self.tails_until = 0.0
        self.size = _OVERHEAD + len(key) + 3 * len(self.body) + 80 * len(self._ttls)
        self.size += _OF_TARGET * (len(self.targets) + len(self.bindings))

    def reply(self, query: Query, now: float) -> bytes:
        """Return the reply to a question, with the remaining TTLs."""
        if now >= self.tails_until:
            self.count_down(now)
        return self._begin(query) + self.tails[query.edns is not None]

    def _begin(self, query: Query) -> bytes:
        edns = query.edns
        wants_ad = query.flags & AD or (edns is not None and edns.do)  # RFC 6840 section 5.8
        return query.id.to_bytes(2, "big") + self.heads[(edns is not None) + (2 if wants_ad else 0)] + query.question

    def count_down(self, now: float) -> None:
        """Rewrite `tails` with the remaining TTLs, valid until the entry is a whole second older."""
        age = int(now - self.stored)
        body = self._with_ttls(lambda ttl_s: max(ttl_s - age, 0))
        self.tails = (body, body + self._opt)
        self.tails_until = self.stored + age + 1

    def stale_reply(self, query: Query, options: bytes) -> bytes:
        """Return the reply to a question after the entry's expiry (RFC 8767 section 4)."""
        opt = opt_record(do=query.edns.do, options=options) if query.edns is not None else b""
        return self._begin(query) + self._with_ttls(lambda _: STALE_TTL_S) + opt

    def _with_ttls(self, left: Callable[[int], int]) -> bytes:
        body = bytearray(self.body)
        for position, ttl_s in self._ttls:
            body[position : position + 4] = left(ttl_s).to_bytes(4, "big")
        return bytes(body)


# The headers, without id, of questions that the cache can answer: (bits of the key, whether there is an OPT, AD).
_SHAPES = {
    HEADER.pack(0, RD | bits, 1, 0, 0, edns)[2:]: (bits >> 4 & 1, edns, bool(bits & AD))
    for bits in (0, AD, CD, AD | CD)
    for edns in (False, True)
}


def key_of(query: Query, qtype: int | None = None) -> bytes | None:
    """Return the cache key of a question, or of the same question with another type; None: the answer must not be cached.

    CD and DO change the answer, so they are part of the key. Not cached: a question without RD, which asks for the server's own
    data, and one with more than OPT, which is forwarded unchanged.
    """
    if not query.flags & RD or query.qtype in _UNKEPT or query.verbatim:
        return None
    do = query.edns is not None and query.edns.do
    asked = query.question[-4:] if qtype is None else qtype.to_bytes(2, "big") + query.question[-2:]
    return query.name + asked + _SUFFIXES[query.flags >> 4 & 1 | (_DO_BIT if do else 0)]


def _of_any_type(key: bytes) -> bytes:
    """Return the key of the entry that says that a name does not exist."""
    return key[:-5] + _ANY_TYPE + key[-3:]


def answer_cached(data: bytes, entries: Mapping[bytes, Entry], now: float, most: int = MAX_UDP_REPLY) -> bytes | None:
    """Answer an ordinary question from one of these entries, in at most `most` bytes; None: parse it with `scan`.

    As in `reply.answer_prepared`, a name that is not well-formed is not in `entries`.
    """
    shape = _SHAPES.get(data[2:HEADER_SIZE])
    if shape is None:
        return None
    bits, edns, wants_ad = shape
    end = data.find(0, HEADER_SIZE) + 1
    stop = end + 4
    limit = MIN_UDP_REPLY
    if edns:
        if len(data) != stop + OPT_FIXED.size:
            return None
        root, rtype, size, _, version, flags, rdlength = OPT_FIXED.unpack_from(data, stop)
        if root or rtype != Qtype.OPT or version or rdlength:
            return None
        if flags >= DO:
            bits |= _DO_BIT
            wants_ad = True
        limit = min(max(size, MIN_UDP_REPLY), most)
    elif len(data) != stop:
        return None
    entry = entries.get(data[HEADER_SIZE:end].lower() + data[end:stop] + _SUFFIXES[bits])
    if entry is None or now >= entry.fresh_until:
        return None
    entry.uses += 1
    if now >= entry.tails_until:
        entry.count_down(now)
    whole = data[:2] + entry.heads[edns + 2 * wants_ad] + data[HEADER_SIZE:stop] + entry.tails[edns]
    return whole if len(whole) <= limit else None


class Cache:
    """Entries by question, bounded in bytes."""

    def __init__(self, config: CacheConfig) -> None:
        """Start with an empty cache."""
        self._config = config
        self._small: OrderedDict[bytes, Entry] = OrderedDict()
        self._main: OrderedDict[bytes, Entry] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        """Keys evicted without a second use, which go into the main queue if they come back."""
        self._small_size = 0
        self._leading: dict[bytes, set[bytes]] = {}
        """Keys of the entries whose aliases lead to a name, by that name."""
        self._types: set[bytes] = set()
        self._denies = False
        """There was an entry that says that a name does not exist; until then, such entries are not looked for."""

        self.hot: dict[bytes, Entry] = {}
        """Entries for `answer_cached`, until `cool`: the resolver has checked that these names are upstream's."""
        self.size = 0
        """Estimated bytes of all entries."""
        self.evicted = 0
        """Entries removed so far for lack of room."""

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def get(self, key: bytes) -> Entry | None:
        """Return the entry for a key, or the one that says that the name does not exist; it may have expired."""
        entry = self._main.get(key) or self._small.get(key)
        if entry is None and self._denies:
            absent = _of_any_type(key)
            entry = self._main.get(absent) or self._small.get(absent)
        return entry

    def put(self, key: bytes, message: Message, now: float) -> Entry | None:
        """Store an answer. Returns its entry, or None if it must not be cached. Raises Malformed."""
        ttl_s = self._lifetime_s(message, int.from_bytes(key[-5:-3], "big"))
        if not ttl_s or not self._config.max_bytes:
            return None
        if message.flags & 0xF == Rcode.NXDOMAIN:
            key = self._denied(key, message, now)
        elif self._denies:
            self._drop(_of_any_type(key))  # the name exists by now
        entry = Entry(key, message, ttl_s, now, self._config)
        if entry.size > self._config.max_bytes * _SMALL_SHARE:
            return None
        known = self._main.get(key)
        self._drop(key)
        if len(self._types) < _MAX_TYPES:
            self._types.add(key[-5:-3])
        if known is not None or key in self._ghosts:
            self._ghosts.pop(key, None)
            entry.uses = known.uses if known is not None else 0
            self._main[key] = entry
        else:
            self._small[key] = entry
            self._small_size += entry.size
        self.size += entry.size
        for target in entry.targets:
            self._leading.setdefault(target, set()).add(key)
        self._make_room()
        return entry

    def _denied(self, key: bytes, message: Message, now: float) -> bytes:
        """Return the key for an NXDOMAIN: for its type, or for all types once both address types have got one.

        By RFC 2308 section 5 one would be enough, but many servers answer so for a type that a name lacks.
        """
        other = _OTHER_ADDRESS.get(key[-5:-3])
        if other is None or message.targets:
            return key
        twin_key = key[:-5] + other + key[-3:]
        twin = self._main.get(twin_key) or self._small.get(twin_key)
        if twin is None or twin.rcode != Rcode.NXDOMAIN or twin.targets or now >= twin.expires:
            return key
        self._drop(key)
        self._drop(twin_key)
        self._denies = True
        return _of_any_type(key)

    def heat(self, key: bytes, entry: Entry) -> None:
        """Let `answer_cached` use this entry for this key."""
        if len(entry.hot) < _MAX_TYPES:
            self.hot[key] = entry
            if key not in entry.hot:
                entry.hot.append(key)

    def cool(self) -> None:
        """Let `answer_cached` use no entry."""
        self.hot = {}

    def reconfigure(self, config: CacheConfig) -> None:
        """Use other limits. Entries with a longer lifetime than a lowered limit allows are dropped."""
        before, self._config = self._config, config
        lowered = [
            cap
            for cap, old in (
                (config.max_ttl_s, before.max_ttl_s),
                (config.max_negative_ttl_s, before.max_negative_ttl_s),
            )
            if cap < old
        ]
        if lowered:
            longest = min(lowered)
            for queue in (self._small, self._main):
                for key in [key for key, entry in queue.items() if entry.expires - entry.stored > longest]:
                    self._drop(key)
        self._make_room()

    def clear(self) -> None:
        """Drop all entries."""
        for queue in (self._small, self._main):
            for key in list(queue):
                self._drop(key)

    def flush(self, names: Iterable[bytes]) -> None:
        """Drop all entries for these names, in wire form and lower case, and entries whose aliases lead to them."""
        names = frozenset(names)
        for name in names:
            for key in tuple(self._leading.get(name, ())):
                self._drop(key)
        if len(self._types) >= _MAX_TYPES:
            for key in [key for queue in (self._small, self._main) for key in queue if key[:-5] in names]:
                self._drop(key)
            return
        for name in names:
            for asked in self._types:
                for bits in range(len(_SUFFIXES)):
                    self._drop(name + asked + b"\0\1" + _SUFFIXES[bits])

    def may_be_stale(self, entry: Entry, now: float) -> bool:
        """Whether an entry may be used, even if it has expired."""
        return now < entry.expires + self._config.stale_for_s

    def _lifetime_s(self, message: Message, qtype: int) -> int:
        """Return for how many seconds to cache an answer; 0: not at all."""
        if message.flags & TC or message.rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
            return 0
        held = [place.ttl_s for place in message.places]
        if not held:
            return 0
        if message.rcode == Rcode.NOERROR and message.has_data(qtype):
            return min(*held, self._config.max_ttl_s)
        for place in message.places:
            if place.rtype == Qtype.SOA and place.section == Section.AUTHORITY and place.rclass == CLASS_IN:
                # RFC 2308 section 5: the lower of its TTL and MINIMUM, its last field behind two names and four numbers.
                name_at(message.data, place.start, place.stop)
                if place.stop - place.start < 22:
                    raise Malformed("a SOA is cut short")
                minimum_s = int.from_bytes(message.data[place.stop - 4 : place.stop], "big")
                return min(*held, minimum_s, self._config.max_negative_ttl_s)
        return 0  # without a SOA there is no lifetime for a negative answer

    def _drop(self, key: bytes) -> None:
        entry = self._small.pop(key, None)
        if entry is not None:
            self._small_size -= entry.size
        else:
            entry = self._main.pop(key, None)
        if entry is not None:
            self._gone(entry)

    def _gone(self, entry: Entry) -> None:
        self.size -= entry.size
        for key in entry.hot:
            self.hot.pop(key, None)
        for target in frozenset(entry.targets):  # a cyclic chain contains a name twice
            leading = self._leading[target]
            leading.discard(entry.key)
            if not leading:
                del self._leading[target]

    def _make_room(self) -> None:
        limit = self._config.max_bytes
        while self.size > limit:
            if self._small and (self._small_size > limit * _SMALL_SHARE or not self._main):
                self._let_go_small()
            else:
                self._let_go_main()

    def _let_go_small(self) -> None:
        key, entry = self._small.popitem(last=False)
        self._small_size -= entry.size
        if entry.uses > 0:
            entry.uses = 0
            self._main[key] = entry
            return
        self._gone(entry)
        self.evicted += 1
        self._ghosts[key] = None
        while len(self._ghosts) > len(self._main) + len(self._small):
            self._ghosts.popitem(last=False)

    def _let_go_main(self) -> None:
        key, entry = self._main.popitem(last=False)
        if entry.uses > 0:
            entry.uses = min(entry.uses, _MAX_COUNTED_USES) - 1
            self._main[key] = entry
            return
        self._gone(entry)
        self.evicted += 1
