"""Names that are never forwarded because upstream cannot know them, and exceptions: zones among them that upstream does serve.

`.local` is for multicast DNS (RFC 6762 section 22.1). Reverse zones of loopback, link-local and documentation addresses are
empty everywhere (RFC 6303 section 4). The configuration adds others: reverse zones of private addresses that no resolver of the
network serves, and names by which a network disables encrypted DNS that would bypass its resolver. Exceptions are Kubernetes'
`cluster.local` and `clusterset.local` (KEP-1645), the clients' search domains, and zones that the configuration forwards.

Sans-IO.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import NamedTuple

from dnsgw.message.question import Query, wire_name

LOCAL = "local"
CLUSTER = "cluster.local"
CLUSTERSET = "clusterset.local"

# RFC 6303 sections 4.2 to 4.6. Not the private ranges (4.1 and 4.4): a cluster's own DNS has names for those.
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

# Number of labels in the reverse name of one address.
_WHOLE = {wire_name("in-addr.arpa"): 6, wire_name("ip6.arpa"): 34}


class Found(NamedTuple):
    """A name that is not forwarded."""

    zone: int
    """Offset in the name at which its zone begins."""

    empty: bool
    """There may be names below it, so it exists without records (NODATA, RFC 8020); else it does not exist (NXDOMAIN)."""


class LocallyServedZones:
    """The names that are not forwarded under one configuration."""

    def __init__(
        self,
        more: Iterable[str | IPv4Network | IPv6Network] = (),
        served: Iterable[str] = (),
        searched: Iterable[str] = (),
    ) -> None:
        """Combine the fixed names with those of the configuration.

        Args:
            more: further names, and networks for their reverse zones.
            served: names that are forwarded, with all below them.
            searched: likewise, unless they are in `more`.
        """
        given = {wire_name(zone) for item in more for zone in _zones(item)}
        self._served = {wire_name(zone): False for item in (LOCAL, *NOWHERE) for zone in _zones(item)}
        self._served |= dict.fromkeys(given, False)
        self._suffixes = tuple(self._served)
        above: set[bytes] = set()
        for wire in (
            *map(wire_name, (CLUSTER, CLUSTERSET, *served)),
            *({wire_name(name) for name in searched} - given),
        ):
            self._served[wire] = True
            position = 0
            while wire[position]:
                above.add(wire[position:])
                position += wire[position] + 1
        self._above = frozenset(above)

    def find(self, query: Query) -> Found | None:
        """Return what is known of a name that must not be forwarded; None: forward it."""
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
    """Yield the reverse zones of a network: one, or several if its prefix ends inside a label."""
    bits = 8 if network.version == 4 else 4
    labels = -(-network.prefixlen // bits)
    for part in network.subnets(new_prefix=labels * bits):
        name = part.network_address.reverse_pointer.split(".")
        yield ".".join(name[network.max_prefixlen // bits - labels :])
