"""Allocations that gateways of other networks hold on TURN servers of the relay's own network (RFC 6062).

The relay dials the relayed address. The TURN server announces the connection to the gateway, which binds to it (`turnreg.client`)
and accepts it (`turnreg.registrar`).
"""

from collections.abc import Iterator

from discovery.model.addresses import Address, BadAddress, parse_address, refusal
from discovery.model.lookup import Place
from discovery.model.mesh import AllocationSpec, Kind, Mesh, Record, TurnSpec
from discovery.model.spec import FRAMED
from sniproxy.transport.base import Candidate, Traits, TransportConfig, framed_candidate
from sniproxy.transport.tcp import DialsTcp

TURN = Traits(
    name="turn",
    rank=20,
    # A permission may not have reached the server yet, which resets connections of peers without one.
    reset_retry_s=(0.1, 0.3, 0.9),
    # When both directions are full, coturn stops reading one of them for ever.
    needs_second_connection=True,
    gateway_dials=True,
    # Announcement, connection and bind each take a round trip between gateway and server.
    warmable=True,
)


class TurnTransport(DialsTcp):
    """Dials allocations on TURN servers of the relay's network."""

    traits = TURN

    def __init__(self, config: TransportConfig) -> None:
        self._config = config
        self.lacks = f"no usable allocation on a TURN server of {config.network!r}"

    def candidates(self, place: Place, mesh: Mesh) -> Iterator[Candidate]:
        """Find the allocations on TURN servers of our own network."""
        for allocation in mesh.allocations(place.network):
            if allocation.spec.via != self._config.network or FRAMED not in allocation.spec.proto:
                continue
            turn: Record[TurnSpec] | None = mesh.record(Kind.TURN, self._config.network, allocation.spec.turn)
            address = None if turn is None else self._relayed_address(allocation, turn)
            if turn is not None and address is not None:
                near = self._config.is_near(turn.spec.zone)
                yield framed_candidate(TURN, place, (address, allocation.spec.port), allocation, near=near)

    def _relayed_address(self, allocation: Record[AllocationSpec], turn: Record[TurnSpec]) -> Address | None:
        """Return the address to dial. Only the port comes from the other network's record, and it must be in our server's range."""
        if not turn.spec.port_min <= allocation.spec.port <= turn.spec.port_max:
            return None
        addresses = [address for text in turn.spec.relay_addresses if (address := _address(text)) is not None]
        # An Allocate without REQUESTED-ADDRESS-FAMILY gets IPv4 (RFC 8656 section 7.2), if the server has IPv4.
        addresses.sort(key=lambda address: address.version)
        return next((address for address in addresses if refusal(address, self._config.direct) is None), None)

    def offers(self, candidate: Candidate, mesh: Mesh) -> bool:
        """Return whether the allocation's record still has this port."""
        record = mesh.record(Kind.ALLOCATION, candidate.network, candidate.addressee)
        return record is not None and record.spec.port == candidate.port


def _address(text: str) -> Address | None:
    try:
        return parse_address(text)
    except BadAddress:
        return None
