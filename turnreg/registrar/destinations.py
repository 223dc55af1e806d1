"""Where the records of other networks' TURN servers may lead a gateway, and how often.

Such a record makes us connect to an address that another network chose. We refuse our own addresses, discovery servers and what
our own network's records name. Elsewhere one network gets few distinct addresses an hour, and an address that has never spoken
TURN with us is tried again at growing intervals, whatever the records say meanwhile. A list of CIDRs pins a network's servers.

Sans-IO: `now` is monotonic seconds; which addresses are this host's own is asked of whoever knows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from discovery.model.addresses import (
    Address,
    BadAddress,
    TargetList,
    format_endpoint,
    parse_address,
    parse_endpoint,
    refusal,
    spellings,
)
from discovery.model.mesh import Mesh
from discovery.pacing.backoff import Backoff
from sniproxy.access.loop_guard import LoopGuard, relays_and_gateways

MAX_ADDRESSES = 4
"""Addresses and ports that one network may send us to in `WINDOW_S`: two servers with an IPv4 and an IPv6 address each."""

WINDOW_S = 3600.0

FREE_TRIES = 2
"""Attempts at an address before it has to wait: both replicas of a registration begin at once."""

PAUSES = Backoff(1.0, 60.0)
"""Between attempts at an address that has not spoken TURN with us lately. A server that starts late is found within a minute."""

MAX_KNOWN = 1024
"""Addresses of one network that are remembered; only a pinned network can have more than MAX_ADDRESSES."""


@dataclass(slots=True)
class _Tried:
    """What we know of one address and port."""

    at: float
    tries: int = 0
    proven_at: float | None = None


class Destinations:
    """What every registration asks before it connects."""

    def __init__(self, network: str, *, is_own: Callable[[Address], bool] = lambda _: False) -> None:
        """Guard the gateway of `network`. `is_own` tells whether an address is one of this host."""
        self._network = network
        self._is_own = is_own
        self._tried: dict[str, dict[tuple[Address, int], _Tried]] = {}
        self._mesh = Mesh.EMPTY
        self._named: frozenset[tuple[Address, int]] = frozenset()
        self.reconfigure({}, ())

    def reconfigure(
        self, allow: Mapping[str, TargetList], guard: Iterable[tuple[str, int]], *, free_tries: int = FREE_TRIES
    ) -> None:
        """Go by these from now on.

        Args:
            allow: for each network that is pinned, where its TURN servers are.
            guard: addresses and ports of discovery servers and of this process's listeners, never dialled.
            free_tries: attempts at an address that need not wait.
        """
        self._allow = allow
        self._guard = LoopGuard(self._network, guard, is_own=self._is_own)
        self._free_tries = max(free_tries, FREE_TRIES)
        for known in self._tried.values():
            for tried in known.values():
                tried.tries = 0  # somebody has mended something: look at once

    def refusal(self, via: str, address: str, port: int, mesh: Mesh, now: float, *, known: bool = False) -> str | None:
        """Say why a TURN server of network `via` is not to be looked for there; None: it may be. Raises BadAddress.

        One that is `known` to be there is none too many.
        """
        parsed = parse_address(address)
        where = format_endpoint(parsed, port)
        pin = self._allow.get(via)
        if why := refusal(parsed, pin):
            return f"{where} is {why}"
        for one in spellings(parsed):
            if self._guard.stops(one, port, Mesh.EMPTY):
                return f"{where} is a discovery server or a listener of this process"
            if (one, port) in self._names(mesh):
                return f"{where} is a service, relay or gateway of our own network"
        if pin is not None:
            return None if pin.allows(parsed, port) else f"{where} is not in gateway.turn.{via}.allow"
        if any(self._is_own(one) for one in spellings(parsed)):
            return f"{where} is an address of this host; gateway.turn.{via}.allow can allow it"
        tried = self._known(via, now)
        if not known and (parsed, port) not in tried and len(tried) >= MAX_ADDRESSES:
            return (
                f"{where} would be one more than {MAX_ADDRESSES} addresses within an hour; "
                f"gateway.turn.{via}.allow can name those of this network"
            )
        return None

    def wait_s(self, via: str, address: str, port: int, now: float) -> float:
        """Say for how many seconds that address is not to be tried yet."""
        tried = self._tried.get(via, {}).get((parse_address(address), port))
        if tried is None or tried.tries < self._free_tries or _is_proven(tried, now):
            return 0.0
        pause_s = PAUSES.bound_s(tried.tries - self._free_tries + 1)
        return max(0.0, tried.at + pause_s - now)

    def began(self, via: str, address: str, port: int, now: float) -> None:
        """Count an attempt, however it ends: a record that changes in the middle of one wins nothing by that."""
        known = self._known(via, now)
        tried = known.setdefault((parse_address(address), port), _Tried(now))
        tried.tries, tried.at = tried.tries + 1, now
        if len(known) > MAX_KNOWN:
            del known[min(known, key=lambda place: known[place].at)]

    def succeeded(self, via: str, address: str, port: int, now: float) -> None:
        """Note that a TURN server is there, which took our credentials."""
        tried = self._known(via, now).setdefault((parse_address(address), port), _Tried(now))
        tried.tries, tried.at, tried.proven_at = 0, now, now

    def _known(self, via: str, now: float) -> dict[tuple[Address, int], _Tried]:
        """The addresses of a network that count now."""
        known = self._tried[via] = {
            place: tried for place, tried in self._tried.get(via, {}).items() if tried.at > now - WINDOW_S
        }
        return known

    def _names(self, mesh: Mesh) -> frozenset[tuple[Address, int]]:
        if mesh is not self._mesh:
            self._mesh, self._named = mesh, frozenset(_named(mesh, self._network))
        return self._named


def _is_proven(tried: _Tried, now: float) -> bool:
    return tried.proven_at is not None and tried.proven_at > now - WINDOW_S


def _named(mesh: Mesh, network: str) -> Iterator[tuple[Address, int]]:
    """Yield the addresses and ports that a network's own records name. TURN servers may be shared by networks."""
    for service in mesh.services(network):
        for endpoints in service.spec.ports.values():
            for text in endpoints:
                with suppress(BadAddress):  # records are checked when they are written
                    yield parse_endpoint(text)
    yield from relays_and_gateways(mesh, network)
