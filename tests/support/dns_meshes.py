"""A small mesh to resolve in: networks a (ours), b and c, two services with a common prefix, a few relays."""

from collections.abc import Sequence

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Kind, Mesh, NetworkSpec, Record, RelaySpec, ServiceSpec

DOMAIN = "svc.mesh.internal"
ORDERS = "orders.shop.svc.cluster.local"


def relay(*addresses: str, ports: Sequence[int] = (443,), network: str = "a") -> Record[RelaySpec]:
    record_id = "relay-" + "-".join(addresses).replace(":", "-").replace(".", "-").strip("-")
    spec = RelaySpec(addresses=list(addresses), ports=list(ports))
    return Record(kind=Kind.RELAY, network=network, id=record_id, revision=7, spec=spec)


def service(network: str, name: str, *ports: int) -> Record[ServiceSpec]:
    spec = ServiceSpec(name=name, ports={str(port): [] for port in ports})
    return Record(kind=Kind.SERVICE, network=network, id=name, revision=8, spec=spec)


def mesh(*relays: Record[RelaySpec]) -> Mesh:
    networks = [
        Record(kind=Kind.NETWORK, network=network, id=network, revision=1, spec=NetworkSpec()) for network in ("b", "c")
    ]
    services = [
        service("b", ORDERS, 8443),
        service("b", "bills.shop.svc.cluster.local", 443, 8443),
        service("b", "bills.shop.svc.cluster.test", 443),
        service("c", "stock.depot.example", 443, 9443),
    ]
    return Mesh.of([*networks, *services, *relays])


def imports(prefer: str = "remote") -> Imports:
    names = ("*.shop.svc.cluster.local", "stock.depot.example")
    return Imports([ImportRule(names=names, sources=("b", "c"), prefer=prefer)])  # type: ignore[arg-type]
