"""Which ports a relay should listen on besides its own: those of the services that its clients may reach by name. Sans-IO.

A plain service name says no port, so the local port chooses among a service's ports: a client of `orders.shop.svc…:8443` must find
the relay on 8443. Only services count that this network imports, so another network cannot make us listen.
"""

from discovery.model.imports import Imports
from discovery.model.mesh import Mesh

MAX_PORTS = 256
"""Listeners cost a descriptor each for every address; a mesh with more ports than this has a range that is too wide."""


def service_ports(mesh: Mesh, network: str, imports: Imports, low: int, high: int) -> list[int]:
    """Return the ports from `low` to `high` of the services that `network` imports from others: the 256 lowest, in order."""
    found = set()
    for other in mesh.networks - {network}:
        for record in mesh.services(other):
            rule = imports.rule_for(record.spec.name)
            if rule is not None and other in rule.sources:
                found |= {int(port) for port in record.spec.ports if low <= int(port) <= high}
    return sorted(found)[:MAX_PORTS]
