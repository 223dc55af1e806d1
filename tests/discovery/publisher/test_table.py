"""Conversion of Kubernetes objects to service records."""

from typing import Any

import msgspec
import pytest

from discovery.model.mesh import ServiceSpec, check_spec
from discovery.model.spec import MAX_ENDPOINTS, HealthCheck, Kind, is_record_id
from discovery.publisher.objects import ExportObject, Metadata, ServiceObject, SliceObject
from discovery.publisher.table import ITSELF, MAX_MEMBERS, Member, ServiceTable, record_id

NAME = ("shop", "orders")


def service(export: str, *ports: dict[str, Any], **annotations: str) -> ServiceObject:
    metadata = {"namespace": "shop", "name": "orders", "annotations": {"crossnet.io/export": export} | annotations}
    return msgspec.convert({"metadata": metadata, "spec": {"ports": list(ports)}}, ServiceObject)


def slice_of(name: str, *endpoints: Any, ports: Any = ({"port": 9443},), kind: str = "IPv4") -> SliceObject:
    metadata = {"namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": "orders"}}
    return msgspec.convert(
        {"metadata": metadata, "addressType": kind, "endpoints": list(endpoints), "ports": list(ports)}, SliceObject
    )


def spec_of(table: ServiceTable) -> ServiceSpec | None:
    return table.publication(NAME).specs.get(ITSELF)


def reasons(table: ServiceTable) -> list[str]:
    return [finding.reason for finding in table.publication(NAME).findings]


def ports_of(table: ServiceTable) -> dict[str, list[str]]:
    spec = spec_of(table)
    assert spec is not None
    check_spec(Kind.SERVICE, "b", spec)
    return spec.ports


def test_which_ports_are_exported() -> None:
    https, plain, datagrams = (
        {"name": "https", "port": 8443},
        {"name": "http", "port": 80},
        {"port": 53, "protocol": "UDP"},
    )
    for asked, ports in (
        ("true", ["8443", "80"]),
        ("https", ["8443"]),
        ("80, https", ["8443", "80"]),
        ("53", None),
        ("false", None),
        ("", None),
        ("other", None),
    ):
        table = ServiceTable("cluster.local")
        table.put_service(service(asked, https, plain, datagrams))
        spec = spec_of(table)
        assert (list(spec.ports) if spec is not None else None) == ports


def test_only_ready_endpoints_that_may_be_dialled_are_published() -> None:
    table = ServiceTable("cluster.local")
    table.put_service(service("true", {"port": 8443}))
    table.put_slice(
        slice_of(
            "s4",
            {"addresses": ["10.1.0.5"], "conditions": {"ready": True}},
            {"addresses": ["10.1.0.6"], "conditions": {"ready": False}},
            {"addresses": ["10.1.0.7"], "conditions": {}},
            {"addresses": ["10.1.0.8"]},
            {"addresses": ["127.0.0.1"]},
            {"addresses": ["169.254.1.1"]},
            {"addresses": ["nonsense"]},
        )
    )
    table.put_slice(slice_of("s6", {"addresses": ["fd00::5"]}, kind="IPv6"))
    table.put_slice(slice_of("names", {"addresses": ["x.example"]}, kind="FQDN"))
    assert ports_of(table) == {"8443": ["10.1.0.5:9443", "10.1.0.7:9443", "10.1.0.8:9443", "[fd00::5]:9443"]}
    table.delete_slice(slice_of("s4"))
    assert ports_of(table) == {"8443": ["[fd00::5]:9443"]}


ENDS = {"ready": False, "serving": True, "terminating": True}
GONE = {"ready": False, "serving": False, "terminating": True}


@pytest.mark.parametrize(
    ("conditions", "published"),
    [
        ([{"ready": True}, ENDS], [0]),
        ([ENDS, ENDS, GONE], [0, 1]),
        ([ENDS, {"ready": False}], [0]),
        ([{"ready": False, "serving": True}, {"ready": False, "terminating": True}], []),
        ([{"ready": False}, {}], [1]),
    ],
)
def test_endpoints_that_end_and_still_serve_are_the_last_resort(conditions: Any, published: list[int]) -> None:
    """As kube-proxy uses them (KEP-1669): when nothing else is ready, in any EndpointSlice."""
    table = ServiceTable("cluster.local")
    table.put_service(service("true", {"port": 8443}))
    for number, each in enumerate(conditions):
        table.put_slice(slice_of(f"s{number}", {"addresses": [f"10.1.0.{number}"], "conditions": each}))
    assert ports_of(table) == {"8443": [f"10.1.0.{number}:9443" for number in published]}
    assert reasons(table) == []


def test_the_last_resort_is_for_each_port() -> None:
    """While a rollout changes the number of a named port, EndpointSlices differ in their ports."""
    table = ServiceTable("cluster.local")
    table.put_service(service("true", {"name": "https", "port": 8443}, {"name": "old", "port": 80}))
    table.put_slice(
        slice_of(
            "before",
            {"addresses": ["10.1.0.5"], "conditions": ENDS},
            ports=[{"name": "https", "port": 1}, {"name": "old", "port": 2}],
        )
    )
    table.put_slice(slice_of("after", {"addresses": ["10.1.0.6"]}, ports=[{"name": "https", "port": 3}]))
    assert ports_of(table) == {"8443": ["10.1.0.6:3"], "80": ["10.1.0.5:2"]}


