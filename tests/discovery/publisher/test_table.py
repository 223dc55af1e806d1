"""Conversion of Kubernetes objects to service records."""

from typing import Any

import msgspec
import pytest

from discovery.model.mesh import ServiceSpec, check_spec
from discovery.model.spec import MAX_ENDPOINTS, HealthCheck, Kind, is_record_id
from discovery.publisher.table import ServiceObject, ServiceTable, SliceObject, record_id

NAME = ("shop", "orders")


def service(export: str, *ports: dict[str, Any], **annotations: str) -> ServiceObject:
    metadata = {"namespace": "shop", "name": "orders", "annotations": {"crossnet.io/export": export} | annotations}
    return msgspec.convert({"metadata": metadata, "spec": {"ports": list(ports)}}, ServiceObject)


def slice_of(name: str, *endpoints: Any, ports: Any = ({"port": 9443},), kind: str = "IPv4") -> SliceObject:
    metadata = {"namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": "orders"}}
    return msgspec.convert(
        {"metadata": metadata, "addressType": kind, "endpoints": list(endpoints), "ports": list(ports)}, SliceObject
    )


def ports_of(table: ServiceTable) -> dict[str, list[str]]:
    spec = table.spec(NAME)
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
        spec = table.spec(NAME)
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


def test_more_endpoints_than_a_record_holds(caplog: Any) -> None:
    table = ServiceTable("cluster.local")
    table.put_service(service("true", {"port": 8443}))
    for number in range(12):
        table.put_slice(slice_of(f"s{number}", *({"addresses": [f"10.1.{number}.{last}"]} for last in range(1, 101))))
    assert len(ports_of(table)["8443"]) == MAX_ENDPOINTS
    assert "too many endpoints" in caplog.text


def test_the_table_is_bounded() -> None:
    table = ServiceTable("cluster.local", max_objects=2)
    for number in range(4):
        table.put_slice(slice_of(f"s{number}"))
    assert len(table.slice_names()) == 2
    assert table.retain_slices([]) == {NAME}
    assert table.slice_names() == set()


def test_names_and_ids() -> None:
    table = ServiceTable("cluster.local")
    table.put_service(service("true", {"port": 1}, **{"crossnet.io/proxy-protocol": "true"}))
    assert table.spec(NAME) == ServiceSpec(name="orders.shop.svc.cluster.local", ports={"1": []}, proxy_protocol=True)
    for annotation, version in (("v1", 1), ("v2", 2), ("true", 2), ("false", None), ("v3", None)):
        table.put_service(service("true", {"port": 1}, **{"crossnet.io/proxy-protocol": annotation}))
        published = table.spec(NAME)
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
    made = table.spec(NAME)
    assert made is not None
    assert made.health == health
