"""Parses upstream's replies: where their records are, which names they lead to, and how to write them out again.

One walk over the records finds everything. Names are decompressed only where they are needed.

Records that do not belong to the question are dropped, as if they had not been sent (RFC 2181 section 5.4.1, RFC 5452 section 6):
answers whose owner is neither the name asked for nor a target of its aliases, or whose type is another; in the authority section,
all but records of zones that contain one of these names, and proofs of non-existence; in the additional section, all but OPT.

Sans-IO. The only error is Malformed.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from dnsgw.message.names import POINTER, Malformed, enclosing, name_at, skip_name
from dnsgw.message.question import (
    AD,
    CD,
    CLASS_IN,
    HEADER,
    HEADER_SIZE,
    MAX_TCP_REPLY,
    OWNER,
    QR,
    RA,
    RD,
    TC,
    Qtype,
    Query,
    Rcode,
    opt_record,
    option,
    record,
)

MAX_CHAIN = 16  # aliases that are followed; unbound follows 11, BIND 16
MAX_OWNERS = 64  # owner names in one message besides the name asked for: a chain, a zone, some proofs

_FIXED = struct.Struct("!HHIH")  # type, class, TTL, RDLENGTH
_TTL = struct.Struct("!I")
_OPTION = struct.Struct("!HH")
_EXTENDED_ERROR = 15  # the option (RFC 8914)

# Plain numbers for the walk, where a member of an enumeration would be looked up for every record.
_CNAME, _OPT, _SVCB, _HTTPS = int(Qtype.CNAME), int(Qtype.OPT), int(Qtype.SVCB), int(Qtype.HTTPS)

_ZONES = frozenset({Qtype.NS, Qtype.SOA, Qtype.DS})  # of a zone that the name is in, or of its parent
_PROOFS = frozenset({Qtype.RRSIG, Qtype.NSEC, Qtype.NSEC3})  # validators check what they prove
_WITH_ALL = frozenset({Qtype.CNAME, Qtype.DNAME, Qtype.RRSIG})  # may accompany answers of any type
_DNAME_COVERED = Qtype.DNAME.to_bytes(2, "big")

# Types whose data is a name that may be compressed, or ends in one after this many bytes (RFC 3597 section 4).
_ONE_NAME = frozenset(
    {
        *(Qtype.NS, Qtype.MD, Qtype.MF, Qtype.CNAME, Qtype.MB, Qtype.MG, Qtype.MR, Qtype.PTR),
        Qtype.DNAME,
    }
)
_NAME_BEHIND: dict[int, int] = {Qtype.MX: 2, Qtype.AFSDB: 2, Qtype.RT: 2, Qtype.SRV: 6, Qtype.KX: 2}
_TTL_SIGN = 0x80000000
_UPSTREAMS = TC | 0xF  # header flags that are passed on
_UPSTREAMS_WITH_AD = _UPSTREAMS | AD

# Results of the walk, as bits of one number: a named tuple of flags would cost 5 % of the walk.
_ODD = 1  # a record may not belong to the question
_ALIASED = 2
_BOUND = 4  # there is a service binding
_UNEVEN = 8  # answers have different TTLs


def flags_to_client(flags: int, query: Query) -> int:
    """Return the header flags of a reply that passes on an upstream's, which had `flags`.

    To clients we are a recursive resolver, whatever upstream is: RA always, never AA (RFC 1035 section 4.1.1), RD and CD as the
    client set them (RFC 4035 section 3.2.2), and the reserved bit clear. TC and the response code are upstream's, and so is AD,
    for clients that ask for it (RFC 6840 section 5.8).
    """
    wants_ad = query.flags & AD or (query.edns is not None and query.edns.do)
    return QR | RA | query.flags & (RD | CD) | flags & (_UPSTREAMS_WITH_AD if wants_ad else _UPSTREAMS)


class Section:
    """Sections of a message. Plain numbers: an enumeration would cost more than the rest of the walk."""

    ANSWER: Final = 0
    AUTHORITY: Final = 1
    ADDITIONAL: Final = 2


class Place(NamedTuple):
    """Where one record is in its message."""

    section: int
    owner: int
    rtype: int
    rclass: int
    fixed: int
    """Where its type begins, behind the owner; the TTL is 4 bytes further."""

    ttl_s: int
    start: int
    """Where its data begins."""

    stop: int
    """Where its data ends."""


class Message:
    """A parsed reply. Raises Malformed."""

    __slots__ = (
        "_names",
        "answers",
        "authorities",
        "bindings",
        "body",
        "data",
        "flags",
        "opt",
        "places",
        "qtype",
        "question",
        "records_stop",
        "targets",
    )

    def __init__(self, data: bytes) -> None:
        """Find all records. A truncated reply (TC) must still contain the records that it counts."""
        found = self._walk(data)
        self.targets = self._targets() if found & _ALIASED else ()
        """The targets of the alias chain from the name asked for, in order, in lower case."""
        if found & _ODD:
            kept = self._belonging()
            if len(kept) != len(self.places) or self._repeats_question():
                found = self._walk(self._with_only(kept)) | found & _BOUND
        if found & _UNEVEN:
            self._even_out()
        self.bindings = self._bindings() if found & _BOUND else ()
        """Targets of ServiceMode bindings (RFC 9460), which may carry addresses and transports of their own, in lower case."""

    def _walk(self, data: bytes) -> int:  # noqa: C901 - a hot path, measured
        """Find all records. One function, since a call for each record would cost more than the walk."""
        self.data = data
        self._names: dict[int, bytes] = {}
        found = 0
        lives_s = -1
        try:
            _, self.flags, questions, self.answers, self.authorities, extras = HEADER.unpack_from(data)
            position = HEADER_SIZE
            if questions:
                position = skip_name(data, position) + 4
            self.body = position
            """Where the records begin."""
            self.question = data[HEADER_SIZE:position]
            self.qtype = int.from_bytes(self.question[-4:-2], "big")
            qtype = self.qtype
            self.places: list[Place] = []
            self.opt: Place | None = None
            self.records_stop = position
            """Where the answer and authority sections end."""
            size = len(data)
            section = 0
            for count in (self.answers, self.authorities, extras):
                for _ in range(count):
                    owner = position
                    # Usually the owner is a pointer to the name asked for.
                    if data[position] == POINTER and data[position + 1] == HEADER_SIZE:
                        fixed = position + 2
                    else:
                        fixed = skip_name(data, position)
                        found |= _ODD
                    rtype, rclass, ttl_s, length = _FIXED.unpack_from(data, fixed)
                    start = fixed + 10
                    position = start + length
                    if position > size:
                        raise Malformed("a record extends beyond the end")
                    if section == 2:  # Section.ADDITIONAL
                        if rtype == _OPT and self.opt is None:
                            self.opt = Place(section, owner, rtype, rclass, fixed, ttl_s, start, position)
                        continue
                    if ttl_s & _TTL_SIGN:
                        ttl_s = 0  # RFC 2181 section 8
                    self.places.append(Place(section, owner, rtype, rclass, fixed, ttl_s, start, position))
                    if not section and ttl_s != lives_s:
                        if lives_s >= 0:
                            found |= _UNEVEN
                        lives_s = ttl_s
                    if rtype == _CNAME:
                        found |= _ALIASED
                    elif rtype != qtype or section or rclass != CLASS_IN:
                        found |= _ODD
                    if _SVCB <= rtype <= _HTTPS:
                        found |= _BOUND
                if section == 1:
                    self.records_stop = position
                section += 1
        except (IndexError, struct.error) as error:
            raise Malformed("a record is cut short") from error
        return found

    def _even_out(self) -> None:
        """Set the TTLs of each record set to the lowest of them (RFC 2181 section 5.2)."""
        least: dict[tuple[bytes, int, bytes], int] = {}
        sets = []
        for place in self.places[: self.answers]:
            covered = self.data[place.start : place.start + 2] if place.rtype == Qtype.RRSIG else b""
            sets.append((self._owner(place), place.rtype, covered))
            least[sets[-1]] = min(place.ttl_s, least.get(sets[-1], place.ttl_s))
        longer = [index for index, records in enumerate(sets) if self.places[index].ttl_s > least[records]]
        if not longer:
            return  # different sets, such as an alias and its target
        data = bytearray(self.data)
        for index in longer:
            place = self.places[index] = self.places[index]._replace(ttl_s=least[sets[index]])
            _TTL.pack_into(data, place.fixed + 4, place.ttl_s)
        self.data = bytes(data)

    def _owner(self, place: Place) -> bytes:
        """Return a record's owner in lower case. Raises Malformed, also for more than MAX_OWNERS names."""
        position = place.owner
        if self.data[position] >= POINTER:
            position = (self.data[position] & 0x3F) << 8 | self.data[position + 1]
        name = self._names.get(position)
        if name is None:
            if len(self._names) >= MAX_OWNERS:
                raise Malformed("records of too many names")
            name = self._names[position] = name_at(self.data, place.owner).lower()
        return name

    def _belonging(self) -> list[Place]:
        """Return the records that belong to the question. Raises Malformed if there are answers but none of them does."""
        names = {self.question[:-4].lower(), *self.targets}
        zones: set[bytes] = set()
        if len(self.places) > self.answers or any(place.rtype == Qtype.DNAME for place in self.places):
            for name in names:
                zones.update(enclosing(name))
        kept = []
        for place in self.places:
            rtype = place.rtype
            if place.rclass != CLASS_IN:
                continue
            if place.section == Section.AUTHORITY:
                if rtype in _PROOFS or (rtype in _ZONES and self._owner(place) in zones):
                    kept.append(place)
            elif self._owner(place) in names:
                if rtype == self.qtype or rtype in _WITH_ALL or self.qtype == Qtype.ANY:
                    kept.append(place)
            # A DNAME of a zone that contains the name; the CNAME made of it comes with it (RFC 6672).
            elif self._owner(place) in zones and (rtype == Qtype.DNAME or self._covers_dname(place)):
                kept.append(place)
        if self.answers and (not kept or kept[0].section != Section.ANSWER):
            raise Malformed("no answer belongs to the question")
        return kept

    def _repeats_question(self) -> bool:
        """Whether an owner repeats the name asked for in full; its spelling would not be that of every client."""
        name = self.question[:-4].lower()
        return len(name) > 1 and any(
            self.data[place.owner] < POINTER and self._owner(place) == name for place in self.places
        )

    def _covers_dname(self, place: Place) -> bool:
        return place.rtype == Qtype.RRSIG and self.data[place.start : place.start + 2] == _DNAME_COVERED

    def _with_only(self, kept: list[Place]) -> bytes:
        """Write the message with these records only; the name asked for becomes a pointer to it. Raises Malformed."""
        parts = [self.question]
        left = MAX_TCP_REPLY - HEADER_SIZE - len(self.question)
        name = self.question[:-4].lower()
        for place in kept:
            whole = self.standalone(place)
            parts.append(OWNER + whole[len(name) :] if whole.lower().startswith(name) else whole)
            left -= len(parts[-1])
            if left < 0:
                raise Malformed("too long without compression")
        answers = sum(place.section == Section.ANSWER for place in kept)
        if self.opt is not None:
            parts.append(self.data[self.opt.owner : self.opt.stop])
        head = HEADER.pack(0, self.flags, 1, answers, len(kept) - answers, self.opt is not None)
        return head + b"".join(parts)

    @property
    def rcode(self) -> int:
        """The full response code, with its upper bits from OPT."""
        upper = self.opt.ttl_s >> 24 if self.opt else 0
        return upper << 4 | int(self.flags & 0xF)

    @property
    def extended_errors(self) -> bytes:
        """The extended errors in its OPT, as encoded options for another OPT. Raises Malformed."""
        if self.opt is None or self.opt.start == self.opt.stop:
            return b""
        kept = []
        position = self.opt.start
        try:
            while position < self.opt.stop:
                code, size = _OPTION.unpack_from(self.data, position)
                position += _OPTION.size + size
                if code == _EXTENDED_ERROR and position <= self.opt.stop:
                    kept.append(option(code, self.data[position - size : position]))
        except struct.error as error:
            raise Malformed("an option is cut short") from error
        return b"".join(kept)

    def _targets(self) -> tuple[bytes, ...]:
        aliases: dict[bytes, Place] = {}
        for place in self.places:
            if place.rtype == _CNAME and place.section == Section.ANSWER and place.rclass == CLASS_IN:
                aliases.setdefault(self._owner(place), place)
        found: list[bytes] = []
        name = self.question[:-4].lower()
        while name in aliases:
            if len(found) >= MAX_CHAIN:
                raise Malformed("the chain has too many aliases")
            place = aliases.pop(name)
            name = name_at(self.data, place.start, place.stop).lower()
            found.append(name)
        return tuple(found)

    def _bindings(self) -> tuple[bytes, ...]:
        found: dict[bytes, None] = {}
        for place in self.places:
            if place.section == Section.ANSWER and place.rtype in (Qtype.SVCB, Qtype.HTTPS):
                target = name_at(self.data, place.start + 2, place.stop)
                # Priority 0 is AliasMode: its parameters are ignored, and clients that follow it ask for the target.
                if target != b"\0" and any(self.data[place.start : place.start + 2]):
                    found[target.lower()] = None
        return tuple(found)

    def as_reply(self, query: Query, options: bytes = b"") -> bytes:
        """Write it as the reply to this question: with the client's id and spelling, and our own OPT if the client sent one.

        OPT concerns one hop (RFC 6891 section 6.1.1), so only extended errors are passed on, followed by `options`.
        Raises Malformed.
        """
        flags = flags_to_client(self.flags, query)
        rcode = self.rcode
        if rcode > 0xF and query.edns is None:
            flags = flags & ~0xF | Rcode.SERVFAIL
        head = HEADER.pack(query.id, flags, 1, self.answers, self.authorities, query.edns is not None)
        whole = head + query.question + self.data[self.body : self.records_stop]
        if query.edns is not None:
            whole += opt_record(do=query.edns.do, rcode=rcode, options=self.extended_errors + options)
        return whole

    def has_data(self, qtype: int) -> bool:
        """Whether the answer section has a record of this type; for ANY: any record except CNAME."""
        return any(
            place.section == Section.ANSWER and (place.rtype == qtype or (qtype == Qtype.ANY and place.rtype != _CNAME))
            for place in self.places
        )

    def aliases(self, count: int) -> Iterator[bytes]:
        """Yield the first `count` aliases of the chain as uncompressed records. Raises Malformed."""
        wanted = {self.question[:-4].lower(), *self.targets[: count - 1]}
        chain = [self.question[:-4].lower(), *self.targets]
        found = {}
        for place in self.places:
            if place.rtype == _CNAME and place.section == Section.ANSWER:
                owner = name_at(self.data, place.owner).lower()
                if owner in wanted:
                    found[owner] = self.standalone(place)
        for name in chain[:count]:
            if name in found:
                yield found[name]

    def standalone(self, place: Place) -> bytes:
        """Return one record without compression. Raises Malformed."""
        data = self.data
        owner = name_at(data, place.owner)
        match place.rtype:
            case rtype if rtype in _ONE_NAME:
                rdata = name_at(data, place.start, place.stop)
            case Qtype.SOA:
                first = name_at(data, place.start, place.stop)
                second_at = skip_name(data, place.start)
                second = name_at(data, second_at, place.stop)
                rdata = first + second + data[skip_name(data, second_at) : place.stop]
            case rtype if rtype in _NAME_BEHIND:
                name_start = place.start + _NAME_BEHIND[rtype]
                rdata = data[place.start : name_start] + name_at(data, name_start, place.stop)
            case _:
                rdata = data[place.start : place.stop]  # RFC 3597 section 4: not compressed in newer types
        return record(owner, place.rtype, place.ttl_s, rdata)
