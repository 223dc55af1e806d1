"""Keeps crossnet from dialling its own parts: a stream to one of them could loop.

Sans-IO; the caller provides the function that knows this host's addresses.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from discovery.model.addresses import Address, BadAddress, parse_address, parse_endpoint, parse_turn_url, spellings
from discovery.model.mesh import Mesh

STOPPED = "is a relay, TURN server, gateway or discovery server: a stream there would loop"
"""Why an address and port is refused by `stops`, for an error text after them."""


class LoopGuard:
    """Knows the addresses of relays, TURN servers, gateways, and our own other listeners.

    Relays and gateways of other networks are not included: their addresses are valid only there, and may belong to a service here.
    """

    __slots__ = ("_anywhere", "_infrastructure", "_is_own", "_mesh", "_network", "_own")

    def __init__(
        self, network: str, own: Iterable[tuple[str, int]] = (), *, is_own: Callable[[Address], bool] = lambda _: False
    ) -> None:
        """Guard the parts of `network`.

        Args:
            network: the own network.
            own: our own addresses and ports that are in no record (discovery servers, the admin server). `0.0.0.0` and `::` mean
                every address of this host.
            is_own: returns whether an address belongs to this host.
        """
        self._network = network
        self._is_own = is_own
        self._own: set[tuple[Address, int]] = set()
        self._anywhere: set[int] = set()  # ports of ours on every address of this host
        self._mesh = Mesh.EMPTY
        self._infrastructure: frozenset[tuple[Address, int]] = frozenset()
        for address, port in own:
            self.add(address, port)

    def add(self, address: str, port: int) -> None:
        """Guard another address and port. Raises BadAddress."""
        parsed = parse_address(address)
        if parsed.is_unspecified:
            self._anywhere.add(port)
        else:
            self._own.add((parsed, port))

    def stops(self, address: Address, port: int, mesh: Mesh) -> bool:
        """Return whether a stream must not go there. Also recognises NAT64 and 6to4 addresses."""
        if mesh is not self._mesh:
            self._mesh, self._infrastructure = mesh, frozenset(_infrastructure(mesh, self._network))
        return any(
            (spelling, port) in self._own
            or (spelling, port) in self._infrastructure
            or (port in self._anywhere and self._is_own(spelling))
            for spelling in spellings(address)
        )


def relays_and_gateways(mesh: Mesh, network: str) -> Iterator[tuple[Address, int]]:
    """Yield where the relays and gateways of a network listen, according to their records."""
    for relay in mesh.relays(network):
        for text in relay.spec.addresses:
            for port in relay.spec.ports:
                with suppress(BadAddress):  # records are checked when they are written
                    yield parse_address(text), port
    for gateway in mesh.gateways(network):
        with suppress(BadAddress):
            yield parse_endpoint(gateway.spec.address)


def _infrastructure(mesh: Mesh, network: str) -> Iterator[tuple[Address, int]]:
    yield from relays_and_gateways(mesh, network)
    for turns in map(mesh.turns, mesh.networks):
        for turn in turns:
            with suppress(BadAddress):  # its URL has a name, which cannot be compared with an address here
                url = parse_turn_url(turn.spec.url)
                yield parse_address(url.host), url.port
