"""What is no service although its address may be dialled: a stream to a part of crossnet itself would come round again.

Sans-IO; which addresses are this host's own is asked of whoever knows.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from discovery.model.addresses import Address, BadAddress, parse_address, parse_endpoint, parse_turn_url, spellings
from discovery.model.mesh import Mesh

STOPPED = "is a relay, TURN server, gateway or discovery server: a stream there would loop"
"""Why an address and port that `stops` is refused, to stand behind them in a sentence."""


class LoopGuard:
    """Knows relays, TURN servers, gateways, and what else of our own listens.

    Other networks' relays and gateways are left out: their addresses mean something only there, and may be a service's here.
    """

    __slots__ = ("_anywhere", "_infrastructure", "_is_own", "_mesh", "_network", "_own")

    def __init__(
        self, network: str, own: Iterable[tuple[str, int]] = (), *, is_own: Callable[[Address], bool] = lambda _: False
    ) -> None:
        """Guard the parts of `network`.

        Args:
            own: addresses and ports of ours that no record names (discovery servers, the admin server); `0.0.0.0` and `::`
                stand for every address of this host.
            is_own: tells whether an address is one of this host.
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
        """Guard one more address and port. Raises BadAddress."""
        parsed = parse_address(address)
        if parsed.is_unspecified:
            self._anywhere.add(port)
        else:
            self._own.add((parsed, port))

    def stops(self, address: Address, port: int, mesh: Mesh) -> bool:
        """Tell whether a stream must not go there, also by a NAT64 or 6to4 address."""
        if mesh is not self._mesh:
            self._mesh, self._infrastructure = mesh, frozenset(_infrastructure(mesh, self._network))
        return any(
            (spelling, port) in self._own
            or (spelling, port) in self._infrastructure
            or (port in self._anywhere and self._is_own(spelling))
            for spelling in spellings(address)
        )


def relays_and_gateways(mesh: Mesh, network: str) -> Iterator[tuple[Address, int]]:
    """Yield where a network's relays and gateways listen, as their records say."""
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
            with suppress(BadAddress):  # one with a name: no address that a stream names can be told from it here
                url = parse_turn_url(turn.spec.url)
                yield parse_address(url.host), url.port
