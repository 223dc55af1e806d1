"""One question → our answer, or who else answers it.

A Table has the answers of one state of discovery, and they never change: a change of discovery makes a new table, which
replaces the old one between two packets. Answers are made on first use and kept, within bounds, so that a repeated question
costs one dict lookup.

Sans-IO; nothing here raises for what a peer sent.
"""

from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from random import randrange

from discovery.model.addresses import Address
from discovery.model.imports import Imports
from discovery.model.lookup import Unresolved, UnresolvedReason, resolve
from discovery.model.mesh import Mesh
from discovery.model.names import (
    AddressTarget,
    BadName,
    Form,
    NameReason,
    PlainName,
    ServiceTarget,
    decode,
    encode,
    normalise_domain,
)
from dnsgw.mesh_zone.local_zones import LocallyServedZones, reverse_zones
from dnsgw.mesh_zone.names_above import NamesAbove, above
from dnsgw.mesh_zone.srv_names import MAX_TARGETS, SrvName, parse_srv_name, target_name, targets
from dnsgw.mesh_zone.vip import address_of, reverse
from dnsgw.message.question import (
    HEADER_SIZE,
    OWNER,
    ExtendedError,
    Qtype,
    Query,
    Rcode,
    extended_error,
    record,
    wire_name,
)
from dnsgw.message.rdata import BadRdata, hinfo, soa, srv
from dnsgw.message.reply import Answer, answer_prepared
from dnsgw.two_generation_cache import TwoGenerationCache

MAX_ADDRESSES = 8  # in one answer: even 8 IPv6 addresses fit in 512 bytes under any name (musl before 1.2.4 has no TCP)
MAX_TURNS = 8  # orders of the records of an SRV answer, which may be long
MAX_PREPARED = 32768  # answers kept for names that exist, per generation; some 300 bytes each
MAX_PREPARED_ABSENT = 4096  # for names that do not exist; fewer, since clients can make up any number of them

_ANY_HINFO = "RFC8482"  # RFC 8482 section 4.2
_RESOLVER_ARPA = wire_name("resolver.arpa")
_LOCALHOST = wire_name("localhost")
_ABSENT_TOP_LEVEL = (wire_name("invalid"), wire_name("onion"))  # RFC 6761 section 6.4, RFC 7686 section 2
_WITHHELD = extended_error(ExtendedError.FORGED_ANSWER, "withheld: it leads round the relay to another network")


class Disposition(Enum):
    """What to do with a question that the table does not answer."""

    FORWARD = "forward"
    """Ask upstream."""

    LOCAL_FIRST = "local_first"
    """Ask upstream first; if upstream does not have the name, `Table.imported` answers."""

    NOT_READY = "not_ready"
    """The name is ours, but there is no state of discovery yet."""


