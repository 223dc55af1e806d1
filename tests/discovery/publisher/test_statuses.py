"""ServiceExports (KEP-1645): what they export, under which names, and what their status says."""

from pathlib import Path
from typing import Any

import pytest

from discovery.model.mesh import Kind, ServiceSpec
from discovery.publisher.events import EventTiming
from discovery.publisher.export import Finding
from discovery.publisher.objects import ExportObject, Metadata
from discovery.publisher.statuses import Condition, condition_of, is_written
from discovery.publisher.table import ITSELF, Publication
from tests.discovery.publisher.test_role import PORTS, publishing, put_service, put_slice, until
from tests.discovery.waiting import LogWaiter
from tests.support.kube_server import KubeServer, kube_server

ONCE = EventTiming(pause_s=0.0, refused_s=0.1)
NAME = "orders.shop.svc.cluster.local"
ALIAS = "orders.shop.svc.clusterset.local"


def test_what_a_condition_says() -> None:
    spec = {ITSELF: ServiceSpec(name="o.s", ports={"1": []})}
    alias = Finding("ExternalName", "an alias")
    assert condition_of(Publication(specs=spec)) == Condition("True", "Valid", "")
    assert condition_of(Publication(specs=spec, findings=[alias])) == Condition("True", "Valid", "an alias")
    assert condition_of(Publication(findings=[alias])) == Condition("False", "InvalidServiceType", "an alias")
    assert condition_of(Publication()) == Condition("False", "NoService", "")
    assert not is_written(ExportObject(Metadata("o")), Condition("True", "Valid", ""))


def put_export(kube: KubeServer, name: str = "orders", **fields: Any) -> None:
    kube.put("serviceexports", "shop", name, **fields)


def conditions(kube: KubeServer) -> dict[str, list[tuple[str, str, str]]]:
    return {
        found["metadata"]["name"]: [
            (each["type"], each["status"], each["reason"]) for each in found.get("status", {}).get("conditions", ())
        ]
        for found in kube.found("serviceexports")
    }


@pytest.mark.anyio
async def test_a_service_export_exports_the_service_of_its_name(serve: Any, tmp_path: Path) -> None:
    async with kube_server() as kube, serve() as at:
        put_export(kube)
        put_export(kube, "missing")
        put_service(kube, "orders", annotations={})
        put_service(kube, "private", annotations={})
        put_slice(kube, "orders-1", "orders", "10.1.0.1")
        domain = "clusterset.local"
        async with publishing(kube, at, tmp_path, timing=ONCE, service_exports=True, clusterset_domain=domain):
            await until(at, {NAME: ["10.1.0.1:9443"], ALIAS: ["10.1.0.1:9443"]})
            (alias,) = (
                record.spec
                for record in (await at.store.snapshot(Kind.SERVICE, "b")).records
                if record.spec.name == ALIAS
            )
            assert (alias.alias_of, alias.port_names) == (NAME, {"https": 8443})
            await kube.until(lambda: all(conditions(kube).values()))
            assert conditions(kube) == {
                "orders": [("Valid", "True", "Valid")],
                "missing": [("Valid", "False", "NoService")],
            }
            put_service(kube, "missing", annotations={})  # the Service comes after its ServiceExport
            await kube.until(lambda: conditions(kube)["missing"] == [("Valid", "True", "Valid")])
            kube.delete("serviceexports", "shop", "orders")
            await until(at, {"missing.shop.svc.cluster.local": [], "missing.shop.svc.clusterset.local": []})
            put_export(kube)
            put_service(kube, "orders", annotations={"crossnet.io/export": "false"})
            await kube.until(lambda: conditions(kube)["orders"] == [("Valid", "False", "Contradiction")])
            alias_spec = PORTS | {"type": "ExternalName", "externalName": "x.example"}
            kube.put("services", "shop", "orders", metadata={"annotations": {}}, spec=alias_spec)
            await kube.until(lambda: conditions(kube)["orders"] == [("Valid", "False", "InvalidServiceType")])


@pytest.mark.anyio
async def test_conditions_of_others_stay_and_are_not_fought(serve: Any, tmp_path: Path) -> None:
    def condition(kind: str, status: str) -> dict[str, str]:
        return {"type": kind, "status": status, "reason": "Other", "message": "", "lastTransitionTime": ""}

    async with kube_server() as kube, serve() as at:
        put_export(kube, status={"conditions": [condition("Ready", "True")]})
        put_service(kube, "orders", annotations={})
        async with publishing(kube, at, tmp_path, service_exports=True, timing=ONCE):
            both = [("Ready", "True", "Other"), ("Valid", "True", "Valid")]
            await kube.until(lambda: conditions(kube)["orders"] == both)
            put_export(kube, status={"conditions": [condition("Valid", "False")]})
            version = kube.version
            await kube.until(lambda: kube.told.get("serviceexports") == version)
            put_service(kube, "cart")
            await until(at, {NAME: [], "cart.shop.svc.cluster.local": []})
            assert conditions(kube)["orders"] == [("Valid", "False", "Other")]


@pytest.mark.anyio
async def test_a_publisher_without_the_right_to_write_the_status_exports(
    serve: Any, tmp_path: Path, logged: LogWaiter
) -> None:
    async with kube_server() as kube, serve() as at:
        kube.refuses_writes = True
        put_export(kube)
        put_service(kube, "orders", annotations={})
        async with publishing(kube, at, tmp_path, service_exports=True, timing=ONCE):
            await until(at, {NAME: []})
            await logged.until("the status of ServiceExports cannot be written")
            kube.refuses_writes = False
            await kube.until(lambda: conditions(kube)["orders"] == [("Valid", "True", "Valid")])


@pytest.mark.anyio
async def test_service_exports_are_not_read_by_default(serve: Any, tmp_path: Path) -> None:
    async with kube_server() as kube, serve() as at:
        put_export(kube)
        put_service(kube, "orders", annotations={})
        put_service(kube, "cart")
        async with publishing(kube, at, tmp_path):
            await until(at, {"cart.shop.svc.cluster.local": []})
        assert {resource for resource, _ in kube.asked} == {"services", "endpointslices"}