@pytest.mark.parametrize("conditions", [{"ready": False}, GONE, ENDS, {"ready": True}])
def test_a_service_can_publish_endpoints_that_are_not_ready(conditions: Any) -> None:
    table = ServiceTable("cluster.local")
    found = service("true", {"port": 8443})
    found.spec.publishNotReadyAddresses = True
    table.put_service(found)
    table.put_slice(slice_of("s", {"addresses": ["10.1.0.5"], "conditions": conditions}, {"addresses": ["10.1.0.6"]}))
    assert ports_of(table) == {"8443": ["10.1.0.5:9443", "10.1.0.6:9443"]}


def headless(export: str = "true", *ports: dict[str, Any]) -> ServiceObject:
    found = service(export, *(ports or ({"name": "https", "port": 8443},)))
    found.spec.clusterIP = "None"
    return found


PODS = [
    {"addresses": ["10.1.0.5"], "hostname": "orders-0"},
    {"addresses": ["10.1.0.6"], "hostname": "orders-1", "conditions": {"ready": False}},
    {"addresses": ["10.1.0.7"], "hostname": "orders-2", "conditions": ENDS},
    {"addresses": ["10.1.0.8"]},
]
HTTPS = [{"name": "https", "port": 9443}]


def test_pods_of_a_headless_service_have_records_of_their_own() -> None:
    table = ServiceTable("cluster.local")
    table.put_service(headless())
    table.put_slice(slice_of("s", *PODS, ports=HTTPS))
    table.put_slice(slice_of("s6", {"addresses": ["fd00::5"], "hostname": "orders-0"}, ports=HTTPS, kind="IPv6"))
    made = table.publication(NAME)
    assert made.findings == []
    assert {member.hostname: spec.ports["8443"] for member, spec in made.specs.items()} == {
        "": ["10.1.0.5:9443", "10.1.0.8:9443", "[fd00::5]:9443"],
        "orders-0": ["10.1.0.5:9443", "[fd00::5]:9443"],
        "orders-2": ["10.1.0.7:9443"],
    }
    for spec in made.specs.values():
        check_spec(Kind.SERVICE, "b", spec)
    pod = made.specs[Member("orders-0")]
    assert (pod.name, pod.member_of) == ("orders-0.orders.shop.svc.cluster.local", "orders.shop.svc.cluster.local")
    assert pod.port_names == {"https": 8443}
    assert len({record_id("k8s", NAME, member) for member in made.specs}) == 3
    assert record_id("k8s", NAME, Member("orders-0")).startswith("k8s-orders-0-orders-shop-")


def test_pods_that_are_not_ready_have_a_record_where_the_service_says_so() -> None:
    table = ServiceTable("cluster.local")
    found = headless()
    found.spec.publishNotReadyAddresses = True
    table.put_service(found)
    table.put_slice(slice_of("s", *PODS, ports=HTTPS))
    assert {member.hostname for member in table.publication(NAME).specs} == {"", "orders-0", "orders-1", "orders-2"}


def test_only_pods_of_headless_services_have_records() -> None:
    table = ServiceTable("cluster.local")
    table.put_service(service("true", {"name": "https", "port": 8443}))
    table.put_slice(slice_of("s", *PODS, ports=HTTPS))
    assert set(table.publication(NAME).specs) == {ITSELF}


def test_pods_without_a_possible_name_are_reported() -> None:
    table = ServiceTable("cluster.local")
    table.put_service(headless())
    table.put_slice(slice_of("s", {"addresses": ["10.1.0.5"], "hostname": "Bad_Name"}, ports=HTTPS))
    assert set(table.publication(NAME).specs) == {ITSELF}
    assert reasons(table) == ["InvalidHostname"]
    for number in range(12):
        many = [{"addresses": [f"10.1.{number}.{last}"], "hostname": f"o-{number}-{last}"} for last in range(1, 101)]
        table.put_slice(slice_of(f"s{number}", *many, ports=HTTPS))
    assert len(table.publication(NAME).specs) == MAX_MEMBERS + 1
    assert reasons(table) == ["TooManyEndpoints", "InvalidHostname", "TooManyPods"]


def test_endpoints_that_cannot_be_used_are_reported() -> None:
    table = ServiceTable("cluster.local")
    table.put_service(service("true", {"port": 8443}))
    table.put_slice(slice_of("s4", {"addresses": ["127.0.0.1"]}, {"addresses": ["nonsense"]}))
    table.put_slice(slice_of("s-names", {"addresses": ["x.example"]}, kind="FQDN"))
    (finding,) = table.publication(NAME).findings
    assert finding.reason == "RefusedAddress"
    assert "x.example (FQDN), 127.0.0.1 (loopback), nonsense (not an address)" in finding.message or (
        "127.0.0.1 (loopback), nonsense (not an address), x.example (FQDN)" in finding.message
    )


