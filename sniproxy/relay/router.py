"""Finds the candidates for the name in a ClientHello, best first.

`discovery.model.lookup` resolves a name to places, and the transports find the candidates for each place. Sans-IO. The only error
is Unroutable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from discovery.model.imports import Imports
from discovery.model.lookup import Place, Unresolved, resolve
from discovery.model.mesh import Mesh
from discovery.model.names import ServiceTarget, is_service_name
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate, Transport
from sniproxy.transport.errors import Unroutable
from sniproxy.tunnel.keys import SigningKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The routing of one relay; the mesh is passed to each call."""

    network: str
    domain: str
    imports: Imports
    keys: SigningKeys
    transports: Sequence[Transport]
    order: Callable[[Sequence[Candidate]], list[Candidate]] = list
    """Sorts the candidates for one network into the order in which they are tried."""

    def candidates(self, name: str, mesh: Mesh, local_port: int) -> list[Candidate]:
        """Return the candidates for a stream with this server name, best first; at least one.

        Args:
            name: the server name, in lower case and without trailing dot.
            mesh: the current view of discovery.
            local_port: the port that the client connected to, which selects a port of the service if the name has none.

        Raises:
            Unroutable: there is no candidate; if the name leads to several places, with the reason of the first.
        """
        try:
            places = resolve(name, mesh, self.imports, self.domain, local_port=local_port).candidates
        except Unresolved as error:
            raise Unroutable(Reason(error.reason.value), error.detail) from error
        found: list[Candidate] = []
        first_failure: Unroutable | None = None
        for place in places:
            try:
                found += self._ways(place, mesh)
            except Unroutable as failure:
                first_failure = first_failure or failure
        if not found:
            assert first_failure is not None
            raise first_failure
        return found

    def _ways(self, place: Place, mesh: Mesh) -> list[Candidate]:
        is_own = place.network == self.network
        target = place.target
        if isinstance(target, ServiceTarget) and not is_service_name(target.service):
            raise Unroutable(Reason.NO_ROUTE, f"{target.service!r} is not a valid service name")  # an invalid record
        transports = [transport for transport in self.transports if transport.traits.to_gateway is not is_own]
        found = [candidate for transport in transports for candidate in transport.candidates(place, mesh)]
        if not found:
            lacks = " and ".join(transport.lacks for transport in transports)
            raise Unroutable(Reason.NO_ROUTE, f"network {place.network!r} has {lacks}")
        if not is_own and self.keys.get(self.network, place.network) is None:
            raise Unroutable(Reason.NO_KEY, f"no key signs streams from {self.network!r} to {place.network!r}")
        return found if is_own else self.order(found)
