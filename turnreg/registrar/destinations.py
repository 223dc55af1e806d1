"""Which addresses a gateway may dial because of other networks' TURN records, and how often.

Such a record makes us connect to an address that another network chose. We refuse our own addresses, discovery servers, and
everything in our own network's records. Apart from these, each network gets only a few distinct addresses an hour, and an address
where we have never found a TURN server is retried at growing intervals, even if the records change meanwhile. A list of CIDRs pins
a network's servers.

Sans-IO: `now` is monotonic seconds; a function that is passed in says which addresses are this host's own.
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
"""Distinct addresses and ports per network in `WINDOW_S`: enough for two servers with an IPv4 and an IPv6 address each."""

WINDOW_S = 3600.0

FREE_TRIES = 2
"""Attempts at an address without a pause: both replicas of a registration start at once."""

PAUSES = Backoff(1.0, 60.0)
"""Pauses between attempts at an address without a TURN server so far. A server that starts late is found within a minute."""

MAX_KNOWN = 1024
"""Most addresses that are remembered per network; only a pinned network can have more than MAX_ADDRESSES."""


@dataclass(slots=True)
class _Tried:
    """Attempts at one address and port."""

    at: float
    tries: int = 0
    proven_at: float | None = None


class Destinations:
    """Checks the address before every connection of a registration."""

    def __init__(self, network: str, *, is_own: Callable[[Address], bool] = lambda _: False) -> None:
        """Check for the gateway of `network`. `is_own` says whether an address belongs to this host."""
        self._network = network
        self._is_own = is_own
        self._tried: dict[str, dict[tuple[Address, int], _Tried]] = {}
        self._mesh = Mesh.EMPTY
        self._named: frozenset[tuple[Address, int]] = frozenset()
        self.reconfigure({}, ())

    def reconfigure(
        self, allow: Mapping[str, TargetList], guard: Iterable[tuple[str, int]], *, free_tries: int = FREE_TRIES
    ) -> None:
        """Use these from now on.

        Args:
            allow: where the TURN servers of pinned networks are, by network id.
            guard: addresses and ports of discovery servers and of this process's listeners, which are never dialled.
            free_tries: attempts at an address without a pause.
        """
        self._allow = allow
        self._guard = LoopGuard(self._network, guard, is_own=self._is_own)
        self._free_tries = max(free_tries, FREE_TRIES)
        for known in self._tried.values():
            for tried in known.values():
                tried.tries = 0  # the configuration may have been corrected: try at once

    def refusal(self, via: str, address: str, port: int, mesh: Mesh, now: float, *, known: bool = False) -> str | None:
        """Return why we must not connect there for a TURN server of network `via`, None if we may. Raises BadAddress.

        `known`: we are connected there already, so the limit of addresses does not apply.
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
            return f"{where} is an address of this host; gateway.turn.{via}.allow can permit it"
        tried = self._known(via, now)
        if not known and (parsed, port) not in tried and len(tried) >= MAX_ADDRESSES:
            return (
                f"{where} would exceed {MAX_ADDRESSES} addresses within an hour; "
                f"gateway.turn.{via}.allow can list those of this network"
            )
        return None

    def wait_s(self, via: str, address: str, port: int, now: float) -> float:
        """Return the seconds to wait before that address may be tried."""
        tried = self._tried.get(via, {}).get((parse_address(address), port))
        if tried is None or tried.tries < self._free_tries or _is_proven(tried, now):
            return 0.0
        pause_s = PAUSES.bound_s(tried.tries - self._free_tries + 1)
        return max(0.0, tried.at + pause_s - now)

    def began(self, via: str, address: str, port: int, now: float) -> None:
        """Count an attempt at its start, so that changing the record during an attempt gains nothing."""
        known = self._known(via, now)
        tried = known.setdefault((parse_address(address), port), _Tried(now))
        tried.tries, tried.at = tried.tries + 1, now
        if len(known) > MAX_KNOWN:
            del known[min(known, key=lambda place: known[place].at)]

    def succeeded(self, via: str, address: str, port: int, now: float) -> None:
        """Record that there is a TURN server."""
        tried = self._known(via, now).setdefault((parse_address(address), port), _Tried(now))
        tried.tries, tried.at, tried.proven_at = 0, now, now

    def _known(self, via: str, now: float) -> dict[tuple[Address, int], _Tried]:
        """Return the addresses of a network that were tried within the window."""
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
    """Yield addresses and ports in a network's own records, except TURN servers, which networks may share."""
    for service in mesh.services(network):
        for endpoints in service.spec.ports.values():
            for text in endpoints:
                with suppress(BadAddress):  # records are checked when they are written
                    yield parse_endpoint(text)
    yield from relays_and_gateways(mesh, network)