class Table:
    """The answers of one state of discovery."""

    def __init__(
        self,
        mesh: Mesh | None,
        *,
        imports: Imports,
        network: str,
        domain: str,
        ttl_s: int,
        stale: Mesh | None = None,
        vips: IPv4Network | IPv6Network | None = None,
        absent: LocallyServedZones = LocallyServedZones(),  # noqa: B008 - it never changes
        names_above: NamesAbove | None = None,
    ) -> None:
        """Prepare the parts that answers share. Raises BadName for a bad domain.

        Args:
            mesh: the state of discovery; None: there is none yet.
            imports: plain names taken from other networks.
            network: the clients' network.
            domain: the mesh domain.
            ttl_s: TTL of all answers.
            stale: an earlier mesh whose relays are answered, since `mesh` has none.
            vips: range of the virtual addresses of imported services.
            absent: names that are not forwarded, unless they are imported.
            names_above: kept from one table to the next; None: a new one.
        """
        self._mesh = mesh
        self._imports = imports
        self._network = network
        self._domain = normalise_domain(domain)
        self._zone = wire_name(self._domain)
        self._suffixes = (self._zone, _LOCALHOST, _RESOLVER_ARPA, *_ABSENT_TOP_LEVEL)
        self._ttl_s = ttl_s
        self._soa = soa(self._domain, mesh.revision if mesh else 0, ttl_s)
        self._present: TwoGenerationCache[Answer] = TwoGenerationCache(MAX_PREPARED)
        self._absent: TwoGenerationCache[Answer] = TwoGenerationCache(MAX_PREPARED_ABSENT)
        self._nodata: dict[int, Answer] = {}
        self._any = Answer(tails=(record(OWNER, Qtype.HINFO, ttl_s, hinfo(_ANY_HINFO)),), answers=1)
        self._refused = Answer(Rcode.REFUSED, authoritative=False)
        self.withheld = Answer(tails=(self._soa_record(0),), authorities=1, authoritative=False, options=_WITHHELD)
        """NODATA in place of an answer from upstream that would bypass the relays."""
        addresses, self._port = _relays(stale or mesh, network)
        self._options = extended_error(ExtendedError.STALE_ANSWER, "no relay is alive") if stale else b""
        self._find_absent = absent.find
        self._vips = vips
        self._vip_zones = tuple(map(wire_name, reverse_zones(vips))) if vips is not None else ()
        self._vip_names: dict[bytes, str] | None = None
        self._names_above = names_above or NamesAbove()
        self._above_zones = frozenset(name for zone in (self._zone, *self._vip_zones) for name in above(zone))
        self._a = self._address_answer(Qtype.A, [a for a in addresses if isinstance(a, IPv4Address)])
        self._aaaa = self._address_answer(Qtype.AAAA, [a for a in addresses if isinstance(a, IPv6Address)])
        self._no_relay = None if addresses else _failure(f"no relay of network {network} is alive")
        self._reverse = frozenset(wire_name(address.reverse_pointer) for address in addresses)
        self._localhost: dict[int, Answer | None] = {
            Qtype.A: self._address_answer(Qtype.A, [IPv4Address("127.0.0.1")]),
            Qtype.AAAA: self._address_answer(Qtype.AAAA, [IPv6Address("::1")]),
        }

    def answer_at_once(self, data: bytes) -> bytes | None:
        """Answer an ordinary question whose answer is prepared; None: parse it and call `decide`."""
        return answer_prepared(data, self._present.young)

    def decide(self, query: Query) -> Answer | Disposition:
        """Return the answer to a question, or what else to do with it."""
        key = query.key
        answer = self._present.get(key) or self._absent.get(key)
        if answer is not None:
            return answer
        decision = self._decide(query)
        if isinstance(decision, Answer):
            (self._absent if decision.rcode == Rcode.NXDOMAIN else self._present)[key] = decision
        return decision

    def is_above(self, name: bytes) -> bool:
        """Whether a name of ours is below this one, in wire form and lower case: then it exists (RFC 8020)."""
        if name in self._above_zones:
            return True
        return (
            bool(self._imports)
            and self._mesh is not None
            and self._names_above.contains(name, self._mesh, self._imports)
        )

    def imported(self, query: Query) -> Answer | Disposition:
        """Return the answer for an imported name that upstream does not have. FORWARD: it is no longer imported."""
        text = query.text()
        if text is None:
            return Disposition.FORWARD
        if self._mesh is None:
            return Disposition.NOT_READY
        if (below := parse_srv_name(text)) is not None:
            return self._below_service(query, below)
        try:
            resolve(PlainName(text), self._mesh, self._imports, self._domain)
        except Unresolved:
            return Disposition.FORWARD
        return self._existing(query, 0, PlainName(text))

    def _decide(self, query: Query) -> Answer | Disposition:
        if query.qtype in (Qtype.AXFR, Qtype.IXFR):
            return self._refused  # our zone has no transfers, and a forwarder cannot relay a reply of many messages
        if query.name.endswith(self._suffixes):
            if (zone := _position(query, self._zone)) is not None:
                return self._under_domain(query, zone)
            if (special := self._special(query)) is not None:
                return special
        if query.qtype == Qtype.PTR and query.name in self._reverse:
            return self._no_data(0)  # a relay's name would say nothing about the service behind it
        if self._vip_zones and query.name.endswith(self._vip_zones):
            for name in self._vip_zones:
                if (zone := _position(query, name)) is not None:
                    return self._pointer(query, zone)
        decision = self._plain(query)
        if decision is Disposition.FORWARD and (found := self._find_absent(query)) is not None:
            if found.empty or self.is_above(query.name):
                return self._no_data(found.zone)
            return self._no_name(found.zone, "a name that is not asked for")
        return decision

    def _special(self, query: Query) -> Answer | None:
        if _position(query, _LOCALHOST) is not None:  # RFC 6761 section 6.3
            return self._localhost.get(query.qtype) or self._no_data(0)
        for top in _ABSENT_TOP_LEVEL:
            if (position := _position(query, top)) is not None:
                return self._no_name(position, "a name that never exists in DNS (RFC 6761, RFC 7686)")
        if _position(query, _RESOLVER_ARPA) is not None:
            # RFC 9462 section 6.4. If it were forwarded, clients would learn upstream's encrypted resolvers and bypass us.
            return self._no_data(0)
        return None

    def _plain(self, query: Query) -> Answer | Disposition:
        if not self._imports or (text := query.text()) is None:
            return Disposition.FORWARD
        below = parse_srv_name(text)
        rule = self._imports.rule_for(text if below is None else below.service.name)
        if rule is None:
            return Disposition.FORWARD
        if rule.prefer == "local":
            found = self.imported(query)
            return Disposition.FORWARD if found is Disposition.FORWARD else Disposition.LOCAL_FIRST
        return self.imported(query)

    def _under_domain(self, query: Query, zone: int) -> Answer | Disposition:
        mesh = self._mesh
        if mesh is None:
            return Disposition.NOT_READY
        if zone == 0:
            return self._apex(query)
        text = query.text()
        if text is None:
            return self._no_name(zone, f"{NameReason.BAD_CHARACTER}: a label holds a dot")
        try:
            target = decode(text, self._domain)
        except BadName as error:
            if error.reason is not NameReason.INCOMPLETE:
                return self._no_name(zone, str(error))
            network = text.removesuffix("." + self._domain).rpartition(".")[2].removeprefix("_")
            if network == self._network or network in mesh.networks:
                return self._no_data(zone)  # there are valid names below it (RFC 8020)
            return self._no_name(zone, f"{UnresolvedReason.UNKNOWN_NETWORK}: discovery knows no network {network!r}")
        try:
            resolve(target, mesh, self._imports, self._domain)
        except Unresolved as error:
            # Our own network is known even if no record names it.
            if not (isinstance(target, AddressTarget) and target.network == self._network):
                return self._no_name(zone, str(error))
        return self._existing(query, zone, target)

    def _apex(self, query: Query) -> Answer:
        if query.qtype == Qtype.SOA:
            return Answer(tails=(record(OWNER, Qtype.SOA, self._ttl_s, self._soa),), answers=1)
        return self._any if query.qtype == Qtype.ANY else self._no_data(0)

    def _existing(self, query: Query, zone: int, target: AddressTarget | ServiceTarget | PlainName) -> Answer:
        """Answer for a name that exists. Types without records are NODATA: musl takes anything else as a failure."""
        if self._vips is not None and isinstance(target, PlainName) and query.qtype in (Qtype.A, Qtype.AAAA):
            vip = self._vip(query.qtype, target.name)
            if vip is not None:
                return vip
        match query.qtype:
            case Qtype.A:
                return self._no_relay or self._a or self._no_data(zone)
            case Qtype.AAAA:
                return self._no_relay or self._aaaa or self._no_data(zone)
            case Qtype.SRV:
                return self._no_relay or self._srv(target) or self._no_data(zone)
            case Qtype.ANY:
                return self._any
            case _:
                return self._no_data(zone)  # also HTTPS and SVCB: address hints in them would bypass the relay

    def _below_service(self, query: Query, below: SrvName) -> Answer | Disposition:
        """Answer for a name such as _https._tcp.orders.shop.example. FORWARD: the service is not imported.

        Of a service for which upstream has precedence, ports that it does not have are upstream's as well.
        """
        assert self._mesh is not None
        try:
            found = resolve(below.service, self._mesh, self._imports, self._domain)
        except Unresolved:
            return Disposition.FORWARD
        if not below.port:
            return self._no_data(0)  # there are names below it (RFC 8020)
        records: list[bytes] = []
        exists = False
        for priority, target in targets(found, below.port, self._mesh):
            exists = True
            name = target_name(target, self._domain)
            if name is not None and self._port is not None and len(records) < MAX_TARGETS:
                records.append(record(OWNER, Qtype.SRV, self._ttl_s, srv(name, self._port, priority)))
        if not exists:
            if found.rule is not None and found.rule.prefer == "local":
                return Disposition.FORWARD
            return self._no_name(query.labels[below.labels], f"the service has no port {below.port!r}")
        if query.qtype == Qtype.ANY:
            return self._any
        if query.qtype != Qtype.SRV:
            return self._no_data(0)
        return self._no_relay or (Answer(tails=_turns(records), answers=len(records)) if records else self._no_data(0))

    def _vip(self, qtype: int, name: str) -> Answer | None:
        """Answer with the service's virtual address, NODATA for the other family; None: it has none yet, so use the relays'."""
        assert self._vips is not None
        assert self._mesh is not None
        address = address_of(name, self._mesh, self._network, self._vips)
        if address is None:
            return None
        if self._no_relay is not None:
            return self._no_relay
        if (address.version == 4) != (qtype == Qtype.A):
            return self._no_data(0)
        rdata = record(OWNER, qtype, self._ttl_s, address.packed)
        return Answer(tails=(rdata,), answers=1, options=self._options)

    def _pointer(self, query: Query, zone: int) -> Answer:
        """Answer a question about the reverse zone of the virtual addresses, which is all ours."""
        assert self._vips is not None
        if self._vip_names is None:
            records = self._mesh.vips(self._network) if self._mesh else ()
            self._vip_names = {wire_name(text): name for text, name in reverse(records).items()}
        name = self._vip_names.get(query.name)
        if name is None:
            whole = len(query.labels) >= len(self._vips[0].reverse_pointer.split("."))
            return self._no_name(zone, "no service has this address") if whole else self._no_data(zone)
        if query.qtype != Qtype.PTR:
            return self._no_data(zone)
        return Answer(tails=(record(OWNER, Qtype.PTR, self._ttl_s, wire_name(name)),), answers=1)

    def _srv(self, target: AddressTarget | ServiceTarget | PlainName) -> Answer | None:
        """SRV to the compact name and the relays' port; None if the relays share no port, or there is no such name."""
        if self._port is None or self._mesh is None:
            return None
        try:
            if isinstance(target, PlainName):
                found = resolve(target, self._mesh, self._imports, self._domain, local_port=self._port)
                target = found.candidates[0].target
            try:
                name = encode(target, self._domain, Form.COMPACT)
            except BadName:
                name = encode(target, self._domain, Form.MANGLED)
            rdata = srv(name, self._port)
        except (Unresolved, BadName, BadRdata):
            return None
        return Answer(tails=(record(OWNER, Qtype.SRV, self._ttl_s, rdata),), answers=1)

    def _address_answer(self, rtype: Qtype, addresses: list[IPv4Address] | list[IPv6Address]) -> Answer | None:
        """Prepare all rotations of the addresses. The first is random, since many resolvers may share the clients."""
        if not addresses:
            return None
        records = [record(OWNER, rtype, self._ttl_s, address.packed) for address in addresses]
        begin = randrange(len(records))
        most = min(MAX_ADDRESSES, len(records))
        ring = (records[begin:] + records[:begin]) * 2
        tails = [b"".join(ring[turn : turn + most]) for turn in range(len(records))]
        return Answer(tails=tails, answers=most, options=self._options)

    def _no_data(self, zone: int) -> Answer:
        answer = self._nodata.get(zone)
        if answer is None:
            answer = self._nodata[zone] = Answer(tails=(self._soa_record(zone),), authorities=1)
        return answer

    def _no_name(self, zone: int, why: str) -> Answer:
        return Answer(
            Rcode.NXDOMAIN, (self._soa_record(zone),), authorities=1, options=extended_error(ExtendedError.OTHER, why)
        )

    def _soa_record(self, zone: int) -> bytes:
        """SOA for negative caching (RFC 2308); its owner is the part of the question's name that begins at `zone`."""
        owner = (0xC000 | (HEADER_SIZE + zone)).to_bytes(2, "big")
        return record(owner, Qtype.SOA, self._ttl_s, self._soa)


