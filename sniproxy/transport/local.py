"""Services of the relay's own network, which it dials itself if `deliver` allows it."""

from discovery.model.addresses import Address, format_endpoint, refusal
from discovery.model.lookup import Place
from discovery.model.mesh import Mesh
from discovery.model.names import AddressTarget
from sniproxy.access.loop_guard import STOPPED
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate, Traits, TransportConfig, endpoint_in
from sniproxy.transport.errors import Unroutable

LOCAL = Traits(name="local", to_gateway=False)


class LocalTransport:
    """Finds services of the own network. The router asks it about no other network."""

    traits = LOCAL
    lacks = "no service here"

    def __init__(self, config: TransportConfig) -> None:
        self._config = config

    def candidates(self, place: Place, mesh: Mesh) -> list[Candidate]:
        """Find the endpoints. Raises Unroutable: no_endpoint, denied."""
        target = place.target
        header = None
        if isinstance(target, AddressTarget):
            endpoints = [(target.address, target.port)]
        else:
            assert place.service is not None
            header = place.service.spec.proxy_version
            texts = place.service.spec.ports.get(str(target.port), ())
            endpoints = [endpoint for text in texts if (endpoint := endpoint_in(text)) is not None]
            if not endpoints:
                raise Unroutable(
                    Reason.NO_ENDPOINT, f"service {target.service!r} has no endpoint for port {target.port}"
                )
        found = []
        denied = ""
        for address, port in endpoints:
            shown = format_endpoint(address, port)
            why = undeliverable(address, port, mesh, self._config)
            if why is not None:
                denied = denied or f"{shown} {why}"
                continue
            found.append(
                Candidate(
                    traits=LOCAL,
                    network=place.network,
                    target=shown,
                    address=str(address),
                    port=port,
                    proxy_version=header,
                    meant=target,
                )
            )
        if not found:
            raise Unroutable(Reason.DENIED, denied)
        return found

    def offers(self, candidate: Candidate, mesh: Mesh) -> bool:  # noqa: ARG002
        """Return True: there are no warm connections in the own network, so nothing depends on this."""
        return True


def undeliverable(address: Address, port: int, mesh: Mesh, config: TransportConfig) -> str | None:
    """Return why this address and port may not be dialled as a service, None if it may."""
    if not config.deliver.allows(address, port):
        return "is not in relay.deliver"
    why = refusal(address, config.deliver)
    if why is not None:
        return f"is {why}"
    return STOPPED if config.guard.stops(address, port, mesh) else None
