"""Which additional ports a relay should listen on: those of the services that its clients may reach by name. Sans-IO.

A plain service name contains no port, so the local port selects among the ports of the service: a client of `orders.shop.svc…:8443`
must find the relay on 8443. Only services that this network imports count, so another network cannot make us listen. Its own
services count if an operator asks for that: usually clients reach them without the relay.
"""

from discovery.model.imports import Imports
from discovery.model.mesh import Mesh

MAX_PORTS = 256
"""Each listener costs a descriptor for every address. If a mesh has more ports than this, the port range is too wide."""


def service_ports(mesh: Mesh, network: str, imports: Imports, low: int, high: int, *, own: bool = False) -> list[int]:
    """Return the ports between `low` and `high` of the services that `network` imports: the 256 lowest, sorted.

    Args:
        own: also those that it imports from itself.
    """
    found = set()
    for other in mesh.networks if own else mesh.networks - {network}:
        for record in mesh.services(other):
            rule = imports.rule_for(record.spec.name)
            if rule is not None and other in rule.sources:
                found |= {int(port) for port in record.spec.ports if low <= int(port) <= high}
    return sorted(found)[:MAX_PORTS]
