"""Finds all names of what a stream reaches; rules are applied to these (`rules`).

A service has its own name and, under the mesh domain, a compact and a mangled name for each of its ports, also with fewer labels.
If its endpoints are known, which they are in its own network, their address names lead to it too. An address that was an endpoint
within the last ten minutes still counts for deny rules: the service may still listen there after its record is gone.

Sans-IO: the view of discovery and the time are passed in.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from discovery.model.addresses import Address, BadAddress, parse_endpoint, spellings
from discovery.model.mesh import Mesh, Record, ServiceSpec
from discovery.model.names import AddressTarget, ServiceTarget, beginnings, is_under, names_of
from sniproxy.access.rules import Alias, Flow, NameKind

RECENT_S = 600.0
"""How long an address counts for a service after its record has lost it: longer than a rollout, and than most clients cache it."""

MAX_RECENT = 65_536
"""Former endpoints that are remembered; the oldest are forgotten first. No network changes so many within ten minutes."""

MAX_NAMED = 1024
"""Targets whose names are cached."""

Endpoint = tuple[Address, int]


class Owner(NamedTuple):
    """A service and one of its ports, as in its record."""

    service: str
    port: int


class Reach:
    """Knows what names and addresses lead to. Only endpoints in `network` itself are considered.

    At most `max_recent` former endpoints are remembered, and the names of at most `max_named` targets.
    """

    def __init__(self, network: str, domain: str, *, max_recent: int = MAX_RECENT, max_named: int = MAX_NAMED) -> None:
        self._network = network
        self._domain = domain
        self._max_recent = max_recent
        self._max_named = max_named
        self._mesh = Mesh.EMPTY
        self._services: tuple[Record[ServiceSpec], ...] = ()
        self._records: dict[str, Record[ServiceSpec]] = {}
        self._owners: dict[Endpoint, dict[Owner, int]] = {}  # with the number of entries in records
        self._recent: OrderedDict[tuple[Endpoint, Owner], float] = (
            OrderedDict()
        )  # with the time of expiry, the oldest first
        self._former: dict[Endpoint, set[Owner]] = {}
        self._endpoints: dict[Owner, tuple[Endpoint, ...]] = {}
        self._called: dict[tuple[str, Owner], frozenset[str]] = {}
        self._aliases_of: dict[Endpoint, tuple[Alias, ...]] = {}

    def follow(self, mesh: Mesh, now: float) -> None:
        """Use this view from now on. Cheap if it is the same view as before, otherwise proportional to what has changed.

        Args:
            mesh: the view of discovery.
            now: seconds of a clock that never goes back.
        """
        while self._recent and next(iter(self._recent.values())) <= now:
            self._forget_oldest()
        if mesh is self._mesh:
            return
        self._mesh = mesh
        self._called.clear()
        services = mesh.services(self._network)
        if services is self._services:
            return
        self._services = services
        self._endpoints.clear()
        self._aliases_of.clear()
        before, self._records = self._records, {record.id: record for record in services}
        for record_id in before.keys() | self._records.keys():
            old, new = before.get(record_id), self._records.get(record_id)
            if old is not new:
                had, has = set(_entries(old)), set(_entries(new))
                for owner, text in has - had:
                    self._add(owner, text)
                for owner, text in had - has:
                    self._remove(owner, text, now + RECENT_S)

    def endpoints(self, service: str, port: int) -> tuple[Endpoint, ...]:
        """Return the endpoints of a service of the own network, in the order of its record."""
        owner = Owner(service, port)
        found = self._endpoints.get(owner)
        if found is None:
            record = self._mesh.service(self._network, service)
            texts = () if record is None else record.spec.ports.get(str(port), ())
            # Records are checked when they are written; anything invalid is no endpoint.
            found = tuple(endpoint for text in texts if (endpoint := _endpoint(text)) is not None)
            if len(self._endpoints) >= self._max_named:
                self._endpoints.clear()
            self._endpoints[owner] = found
        return found

    def owners(self, address: Address, port: int) -> set[Owner]:
        """Return the services of the own network that have this endpoint, or had it within RECENT_S."""
        found: set[Owner] = set()
        for spelling in spellings(address):
            found.update(self._owners.get((spelling, port), ()), self._former.get((spelling, port), ()))
        return found

    def flow(
        self,
        target: AddressTarget | ServiceTarget,
        *,
        name: str,
        client: Address,
        from_network: str | None,
        address: Address | None,
        port: int,
        is_plain: bool = True,
    ) -> Flow:
        """Return the flow that rules are applied to, by the view that was followed last.

        Args:
            target: what the client asked for, a service by its full name.
            name: the name by which the client asked.
            client: the client's address.
            from_network: the network that the stream comes from, as in `Flow`.
            address: what will be dialled, together with `port`; None if it is not known.
            port: see `address`.
            is_plain: whether the service's own name means this service, and not one of another network.
        """
        called = frozenset([name])
        aliases = [Alias(frozenset([target]), frozenset([target.port, port]))]
        if isinstance(target, ServiceTarget):
            kind = NameKind.SERVICE
            called |= self._names_of_one(target)
            if is_plain and not is_under(target.service, self._domain):
                called |= {target.service}
        else:
            kind = NameKind.ADDRESS
            called |= frozenset(names_of(target, self._domain))
        if address is not None and target.network == self._network:
            aliases += self._aliases(address, port)
            if isinstance(target, ServiceTarget) and (address, port) not in self.endpoints(target.service, target.port):
                called = frozenset()
        return Flow(
            client=client,
            from_network=from_network,
            network=target.network,
            kind=kind,
            called=called,
            aliases=tuple(aliases),
            domain=self._domain,
            address=address,
            port=port,
            asked_port=target.port,
        )

    def _aliases(self, address: Address, port: int) -> tuple[Alias, ...]:
        """Return everything that an address of the own network is: one alias for each port of the services that have it."""
        found = self._aliases_of.get((address, port))
        if found is None:
            by_port: dict[int, set[AddressTarget | ServiceTarget]] = {}
            for spelling in spellings(address):
                by_port.setdefault(port, set()).add(AddressTarget(self._network, spelling, port))
            for owner in self.owners(address, port):
                target = ServiceTarget(self._network, owner.service, owner.port)
                by_port.setdefault(owner.port, set()).add(target)
            found = tuple(Alias(frozenset(targets), frozenset([owned, port])) for owned, targets in by_port.items())
            if len(self._aliases_of) >= self._max_named:
                self._aliases_of.clear()
            self._aliases_of[address, port] = found
        return found

    def _names_of_one(self, target: ServiceTarget) -> frozenset[str]:
        """Return the names under the mesh domain that lead to this service and to no other."""
        key = target.network, Owner(target.service, target.port)
        found = self._called.get(key)
        if found is None:
            clear = [
                name
                for short in beginnings(target)
                if self._is_clear(short, target)
                for name in names_of(short, self._domain)
            ]
            if len(self._called) >= self._max_named:
                self._called.clear()
            found = self._called[key] = frozenset(clear)
        return found

    def _is_clear(self, short: ServiceTarget, target: ServiceTarget) -> bool:
        found = self._mesh.services_beginning(target.network, short.service)
        return len(found) == 1 or (not found and short == target)  # without a view, only its full name counts

    def _add(self, owner: Owner, text: str) -> None:
        for endpoint in _endpoints_in(text):
            counts = self._owners.setdefault(endpoint, {})
            counts[owner] = counts.get(owner, 0) + 1

    def _remove(self, owner: Owner, text: str, until: float) -> None:
        for endpoint in _endpoints_in(text):
            counts = self._owners[endpoint]
            counts[owner] -= 1
            if counts[owner]:
                continue
            del counts[owner]
            if not counts:
                del self._owners[endpoint]
            self._recent[endpoint, owner] = until
            self._recent.move_to_end((endpoint, owner))
            self._former.setdefault(endpoint, set()).add(owner)
            if len(self._recent) > self._max_recent:
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        self._aliases_of.clear()
        (endpoint, owner), _ = self._recent.popitem(last=False)
        former = self._former[endpoint]
        former.discard(owner)
        if not former:
            del self._former[endpoint]


def _entries(record: Record[ServiceSpec] | None) -> Iterator[tuple[Owner, str]]:
    """Yield the endpoints of a record, each with its service and port."""
    if record is not None:
        for port, texts in record.spec.ports.items():
            if port.isdecimal():
                for text in texts:
                    yield Owner(record.spec.name, int(port)), text


def _endpoint(text: str) -> Endpoint | None:
    with suppress(BadAddress):
        return parse_endpoint(text)
    return None


def _endpoints_in(text: str) -> list[Endpoint]:
    endpoint = _endpoint(text)
    return [] if endpoint is None else [(address, endpoint[1]) for address in spellings(endpoint[0])]
