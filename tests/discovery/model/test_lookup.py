"""Resolution: from a name to the places that can serve it."""

from ipaddress import ip_address

import pytest

from discovery.model.addresses import BadAddress, parse_endpoint
from discovery.model.imports import ImportRule, Imports
from discovery.model.lookup import Place, Unresolved, UnresolvedReason, reached, resolve
from discovery.model.mesh import Kind, Mesh, NetworkSpec, Record, ServiceSpec
from discovery.model.names import AddressTarget, NameReason, PlainName, ServiceTarget

D = "svc.mesh.internal"


def service(network: str, name: str, *ports: int) -> Record[ServiceSpec]:
    spec = ServiceSpec(name=name, ports={str(port): [] for port in ports})
    return Record(kind=Kind.SERVICE, network=network, id=name, revision=1, spec=spec)


MESH = Mesh.of(
    [
        Record(kind=Kind.NETWORK, network="a", id="a", revision=1, spec=NetworkSpec()),
        service("b", "orders.shop.svc", 8443),
        service("b", "pay.shop.svc", 443, 8443),
        service("b", "pay.shop.old", 443),
        service("c", "orders.shop.svc", 9443, 443),
        service("c", "orders.shop.svc.deeper", 443),
        service("d", "orders.shop.svc", 443),
    ]
)
IMPORTS = Imports(
    [
        ImportRule(names=("pay.shop.svc",), sources=("b",)),
        ImportRule(names=("gone.shop.svc",), sources=("b", "nowhere")),
        ImportRule(names=("*.shop.svc",), sources=("c", "b")),
    ]
)


def why(name: str, local_port: int | None = None) -> UnresolvedReason:
    with pytest.raises(Unresolved) as caught:
        resolve(name, MESH, IMPORTS, D, local_port=local_port)
    assert caught.value.detail
    return caught.value.reason


def places(name: str, local_port: int | None = None) -> list[tuple[str, object, bool]]:
    found = resolve(name, MESH, IMPORTS, D, local_port=local_port).candidates
    return [(place.network, place.target, place.service is not None) for place in found]


def test_an_address_needs_only_its_network() -> None:
    target = AddressTarget("a", ip_address("10.1.0.5"), 8443)
    assert places(f"p8443-10-1-0-5.a.{D}") == [("a", target, False)]
    assert resolve(target, MESH, IMPORTS, D).asked is target
    assert why(f"p8443-10-1-0-5.x.{D}") is UnresolvedReason.UNKNOWN_NETWORK


def test_a_service_by_its_full_name_or_a_prefix() -> None:
    target = ServiceTarget("b", "orders.shop.svc", 8443)
    for name in (f"p8443-orders.shop.b.{D}", f"_8443.orders.shop.svc._b.{D}"):
        assert places(name) == [("b", target, True)]
    assert places(f"p443-orders.shop.svc.deeper.c.{D}")[0][1] == ServiceTarget("c", "orders.shop.svc.deeper", 443)


def test_refused_services() -> None:
    assert why(f"p443-orders.shop.svc.c.{D}") is UnresolvedReason.AMBIGUOUS_NAME
    assert why(f"p443-pay.shop.b.{D}") is UnresolvedReason.AMBIGUOUS_NAME
    assert why(f"p443-orders.sho.b.{D}") is UnresolvedReason.UNKNOWN_NAME
    assert why(f"p9-orders.shop.b.{D}") is UnresolvedReason.UNKNOWN_NAME
    assert why(f"p443-orders.shop.x.{D}") is UnresolvedReason.UNKNOWN_NETWORK


def test_a_plain_name_needs_an_import() -> None:
    assert why("pay.shop.old") is UnresolvedReason.UNKNOWN_NAME
    assert why("gone.shop.svc") is UnresolvedReason.UNKNOWN_NAME
    assert why("other.shop.svc") is UnresolvedReason.UNKNOWN_NAME


def test_networks_are_in_the_order_of_the_import() -> None:
    resolution = resolve("Orders.shop.svc.", MESH, IMPORTS, D, local_port=443)
    assert resolution.asked == PlainName("orders.shop.svc")
    assert resolution.rule is IMPORTS.rules[2]
    assert [place.target for place in resolution.candidates] == [
        ServiceTarget("c", "orders.shop.svc", 443),  # the relay's own port
        ServiceTarget("b", "orders.shop.svc", 8443),  # the only one
    ]


def test_the_port_of_a_plain_name() -> None:
    assert places("pay.shop.svc", 8443)[0][1] == ServiceTarget("b", "pay.shop.svc", 8443)
    assert places("pay.shop.svc")[0][1] == ServiceTarget("b", "pay.shop.svc", 443)
    assert why("pay.shop.svc", 10443) is UnresolvedReason.AMBIGUOUS_PORT
    # If the port is ambiguous in one network only, the others are still used.
    assert [place[0] for place in places("orders.shop.svc", 10443)] == ["b"]


