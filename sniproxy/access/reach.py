"""What a stream reaches, by every name that this has: what rules are asked about (`policy`).

A service has its own name, and under the mesh domain a compact and a mangled one for each of its ports, also with fewer labels.
Where its endpoints are known, which is in its own network, their address names lead to it as well. An address that was an endpoint
within the last ten minutes still counts for deny rules: a record that is gone does not mean that nothing listens there any more.

Sans-IO: views of discovery and the time come from outside.
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
"""How long an address counts as a service's after its record has lost it: longer than a rollout, and than most clients know it."""

MAX_RECENT = 65_536
"""Endpoints remembered that are none any more; past that the oldest is forgotten. That many change in ten minutes in no network."""

MAX_NAMED = 1024
"""Targets whose names are remembered."""

Endpoint = tuple[Address, int]


class Owner(NamedTuple):
    """A port of a service, as its record has it."""

    service: str
    port: int


class Reach:
    """What names and addresses lead to, seen from `network`, whose own endpoints count alone."""

    def __init__(self, network: str, domain: str, *, max_recent: int = MAX_RECENT, max_named: int = MAX_NAMED) -> None:
        self._network = network
        self._domain = domain
        self._max_recent = max_recent
        self._max_named = max_named
        self._mesh = Mesh.EMPTY
        self._services: tuple[Record[ServiceSpec], ...] = ()
        self._records: dict[str, Record[ServiceSpec]] = {}
        self._owners: dict[Endpoint, dict[Owner, int]] = {}  # with the number of records and texts that say so
        self._recent: OrderedDict[tuple[Endpoint, Owner], float] = OrderedDict()  # until when, the oldest first
        self._former: dict[Endpoint, set[Owner]] = {}
        self._endpoints: dict[Owner, tuple[Endpoint, ...]] = {}
        self._called: dict[tuple[str, Owner], frozenset[str]] = {}
        self._aliases_of: dict[Endpoint, tuple[Alias, ...]] = {}

    def follow(self, mesh: Mesh, now: float) -> None:
        """Go by this view from now on. Cheap where it is the one before, and else costs what has changed.

        Args:
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
                had, has = set(_written(old)), set(_written(new))
                for owner, text in has - had:
                    self._add(owner, text)
                for owner, text in had - has:
                    self._remove(owner, text, now + RECENT_S)

    def endpoints(self, service: str, port: int) -> tuple[Endpoint, ...]:
        """Return where a service of the own network is now, in the order of its record."""
        owner = Owner(service, port)
        found = self._endpoints.get(owner)
        if found is None:
            record = self._mesh.service(self._network, service)
            texts = () if record is None else record.spec.ports.get(str(port), ())
            # Records are checked when they are written; what slipped through is no endpoint.
            found = tuple(endpoint for text in texts if (endpoint := _endpoint(text)) is not None)
            if len(self._endpoints) >= self._max_named:
                self._endpoints.clear()
            self._endpoints[owner] = found
        return found

    def owners(self, address: Address, port: int) -> set[Owner]:
        """Return the services of the own network of which this is an endpoint, or was within RECENT_S."""
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
        """Say what rules are asked about, by the view that was followed last.

        Args:
            target: what the client asked for, a service by its whole name.
            name: how it did so.
            address: what will be dialled for it, as far as that is known, with `port`.
            is_plain: whether a service's own name means this one here, and not one of another network.
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
        """What else an address of the own network is, one alias for each port of the services that have it."""
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
        """The names under the mesh domain that lead to this service and to no other."""
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
        return len(found) == 1 or (not found and short == target)  # without a view its whole name has to do

    def _add(self, owner: Owner, text: str) -> None:
        for endpoint in _spelt(text):
            counts = self._owners.setdefault(endpoint, {})
            counts[owner] = counts.get(owner, 0) + 1

    def _remove(self, owner: Owner, text: str, until: float) -> None:
        for endpoint in _spelt(text):
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


def _written(record: Record[ServiceSpec] | None) -> Iterator[tuple[Owner, str]]:
    """Yield the endpoints of a record, each with the port that it is behind."""
    if record is not None:
        for port, texts in record.spec.ports.items():
            if port.isdecimal():
                for text in texts:
                    yield Owner(record.spec.name, int(port)), text


def _endpoint(text: str) -> Endpoint | None:
    with suppress(BadAddress):
        return parse_endpoint(text)
    return None


def _spelt(text: str) -> list[Endpoint]:
    endpoint = _endpoint(text)
    return [] if endpoint is None else [(address, endpoint[1]) for address in spellings(endpoint[0])]
