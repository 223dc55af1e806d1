"""From the name in a ClientHello to the candidates that may carry the stream, best first.

    local    the relay's own network: the service itself, dialled without framing, only where `deliver` allows it
    direct   a gateway with an address that `direct` allows
    turn     an allocation that the other network's gateway holds on one of our own TURN servers

Sans-IO; the one error is Unroutable.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from discovery.model.addresses import (
    Address,
    BadAddress,
    TargetList,
    format_endpoint,
    parse_address,
    parse_endpoint,
    refusal,
)
from discovery.model.imports import Imports
from discovery.model.lookup import Place, Unresolved, resolve
from discovery.model.mesh import AllocationSpec, GatewaySpec, Kind, Mesh, Record, TurnSpec
from discovery.model.names import AddressTarget
from sniproxy.access.loop_guard import STOPPED, LoopGuard
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import FRAMED, Candidate, RouteKind
from sniproxy.tunnel.epoch import epoch_in
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.preamble import PreambleError, encode_target


class Unroutable(Exception):
    """A name that no candidate serves. `reason` is for metrics and the alert, `detail` a sentence for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """What a relay routes by, apart from the mesh."""

    network: str
    domain: str
    imports: Imports
    deliver: TargetList
    """What may be dialled in the relay's own network; default nothing."""
    direct: TargetList
    """Where gateways may be dialled directly. A CIDR in it that lies wholly inside a refused range (127.0.0.0/8) lifts that
    refusal, for TURN servers' relayed addresses too."""
    keys: SigningKeys
    guard: LoopGuard
    """What is no service of the own network, whatever `deliver` allows."""
    zone: str = ""
    """Where the relay stands."""
    order: Callable[[Sequence[Candidate]], list[Candidate]] = list
    """Puts the ways to one network into the order in which they are tried."""

    def candidates(self, name: str, mesh: Mesh, local_port: int) -> list[Candidate]:
        """Say where a stream with this server name may go, best first; never nothing.

        Args:
            local_port: the port that the client connected to; it chooses among the ports of a plain service name.

        Raises:
            Unroutable: with the reason of the first place where there are several and none has a candidate.
        """
        try:
            places = resolve(name, mesh, self.imports, self.domain, local_port=local_port).candidates
        except Unresolved as error:
            raise Unroutable(Reason(error.reason.value), error.detail) from error
        found: list[Candidate] = []
        first_failure: Unroutable | None = None
        for place in places:
            try:
                found += self._local(place, mesh) if place.network == self.network else self._remote(place, mesh)
            except Unroutable as failure:
                first_failure = first_failure or failure
        if not found:
            assert first_failure is not None
            raise first_failure
        return found

    def _local(self, place: Place, mesh: Mesh) -> list[Candidate]:
        target = place.target
        header = None
        if isinstance(target, AddressTarget):
            endpoints = [(target.address, target.port)]
        else:
            assert place.service is not None
            header = place.service.spec.proxy_version
            texts = place.service.spec.ports.get(str(target.port), ())
            endpoints = [endpoint for text in texts if (endpoint := _endpoint(text)) is not None]
            if not endpoints:
                raise Unroutable(
                    Reason.NO_ENDPOINT, f"service {target.service!r} has no endpoint for port {target.port}"
                )
        allowed = []
        denied = ""
        for address, port in endpoints:
            shown = format_endpoint(address, port)
            why = self._why_not(address, port, mesh)
            if why is not None:
                denied = denied or f"{shown} {why}"
                continue
            allowed.append(
                Candidate(
                    kind=RouteKind.LOCAL,
                    network=place.network,
                    target=shown,
                    address=str(address),
                    port=port,
                    proxy_version=header,
                    meant=target,
                )
            )
        if not allowed:
            raise Unroutable(Reason.DENIED, denied)
        return self.order(allowed)

    def _why_not(self, address: Address, port: int, mesh: Mesh) -> str | None:
        """Say why this address and port of the own network may not be dialled, None if it may."""
        if not self.deliver.allows(address, port):
            return "is not in relay.deliver"
        why = refusal(address, self.deliver)
        if why is not None:
            return f"is {why}"
        return STOPPED if self.guard.stops(address, port, mesh) else None

    def _remote(self, place: Place, mesh: Mesh) -> list[Candidate]:
        ways = self.order([*self._direct(place, mesh), *self._turn(place, mesh)])
        if not ways:
            raise Unroutable(
                Reason.NO_ROUTE,
                f"network {place.network!r} has no gateway that relay.direct allows and no usable allocation "
                f"on a TURN server of {self.network!r}",
            )
        if self.keys.get(self.network, place.network) is None:
            raise Unroutable(Reason.NO_KEY, f"no key signs streams from {self.network!r} to {place.network!r}")
        return ways

    def _direct(self, place: Place, mesh: Mesh) -> Iterator[Candidate]:
        for gateway in mesh.gateways(place.network):
            endpoint = _endpoint(gateway.spec.address)
            if endpoint is None or FRAMED not in gateway.spec.proto:
                continue
            if self.direct.allows(*endpoint) and refusal(endpoint[0], self.direct) is None:
                near = self._near(gateway.spec.zone)
                yield self._framed(RouteKind.DIRECT, place, endpoint, gateway, near)

    def _turn(self, place: Place, mesh: Mesh) -> Iterator[Candidate]:
        for allocation in mesh.allocations(place.network):
            if allocation.spec.via != self.network or FRAMED not in allocation.spec.proto:
                continue
            turn: Record[TurnSpec] | None = mesh.record(Kind.TURN, self.network, allocation.spec.turn)
            address = None if turn is None else self._relayed_address(allocation, turn)
            if turn is not None and address is not None:
                near = self._near(turn.spec.zone)
                yield self._framed(RouteKind.TURN, place, (address, allocation.spec.port), allocation, near)

    def _near(self, zone: str) -> bool:
        return bool(zone) and zone == self.zone

    def _relayed_address(self, allocation: Record[AllocationSpec], turn: Record[TurnSpec]) -> Address | None:
        """Of another network's record only the port counts, and only inside our own TURN server's range."""
        if not turn.spec.port_min <= allocation.spec.port <= turn.spec.port_max:
            return None
        addresses = [address for text in turn.spec.relay_addresses if (address := _address(text)) is not None]
        # An Allocate without REQUESTED-ADDRESS-FAMILY gives IPv4 (RFC 8656 section 7.2), wherever the server has any.
        addresses.sort(key=lambda address: address.version)
        return next((address for address in addresses if refusal(address, self.direct) is None), None)

    @staticmethod
    def _framed(
        kind: RouteKind,
        place: Place,
        endpoint: tuple[Address, int],
        record: Record[GatewaySpec] | Record[AllocationSpec],
        near: bool,
    ) -> Candidate:
        target = place.target
        where = target.address if isinstance(target, AddressTarget) else target.service
        try:
            text = encode_target(where, target.port)
        except PreambleError as error:  # a record that is none slipped through
            raise Unroutable(Reason.NO_ROUTE, error.detail) from error
        return Candidate(
            kind=kind,
            network=place.network,
            target=text,
            address=str(endpoint[0]),
            port=endpoint[1],
            addressee=record.id,
            weight=record.spec.weight,
            near=near,
            epoch=epoch_in(record.spec.proto),
            meant=target,
        )


def _endpoint(text: str) -> tuple[Address, int] | None:
    try:
        return parse_endpoint(text)
    except BadAddress:
        return None  # records are checked when they are written; one that slipped through is no candidate


def _address(text: str) -> Address | None:
    try:
        return parse_address(text)
    except BadAddress:
        return None