def test_an_error_says_what_is_wrong_with_a_name() -> None:
    with pytest.raises(Unresolved) as caught:
        resolve(b"shop.b.svc.mesh.internal", MESH, IMPORTS, D)
    assert caught.value.reason is UnresolvedReason.BAD_NAME
    assert caught.value.bad_name is not None
    assert caught.value.bad_name.reason is NameReason.INCOMPLETE
    assert why("a b.c") is UnresolvedReason.BAD_NAME


# --- the check at a gateway -----------------------------------------------------------------------------------------


def asked_of(network: str, name: str, target: str) -> Place:
    try:
        where, port = parse_endpoint(target)
    except BadAddress:
        service, _, text = target.rpartition(":")
        return reached(name, service, int(text), MESH, network, D)
    return reached(name, where, port, MESH, network, D)


@pytest.mark.parametrize(
    ("network", "name", "target"),
    [
        ("b", f"p8443-10-1-0-5.b.{D}", "10.1.0.5:8443"),
        ("b", f"_8443._fd00--5._b.{D}", "[fd00::5]:8443"),
        ("b", f"P8443-xFD000000000000000000000000000005.B.{D}.", "[fd00::5]:8443"),
        ("b", "orders.shop.svc", "orders.shop.svc:8443"),
        ("b", "Orders.Shop.svc.", "orders.shop.svc:8443"),
        ("b", f"p8443-orders.shop.b.{D}", "orders.shop.svc:8443"),
        ("b", f"_8443.orders.shop.svc._b.{D}", "orders.shop.svc:8443"),
        ("b", "pay.shop.svc", "pay.shop.svc:443"),
        ("b", "pay.shop.svc", "pay.shop.svc:8443"),
        ("c", "orders.shop.svc", "orders.shop.svc:443"),
    ],
)
def test_a_target_that_the_name_resolves_to(network: str, name: str, target: str) -> None:
    place = asked_of(network, name, target)
    assert place.network == network
    assert (place.service is None) is isinstance(place.target, AddressTarget)
    shown = place.target.address if isinstance(place.target, AddressTarget) else place.target.service
    assert str(shown) in target
    assert target.endswith(f":{place.target.port}")


@pytest.mark.parametrize(
    ("network", "name", "target", "reason"),
    [
        ("b", f"p8443-10-1-0-5.b.{D}", "10.1.0.6:8443", "wrong_target"),
        ("b", f"p8443-10-1-0-5.b.{D}", "10.1.0.5:22", "wrong_target"),
        ("b", f"p8443-10-1-0-5.b.{D}", "orders.shop.svc:8443", "wrong_target"),
        ("b", f"p8443-10-1-0-5.c.{D}", "10.1.0.5:8443", "wrong_target"),
        ("b", f"p8443-xfd000000000000000000000000000005.b.{D}", "[fd00::6]:8443", "wrong_target"),
        ("b", f"p8443-orders.shop.c.{D}", "orders.shop.svc:8443", "wrong_target"),
        ("b", f"p8443-orders.shop.b.{D}", "orders.shop.svc:443", "wrong_target"),
        ("b", f"p443-orders.shop.b.{D}", "pay.shop.svc:443", "wrong_target"),
        ("b", f"p8443-orders.shop.b.{D}", "10.1.0.5:8443", "wrong_target"),
        ("b", "orders.shop.svc", "pay.shop.svc:443", "wrong_target"),
        ("b", "orders.shop.svc", "10.77.0.6:22", "wrong_target"),
        ("b", "gone.shop.svc", "10.77.0.6:22", "wrong_target"),
        ("b", "gone.shop.svc", "gone.shop.svc:443", "unknown_name"),
        ("b", f"p443-pay.shop.b.{D}", "pay.shop.svc:443", "ambiguous_name"),
        ("b", f"p443-pay.shop.b.{D}", "pay.shop.old:443", "ambiguous_name"),
        ("c", f"p443-orders.shop.svc.c.{D}", "orders.shop.svc:443", "ambiguous_name"),
        ("x", "orders.shop.svc", "orders.shop.svc:443", "unknown_name"),
        ("b", f"shop.b.{D}", "orders.shop.svc:8443", "bad_name"),
        ("b", "10.1.0.5", "10.1.0.5:443", "bad_name"),
    ],
)
def test_a_target_that_the_name_does_not_resolve_to(network: str, name: str, target: str, reason: str) -> None:
    with pytest.raises(Unresolved) as caught:
        asked_of(network, name, target)
    assert caught.value.reason == reason
    if reason == "wrong_target" and network in name.removesuffix(D)[-4:]:
        assert target in caught.value.detail