def _turns(records: list[bytes]) -> list[bytes]:
    """Return the records in several orders, since some clients only use the first."""
    begin = randrange(len(records))
    ring = (records[begin:] + records[:begin]) * 2
    return [b"".join(ring[turn : turn + len(records)]) for turn in range(min(len(records), MAX_TURNS))]


NOT_READY = Answer(
    Rcode.SERVFAIL,
    authoritative=False,
    options=extended_error(ExtendedError.NOT_READY, "discovery was not heard from since the start"),
)
"""The answer to questions about our names as long as there is no state of discovery."""


def _failure(why: str) -> Answer:
    return Answer(Rcode.SERVFAIL, authoritative=False, options=extended_error(ExtendedError.NOT_READY, why))


def _position(query: Query, suffix: bytes) -> int | None:
    """Return the offset of `suffix` in the question's name if it is that name or below it, compared label by label; else None."""
    position = len(query.name) - len(suffix)
    return position if query.name.endswith(suffix) and position in query.labels else None


def _relays(mesh: Mesh | None, network: str) -> tuple[list[Address], int | None]:
    """Return the addresses of this network's relays in a stable order, and the first port that all of them have."""
    addresses: dict[Address, None] = {}
    ports: list[int] | None = None
    for relay in mesh.relays(network) if mesh else ():
        for text in relay.spec.addresses:
            try:
                addresses[ip_address(text)] = None
            except ValueError:
                continue  # cannot be: discovery and the static mesh file check their records
        ports = relay.spec.ports if ports is None else [port for port in ports if port in relay.spec.ports]
    return list(addresses), ports[0] if ports else None