def test_a_name_that_is_too_long_is_reported() -> None:
    table = ServiceTable(".".join(["d" * 63] * 4))
    table.put_service(service("true", {"port": 8443}))
    assert spec_of(table) is None
    assert reasons(table) == ["InvalidName"]


def test_more_endpoints_than_a_record_holds() -> None:
    table = ServiceTable("cluster.local")
    table.put_service(service("true", {"port": 8443}))
    for number in range(12):
        table.put_slice(slice_of(f"s{number}", *({"addresses": [f"10.1.{number}.{last}"]} for last in range(1, 101))))
    assert len(ports_of(table)["8443"]) == MAX_ENDPOINTS
    assert reasons(table) == ["TooManyEndpoints"]


def test_the_table_is_bounded(caplog: Any) -> None:
    table = ServiceTable("cluster.local", max_objects=2)
    for number in range(4):
        table.put_slice(slice_of(f"s{number}"))
    assert len(table.slice_names()) == 2
    assert caplog.text.count("more EndpointSlices than are read") == 1
    for name in ("one", "two", "orders"):
        found = service("true", {"port": 8443})
        found.metadata.name = name
        table.put_service(found)
    assert reasons(table) == ["TooManyServices"]
    assert spec_of(table) is None
    assert table.retain_slices([]) == {NAME}
    assert table.slice_names() == set()


def test_names_and_ids() -> None:
    table = ServiceTable("cluster.local")
    table.put_service(service("true", {"port": 1}, **{"crossnet.io/proxy-protocol": "true"}))
    assert spec_of(table) == ServiceSpec(name="orders.shop.svc.cluster.local", ports={"1": []}, proxy_protocol=True)
    for annotation, version in (("v1", 1), ("v2", 2), ("true", 2), ("false", None), ("v3", None)):
        table.put_service(service("true", {"port": 1}, **{"crossnet.io/proxy-protocol": annotation}))
        published = spec_of(table)
        assert published is not None
        assert published.proxy_version == version
    ids = {
        record_id("k8s", (namespace, name)) for namespace in ("a", "a-b", "n" * 63) for name in ("b-c", "c", "x" * 63)
    }
    assert len(ids) == 9
    assert all(is_record_id(item) and item.startswith("k8s-") for item in ids)


@pytest.mark.parametrize(
    ("annotation", "health"),
    [
        ("tcp", HealthCheck(check="tcp")),
        ("tls 30", HealthCheck(check="tls", interval_s=30)),
        (" tls 30s ", HealthCheck(check="tls", interval_s=30)),
        ("tls 0", None),
        ("http", None),
        ("", None),
    ],
)
def test_checks_are_asked_for_by_an_annotation(annotation: str, health: HealthCheck | None) -> None:
    table = ServiceTable("cluster.local")
    found = service("true", {"name": "https", "port": 8443})
    assert found.metadata.annotations is not None
    found.metadata.annotations["crossnet.io/health-check"] = annotation
    table.put_service(found)
    made = spec_of(table)
    assert made is not None
    assert made.health == health


def test_records_have_aliases_in_the_cluster_set() -> None:
    table = ServiceTable("cluster.local", clusterset_domain="clusterset.local", cluster="b")
    table.put_service(headless())
    table.put_slice(slice_of("s", PODS[0], ports=HTTPS))
    specs = table.publication(NAME).specs
    assert {spec.name: (spec.alias_of, spec.member_of) for spec in specs.values()} == {
        "orders.shop.svc.cluster.local": ("", ""),
        "orders-0.orders.shop.svc.cluster.local": ("", "orders.shop.svc.cluster.local"),
        "orders.shop.svc.clusterset.local": ("orders.shop.svc.cluster.local", ""),
        "orders-0.b.orders.shop.svc.clusterset.local": (
            "orders-0.orders.shop.svc.cluster.local",
            "orders.shop.svc.clusterset.local",
        ),
    }
    assert len({record_id("k8s", NAME, member) for member in specs}) == 4
    for spec in specs.values():
        check_spec(Kind.SERVICE, "b", spec)


def test_a_service_export_may_come_before_and_after_its_service() -> None:
    export = ExportObject(Metadata("orders", "shop"))
    found = service("", {"port": 8443})
    table = ServiceTable("cluster.local", reads_exports=True)
    assert table.put_export(export) == NAME
    assert (reasons(table), spec_of(table)) == (["NoService"], None)
    assert table.exported() == {NAME}
    table.put_service(found)
    assert (reasons(table), ports_of(table)) == ([], {"8443": []})
    table.delete_export(export)
    assert (reasons(table), spec_of(table), table.exported()) == ([], None, set())
    table.put_export(export)
    assert ports_of(table) == {"8443": []}
    assert table.retain_exports([]) == {NAME}
    assert spec_of(table) is None
    table.put_export(export)
    assert table.retain_services([]) == {NAME}
    assert reasons(table) == ["NoService"]
    assert table.export(NAME) is export
