"""What a transport is asked to reach: a gateway of another network, or a service of our own."""

from dataclasses import dataclass, field
from enum import StrEnum

from discovery.model.addresses import format_endpoint, parse_address
from discovery.model.names import AddressTarget, ServiceTarget

FRAMED = "framed/1"
"""What a gateway's record says in `proto` when it takes our stream protocol."""


class RouteKind(StrEnum):
    """How a candidate is reached."""

    LOCAL = "local"
    DIRECT = "direct"
    TURN = "turn"


CandidateKey = tuple[str, str, str, int]
"""What tells a way to a network from others: the network, the record's id, and the address and port that are dialled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One address to dial for a stream."""

    kind: RouteKind
    network: str
    target: str
    """What the gateway is asked for, as the preamble spells it."""
    address: str
    port: int
    addressee: str = ""
    """Id of the allocation or gateway record, so that a captured preamble is good nowhere else; empty for local."""
    weight: int = 1
    """What it is for beside the others."""
    near: bool = False
    """In the relay's own zone."""
    epoch: bytes | None = None
    """Of the gateway's process, as its record tells; None: nobody has told it."""
    proxy_version: int | None = None
    """Of the PROXY header that the service wants first, on a local route; a gateway knows that by itself."""
    meant: AddressTarget | ServiceTarget | None = field(default=None, compare=False)
    """What the name means, a service by its whole name: for rules. The router always says it."""
    imports: str | None = field(default=None, compare=False)
    """The services whose addresses may be reached by it, for the preamble; None: any."""

    @property
    def way(self) -> CandidateKey:
        """The way, whatever is asked for at its end. An allocation made anew has the id of the lost one and another port."""
        return self.network, self.addressee, self.address, self.port

    def __str__(self) -> str:
        return f"{self.kind}:{self.addressee or format_endpoint(parse_address(self.address), self.port)}"
