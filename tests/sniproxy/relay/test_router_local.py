"""Routes inside the relay's own network, and everything there that must never be dialled."""

import pytest

from discovery.model.addresses import Address, TargetList
from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import (
    Kind,
    Mesh,
    RelaySpec,
    ServiceSpec,
)
from sniproxy.access.loop_guard import LoopGuard
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.errors import Unroutable
from sniproxy.transport.local import LOCAL
from tests.support.fixed_discovery import record
from tests.support.routes import BASE, DOMAIN, EVERYTHING, NAME, TURN_MESH, compact, gateway, refused, router


def local(*endpoints: str, ports: dict[str, list[str]] | None = None) -> Mesh:
    """A service of the relay's own network."""
    spec = ServiceSpec(name=NAME, ports=ports or {"8443": list(endpoints)})
    return Mesh.of([*BASE, record(Kind.SERVICE, "a", NAME, spec)])


OWN = Imports([ImportRule(names=(NAME,), sources=("a",), prefer="local")])


def test_a_local_service_is_dialled_itself() -> None:
    mesh = local("10.0.1.5:9443", "10.0.1.6:9443")
    found = router(imports=OWN, deliver=TargetList.parse(["10.0.1.0/24:9443"])).candidates(NAME, mesh, 443)
    assert [(c.traits, c.target, c.addressee) for c in found] == [
        (LOCAL, "10.0.1.5:9443", ""),
        (LOCAL, "10.0.1.6:9443", ""),
    ]
    assert str(found[0]) == "local:10.0.1.5:9443"


def test_a_local_address() -> None:
    found = router(deliver=TargetList.parse(["10.0.1.5/32:8443"])).candidates(
        compact("10.0.1.5", to="a"), TURN_MESH, 443
    )
    assert [(c.traits, c.address, c.port) for c in found] == [(LOCAL, "10.0.1.5", 8443)]


def test_by_default_nothing_local_is_delivered() -> None:
    assert refused(local("10.0.1.5:8443"), NAME, imports=OWN) is Reason.DENIED
    assert refused(TURN_MESH, compact("10.0.1.5", to="a")) is Reason.DENIED


def test_only_what_deliver_lists() -> None:
    mesh = local("10.0.1.5:22", "10.0.2.5:8443", "10.0.1.5:8443")
    found = router(imports=OWN, deliver=TargetList.parse(["10.0.1.0/24:8443"])).candidates(NAME, mesh, 443)
    assert [candidate.target for candidate in found] == ["10.0.1.5:8443"]


def test_a_local_service_without_endpoints() -> None:
    mesh = local(ports={"8443": []})
    assert refused(mesh, NAME, imports=OWN, deliver=EVERYTHING) is Reason.NO_ENDPOINT
    assert refused(local("not an endpoint"), NAME, imports=OWN, deliver=EVERYTHING) is Reason.NO_ENDPOINT


NEVER = [
    "169.254.169.254",
    "127.0.0.1",
    "127.8.9.10",
    "0.0.0.0",
    "255.255.255.255",
    "224.0.0.251",
    "::1",
    "::",
    "fe80::1",
]
SPELLED = ["2130706433", "0x7f000001", "017700000001", "127.1", "0177.0.0.1", "::ffff:169.254.169.254"]


@pytest.mark.parametrize("address", NEVER)
def test_ssrf_by_address_name(address: str) -> None:
    name = compact(address, 80, to="a")
    assert refused(TURN_MESH, name, deliver=EVERYTHING) in {Reason.DENIED, Reason.BAD_NAME}


@pytest.mark.parametrize("address", [*NEVER, *SPELLED])
def test_ssrf_by_record(address: str) -> None:
    text = f"[{address}]:80" if ":" in address else f"{address}:80"
    reason = refused(local(text), NAME, imports=OWN, deliver=EVERYTHING)
    assert reason is (Reason.NO_ENDPOINT if address in SPELLED and ":" not in address else Reason.DENIED)


@pytest.mark.parametrize(
    "label",
    [
        "2130706433",
        "0x7f000001",
        "0x7f-0-0-1",
        "0177-0-0-1",
        "127-1",
        "127-0-0-01",
        "x00000000000000000000ffff7f000001",
        "x" + "0" * 31,
        "169-254-169-254-",
        "256-0-0-1",
    ],
)
@pytest.mark.parametrize("form", ["p80-{}.a." + DOMAIN, "_80._{}._a." + DOMAIN])
def test_ssrf_by_spelling(label: str, form: str) -> None:
    """Each address has one spelling, and IPv4-mapped addresses have none."""
    assert refused(TURN_MESH, form.format(label), deliver=EVERYTHING) in {Reason.BAD_NAME, Reason.UNKNOWN_NAME}


def test_a_lifted_refusal_lifts_that_range_alone() -> None:
    lifted = TargetList.parse(["0.0.0.0/0", "127.0.0.0/8"])
    assert router(deliver=lifted).candidates(compact("127.0.0.1", to="a"), TURN_MESH, 443)
    assert refused(TURN_MESH, compact("169.254.169.254", to="a"), deliver=lifted) is Reason.DENIED


@pytest.mark.parametrize(
    ("address", "port"),
    [
        ("10.0.0.9", 443),  # the relay itself
        ("10.0.0.7", 3478),  # the TURN server
        ("10.0.0.8", 7443),  # a gateway of this network
        ("10.0.0.2", 8600),  # a discovery server, from the configuration
        ("10.0.0.50", 8690),  # the admin server, which listens on every address of this host
    ],
)
def test_parts_of_crossnet_are_no_services(address: str, port: int) -> None:
    def is_own(asked: Address) -> bool:
        return str(asked) == "10.0.0.50"

    records = [
        record(Kind.RELAY, "a", "relay-1", RelaySpec(addresses=["10.0.0.9"], ports=[443])),
        gateway("10.0.0.8:7443", to="a"),
    ]
    mesh = TURN_MESH.apply(records)
    guard = LoopGuard("a", [("10.0.0.2", 8600), ("0.0.0.0", 8690)], is_own=is_own)
    own = router(deliver=EVERYTHING, guard=guard)
    with pytest.raises(Unroutable, match="would loop") as failed:
        own.candidates(compact(address, port, to="a"), mesh, 443)
    assert failed.value.reason is Reason.DENIED
    assert own.candidates(compact(address, port + 1, to="a"), mesh, 443)
    assert own.candidates(compact("10.0.0.51", port, to="a"), mesh, 443)
