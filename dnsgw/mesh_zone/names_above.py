"""Names above those that we answer: empty non-terminals (RFC 8020, RFC 8499 section 7).

`shop.svc.cluster.local` exists as long as `orders.shop.svc.cluster.local` is imported and offered, whatever upstream knows. A
resolver that asks label by label (RFC 9156) or believes an NXDOMAIN for all below it (RFC 8020) would otherwise never ask for the
service itself.

Sans-IO.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Mesh
from dnsgw.message.question import wire_name


def above(name: bytes) -> Iterator[bytes]:
    """Yield the names above a wire name, without the root."""
    position = name[0] + 1
    while position < len(name) - 1:
        yield name[position:]
        position += name[position] + 1


class NamesAbove:
    """The names above imported services. It is updated with what changed, and only when it is asked."""

    __slots__ = ("_networks", "_rules")

    def __init__(self) -> None:
        """Know no names."""
        self._rules: tuple[ImportRule, ...] = ()
        self._networks: dict[str, _Network] = {}

    def contains(self, name: bytes, mesh: Mesh, imports: Imports) -> bool:
        """Whether an imported name that one of its networks offers is below this one, given in wire form and lower case."""
        if imports.rules is not self._rules and imports.rules != self._rules:
            self._networks = {}
        self._rules = imports.rules
        for source in imports.sources:
            network = self._networks.get(source)
            if network is None:
                network = self._networks[source] = _Network(source)
            services = mesh.services(source)
            if services is not network.services:
                network.update(services, imports)
            if name in network.counts:
                return True
        return False


class _Network:
    """The names above those that one network offers, with the number of names below each."""

    __slots__ = ("_name", "_names", "counts", "services")

    def __init__(self, name: str) -> None:
        self._name = name
        self._names: set[str] = set()
        self.services: Sequence[Any] = ()
        self.counts: Counter[bytes] = Counter()

    def update(self, services: Sequence[Any], imports: Imports) -> None:
        names = {service.spec.name for service in services}
        for name in self._names ^ names:
            rule = imports.rule_for(name)
            if rule is None or self._name not in rule.sources:
                continue
            for upper in above(wire_name(name)):
                if name in names:
                    self.counts[upper] += 1
                elif self.counts[upper] > 1:
                    self.counts[upper] -= 1
                else:
                    del self.counts[upper]
        self._names, self.services = names, services
