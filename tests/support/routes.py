"""Records to route by, and the router of network a's relay."""

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from discovery.model.addresses import TargetList
from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import (
    AllocationSpec,
    AnyRecord,
    GatewaySpec,
    Kind,
    Mesh,
    NetworkSpec,
    ServiceSpec,
    TurnSpec,
)
from sniproxy.access.loop_guard import LoopGuard
from sniproxy.relay.router import Router
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import TransportConfig
from sniproxy.transport.errors import Unroutable
from sniproxy.transport.registry import make_transports
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.preamble import SigningKey
from tests.support.fixed_discovery import record

DOMAIN = "svc.mesh.internal"
NAME = "orders.shop.example"
EVERYTHING = TargetList.parse(["0.0.0.0/0", "[::/0]"])
NOTHING = TargetList()


def key(to: str) -> SigningKey:
    return SigningKey(id=f"a{to}", secret=bytes(32), from_network="a", to_network=to)


def router(**changes: Any) -> Router:
    """Network a's relay, with keys for b and c; the order of candidates is that of the records."""
    reach: dict[str, Any] = {"deliver": NOTHING, "direct": EVERYTHING, "guard": LoopGuard("a"), "zone": ""}
    reach |= {name: changes.pop(name) for name in reach if name in changes}
    made = Router(
        network="a",
        domain=DOMAIN,
        imports=Imports([ImportRule(names=(NAME, "*.shop.example"), sources=("b", "c"), prefer="local")]),
        keys=SigningKeys({"ab": key("b"), "ac": key("c")}),
        transports=make_transports(TransportConfig(network="a", **reach)),
    )
    return replace(made, **changes)


def network(name: str) -> AnyRecord:
    return record(Kind.NETWORK, name, name, NetworkSpec())


def turn(name: str = "turn-1", *addresses: str, low: int = 49152, high: int = 65535) -> AnyRecord:
    spec = TurnSpec(
        url="turn:10.0.0.7:3478?transport=tcp",
        relay_addresses=list(addresses or ("10.0.0.7",)),
        port_min=low,
        port_max=high,
    )
    return record(Kind.TURN, "a", name, spec)


def allocation(
    port: int = 50000,
    *,
    via: str = "a",
    server: str = "turn-1",
    to: str = "b",
    proto: list[str] | None = None,
    name: str = "",
) -> AnyRecord:
    spec = AllocationSpec(via=via, turn=server, port=port, gateway="gw-1", proto=proto or ["framed/1"])
    return record(Kind.ALLOCATION, to, name or f"gw-1-{via}-{server}-{port}", spec)


def gateway(
    address: str = "192.0.2.1:7443", *, to: str = "b", name: str = "gw-1", proto: str = "framed/1"
) -> AnyRecord:
    return record(Kind.GATEWAY, to, name, GatewaySpec(address=address, proto=[proto]))


def service(name: str = NAME, *, to: str = "b", ports: dict[str, list[str]] | None = None) -> AnyRecord:
    spec = ServiceSpec(name=name, ports={"8443": []} if ports is None else ports)
    return record(Kind.SERVICE, to, name, spec)


def compact(address: str, port: int = 8443, to: str = "b") -> str:
    parsed = ip_address(address)
    text = "x" + parsed.packed.hex() if parsed.version == 6 else str(parsed).replace(".", "-")
    return f"p{port}-{text}.{to}.{DOMAIN}"


def refused(mesh: Mesh, name: str, local_port: int = 443, **changes: Any) -> Reason:
    with pytest.raises(Unroutable) as failed:
        router(**changes).candidates(name, mesh, local_port)
    assert failed.value.detail
    return failed.value.reason


BASE = (network("a"), network("b"), turn())
TURN_MESH = Mesh.of([*BASE, allocation()])
