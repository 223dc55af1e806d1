"""Names that nobody is asked for, since upstream can know nothing of them, and the zones among them that somebody does serve.

`.local` is for multicast DNS (RFC 6762 section 22.1); the reverse of loopback, link-local and documentation addresses has no
names anywhere (RFC 6303 section 4). The configuration adds others: reverse zones of private addresses that no resolver of the
network serves, and names by which a network says no to encrypted DNS past its resolver. Kubernetes' `cluster.local` and
whatever clients search in or the configuration forwards somewhere is asked for all the same.

Sans-IO.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import NamedTuple

from dnsgw.message.question import Query, wire_name

LOCAL = "local"
CLUSTER = "cluster.local"

# RFC 6303 sections 4.2 to 4.6, but for private ranges (4.1 and 4.4): a cluster's own DNS knows names of those.
NOWHERE = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "192.0.2.0/24",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "255.255.255.255/32",
        "::/128",
        "::1/128",
        "fe80::/10",
        "2001:db8::/32",
    )
)

# Labels of the name of one address in reverse.
_WHOLE = {wire_name("in-addr.arpa"): 6, wire_name("ip6.arpa"): 34}


class Found(NamedTuple):
    """A name that is not asked for."""

    zone: int
    """Where in it the zone begins that it is in."""

    empty: bool
    """There may be names below: it is there, and has no records (RFC 8020)."""


class LocallyServedZones:
    """What one configuration has nobody asked for."""

    def __init__(
        self,
        more: Iterable[str | IPv4Network | IPv6Network] = (),
        served: Iterable[str] = (),
        searched: Iterable[str] = (),
    ) -> None:
        """Add these names, and the reverse zones of these networks; but `served` and all below it are asked for.

        So is what is `searched`, unless it is among `more`.
        """
        given = {wire_name(zone) for item in more for zone in _zones(item)}
        self._served = {wire_name(zone): False for item in (LOCAL, *NOWHERE) for zone in _zones(item)}
        self._served |= dict.fromkeys(given, False)
        self._suffixes = tuple(self._served)
        above: set[bytes] = set()
        for wire in (*map(wire_name, (CLUSTER, *served)), *({wire_name(name) for name in searched} - given)):
            self._served[wire] = True
            position = 0
            while wire[position]:
                above.add(wire[position:])
                position += wire[position] + 1
        self._above = frozenset(above)

    def find(self, query: Query) -> Found | None:
        """Tell whether nobody is to be asked for this name; None: somebody is."""
        name = query.name
        if not name.endswith(self._suffixes):
            return None
        for position in query.labels:
            served = self._served.get(name[position:])
            if served is not None:
                empty = name in self._above or any(
                    name.endswith(top) and len(query.labels) < labels for top, labels in _WHOLE.items()
                )
                return None if served else Found(position, empty)
        return None


def _zones(item: str | IPv4Network | IPv6Network) -> Iterable[str]:
    return (item,) if isinstance(item, str) else reverse_zones(item)


def reverse_zones(network: IPv4Network | IPv6Network) -> Iterator[str]:
    """The zones that hold the names of a network's addresses in reverse: one, or several where it ends inside a label."""
    bits = 8 if network.version == 4 else 4
    labels = -(-network.prefixlen // bits)
    for part in network.subnets(new_prefix=labels * bits):
        name = part.network_address.reverse_pointer.split(".")
        yield ".".join(name[network.max_prefixlen // bits - labels :])
