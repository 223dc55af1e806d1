"""The endpoints of EndpointSlices: which of them may be dialled, and which of them get streams. Sans-IO."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from discovery.model.addresses import BadAddress, parse_address, refusal
from discovery.model.names import MAX_PORT
from discovery.publisher.objects import EndpointFields, Name, Port, SliceObject


class Endpoint(NamedTuple):
    """An endpoint that may be dialled."""

    addresses: tuple[str, ...]
    """As before the port in `ip:port` and `[v6]:port`."""

    ready: bool
    ends_serving: bool
    """It ends, and still serves."""

    hostname: str


@dataclass(frozen=True, slots=True)
class Slice:
    """An EndpointSlice, or a part of one."""

    service: Name
    endpoints: tuple[Endpoint, ...]
    ports: tuple[tuple[str, int], ...]
    """Name and number."""

    refused: tuple[str, ...]
    """Addresses that may not be dialled, or that are none."""


def read_slice(found: SliceObject, of: Name) -> Slice:
    """Return what is used of an EndpointSlice of this Service."""
    refused: list[str] = []
    endpoints = tuple(_endpoints(found, refused))
    return Slice(of, endpoints, tuple(_named(found.ports or ())), tuple(refused))


def _named(ports: Iterable[Port]) -> Iterator[tuple[str, int]]:
    for port in ports:
        if port.is_tcp and port.port is not None and 1 <= port.port <= MAX_PORT:
            yield port.name or "", port.port


def _endpoints(found: SliceObject, refused: list[str]) -> Iterator[Endpoint]:
    """Yield the endpoints that may be dialled, and note the addresses of others."""
    if found.addressType not in ("IPv4", "IPv6"):
        refused += (
            f"{address[:63]} ({found.addressType})" for each in found.endpoints or () for address in each.addresses
        )
        return
    for each in found.endpoints or ():
        addresses = []
        for address in each.addresses:
            try:
                parsed = parse_address(address)
                why = refusal(parsed)
            except BadAddress:
                why = "not an address"
            if why is None:
                addresses.append(f"[{parsed}]" if parsed.version == 6 else str(parsed))
            else:
                refused.append(f"{address[:63]} ({why})")
        if addresses:
            yield Endpoint(tuple(addresses), *_state(each), each.hostname or "")


def _state(found: EndpointFields) -> tuple[bool, bool]:
    """Return whether an endpoint is ready, and whether it ends and still serves."""
    conditions = found.conditions
    if conditions is None:
        return True, False  # Kubernetes: an unknown `ready` should be interpreted as true
    ready = conditions.ready is not False
    return ready, not ready and conditions.serving is True and conditions.terminating is True


def delivering(port_name: str, slices: Iterable[Slice], *, every: bool) -> list[str]:
    """Return the endpoints of a port that get streams: those that are ready or, if none is, those that end and still serve.

    `every` does not look at their state.
    """
    ready: set[str] = set()
    ending: set[str] = set()
    for found in slices:
        for number in (number for name, number in found.ports if name == port_name):
            for endpoint in found.endpoints:
                chosen = ready if every or endpoint.ready else ending if endpoint.ends_serving else None
                if chosen is not None:
                    chosen.update(f"{address}:{number}" for address in endpoint.addresses)
    return sorted(ready or ending)


def by_hostname(slices: Iterable[Slice]) -> Mapping[str, list[Slice]]:
    """Return the endpoints of each hostname, as slices of their own."""
    found: dict[str, list[Slice]] = {}
    for each in slices:
        of: dict[str, list[Endpoint]] = {}
        for endpoint in each.endpoints:
            if endpoint.hostname:
                of.setdefault(endpoint.hostname, []).append(endpoint)
        for hostname, endpoints in of.items():
            found.setdefault(hostname, []).append(Slice(each.service, tuple(endpoints), each.ports, ()))
    return found
