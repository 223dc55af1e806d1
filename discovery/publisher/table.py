"""Converts Kubernetes Services and EndpointSlices to service records. Sans-IO.

Published are the endpoints that are ready or, if none of a port is, those that end and still serve, as kube-proxy uses them. Of a
headless Service, each pod with a hostname has a record of its own, such as db-0.db.shop.svc.cluster.local. With a cluster set's
domain, each record has an alias in it (KEP-1645): db.shop.svc.clusterset.local and, for a pod of cluster b,
db-0.b.db.shop.svc.clusterset.local.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from discovery.model.names import is_ldh_label, is_service_name
from discovery.model.spec import MAX_ENDPOINTS, MAX_ID, ServiceSpec
from discovery.publisher.endpoints import Slice, by_hostname, delivering, read_slice
from discovery.publisher.export import Export, Finding, listed, read_export
from discovery.publisher.objects import (
    SERVICE_NAME,
    ExportObject,
    Name,
    ServiceObject,
    SliceObject,
    name_of,
)

log = logging.getLogger(__name__)

MAX_OBJECTS = 100_000
"""Objects of each kind. Kubernetes itself is tested with 10,000 services."""

MAX_MEMBERS = 1000
"""Records of one headless Service's pods. A discovery server accepts 20,000 records of a network by default."""


class Member(NamedTuple):
    """Which of a Service's records it is."""

    hostname: str = ""
    """Of the pod; empty: the Service itself."""

    domain: str = ""
    """End of its name in the cluster set; empty: it has its name in the cluster."""


ITSELF = Member()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Service:
    export: Export
    uid: str
    version: str
    headless: bool
    every_endpoint: bool
    """Endpoints that are not ready are published, too."""


@dataclass(slots=True)
class Publication:
    """What to publish of a Service, and what of it cannot be published."""

    uid: str = ""
    version: str = ""
    """Of the Service; empty if it does not ask to be exported."""

    specs: dict[Member, ServiceSpec] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


class ServiceTable:
    """The Services of a cluster that ask to be exported, and the records to publish."""

    def __init__(
        self,
        cluster_domain: str,
        max_objects: int = MAX_OBJECTS,
        *,
        reads_exports: bool = False,
        clusterset_domain: str | None = None,
        cluster: str = "",
    ) -> None:
        """`reads_exports`: ServiceExports are put as well. `cluster` is the name of the cluster in the cluster set."""
        self._domain = cluster_domain
        self._reads_exports = reads_exports
        self._clusterset = clusterset_domain
        self._cluster = cluster
        self._exports: dict[Name, ExportObject] = {}
        self._found: dict[Name, ServiceObject] = {}  # of all Services, for ServiceExports that come later; else empty
        self._max_objects = max_objects
        self._services: dict[Name, _Service] = {}
        self._slices: dict[Name, Slice] = {}
        self._slices_of: dict[Name, set[Name]] = {}
        self._is_full = False

    def put_service(self, found: ServiceObject) -> Name:
        """Store the current state of a Service. Returns its name, since its records may change."""
        name = name_of(found.metadata)
        export = read_export(found, by_object=name in self._exports)
        if self._reads_exports and (name in self._found or len(self._found) < self._max_objects):
            self._found[name] = found
        if export is None:
            self._services.pop(name, None)
            return name
        if name not in self._services and len(self._services) >= self._max_objects:
            export = _without(export, Finding("TooManyServices", f"not exported: {self._max_objects} is the limit"))
        self._services[name] = _Service(
            export=export,
            uid=found.metadata.uid,
            version=found.metadata.resourceVersion,
            headless=found.spec.clusterIP == "None",
            every_endpoint=found.spec.publishNotReadyAddresses is True,
        )
        return name

    def delete_service(self, found: ServiceObject) -> Name:
        """Remove a Service. Returns its name, since its records may change."""
        name = name_of(found.metadata)
        self._services.pop(name, None)
        self._found.pop(name, None)
        return name

    def put_export(self, found: ExportObject) -> Name:
        """Store the current state of a ServiceExport. Returns the name of its Service, whose records may change."""
        name = name_of(found.metadata)
        if name in self._exports or len(self._exports) < self._max_objects:
            self._exports[name] = found
        return self._read_again(name)

    def delete_export(self, found: ExportObject) -> Name:
        """Remove a ServiceExport. Returns the name of its Service, whose records may change."""
        name = name_of(found.metadata)
        self._exports.pop(name, None)
        return self._read_again(name)

    def put_slice(self, found: SliceObject) -> Name | None:
        """Store the current state of an EndpointSlice. Returns the name of the Service whose records may change."""
        service = (found.metadata.labels or {}).get(SERVICE_NAME)
        name = name_of(found.metadata)
        if not service:
            return self._drop_slice(name)
        if name not in self._slices and len(self._slices) >= self._max_objects:
            if not self._is_full:
                self._is_full = True
                log.warning("the cluster has more EndpointSlices than are read: %s", self._max_objects)
            return None
        of = (found.metadata.namespace, service)
        self._drop_slice(name)
        self._slices[name] = read_slice(found, of)
        self._slices_of.setdefault(of, set()).add(name)
        return of

    def delete_slice(self, found: SliceObject) -> Name | None:
        """Remove an EndpointSlice. Returns the name of the Service that it belonged to."""
        return self._drop_slice(name_of(found.metadata))

    def retain_services(self, names: Iterable[Name]) -> set[Name]:
        """Remove all other Services, after a complete list. Returns the removed names."""
        gone = self.service_names() - set(names)
        for name in gone:
            self._services.pop(name, None)
            self._found.pop(name, None)
        return gone

    def retain_exports(self, names: Iterable[Name]) -> set[Name]:
        """Remove all other ServiceExports, after a complete list. Returns the names of their Services."""
        gone = set(self._exports) - set(names)
        for name in gone:
            del self._exports[name]
        return {self._read_again(name) for name in gone}

    def retain_slices(self, names: Iterable[Name]) -> set[Name]:
        """Remove all other EndpointSlices, after a complete list. Returns the names of their Services."""
        gone = set(self._slices) - set(names)
        return {of for name in gone if (of := self._drop_slice(name)) is not None}

    def exported(self) -> set[Name]:
        """Return the names of all Services that ask to be exported, by themselves or by a ServiceExport."""
        return self._services.keys() | self._exports.keys()

    def service_names(self) -> set[Name]:
        """Return the names of all Services that are stored."""
        return self._services.keys() | self._found.keys()

    def export_names(self) -> set[Name]:
        """Return the names of all ServiceExports."""
        return set(self._exports)

    def export(self, name: Name) -> ExportObject | None:
        """Return the ServiceExport of this name, None if there is none."""
        return self._exports.get(name)

    def slice_names(self) -> set[Name]:
        """Return the names of all EndpointSlices."""
        return set(self._slices)

    def publication(self, name: Name) -> Publication:
        """Return what to publish of a Service, and what of it cannot be published. Nothing, if it does not ask to be exported."""
        made = Publication()
        service = self._services.get(name)
        if service is None:
            if name in self._exports:
                made.findings.append(Finding("NoService", "not exported: there is no Service of this name"))
            return made
        made.uid, made.version = service.uid, service.version
        made.findings += service.export.findings
        full = f"{name[1]}.{name[0]}.svc.{self._domain}"
        if not service.export.ports:
            return made
        if not is_service_name(full):
            made.findings.append(Finding("InvalidName", f"not exported: {full[:253]} cannot be the name of a service"))
            return made
        slices = [self._slices[key] for key in sorted(self._slices_of.get(name, ()))]
        refused = [address for found in slices for address in found.refused]
        if refused:
            message = f"exported without endpoints that may not be dialled: {listed(refused)}"
            made.findings.append(Finding("RefusedAddress", message))
        made.specs[ITSELF] = self._spec(full, service, slices, made)
        if service.headless:
            self._add_members(full, service, slices, made)
        if self._clusterset is not None:
            self._add_aliases(name, self._clusterset, made)
        return made

    def _add_aliases(self, name: Name, domain: str, made: Publication) -> None:
        """Add another record for each one, with its name in the cluster set."""
        of = f"{name[1]}.{name[0]}.svc.{domain}"
        for member, spec in list(made.specs.items()):
            full = f"{member.hostname}.{self._cluster}.{of}" if member.hostname else of
            if not is_service_name(full):
                made.findings.append(Finding("InvalidName", f"no alias: {full[:253]} cannot be the name of a service"))
                continue
            made.specs[Member(member.hostname, f"svc.{domain}")] = msgspec.structs.replace(
                spec, name=full, member_of=of if spec.member_of else "", health=None, alias_of=spec.name
            )

    def _spec(self, full: str, service: _Service, slices: Sequence[Slice], made: Publication) -> ServiceSpec:
        ports = {}
        for name, port in service.export.ports:
            endpoints = delivering(name, slices, every=service.every_endpoint)
            if len(endpoints) > MAX_ENDPOINTS:
                message = f"port {port} has more endpoints than the {MAX_ENDPOINTS} that are exported"
                made.findings.append(Finding("TooManyEndpoints", message))
            ports[str(port)] = endpoints[:MAX_ENDPOINTS]
        export = service.export
        return ServiceSpec(
            name=full,
            ports=ports,
            proxy_protocol=export.proxy_protocol,
            health=export.health,
            port_names=export.port_names,
        )

    def _add_members(self, full: str, service: _Service, slices: Sequence[Slice], made: Publication) -> None:
        """Add the pods that have a hostname and an endpoint that delivers, as a cluster's own DNS names them."""
        unfit, beyond = [], False
        for hostname, theirs in sorted(by_hostname(slices).items()):
            name = f"{hostname}.{full}"
            if not is_ldh_label(hostname) or not is_service_name(name):
                unfit.append(hostname[:253])
                continue
            ports = {
                str(port): delivering(port_name, theirs, every=service.every_endpoint)[:MAX_ENDPOINTS]
                for port_name, port in service.export.ports
            }
            if not any(ports.values()):
                continue
            if len(made.specs) > MAX_MEMBERS:
                beyond = True
                continue
            made.specs[Member(hostname)] = ServiceSpec(
                name=name,
                ports=ports,
                proxy_protocol=service.export.proxy_protocol,
                port_names=service.export.port_names,
                member_of=full,
            )
        if unfit:
            made.findings.append(
                Finding(
                    "InvalidHostname", f"pods without a name, since it cannot be that of a service: {listed(unfit)}"
                )
            )
        if beyond:
            message = f"more pods have a hostname than the {MAX_MEMBERS} that get a name"
            made.findings.append(Finding("TooManyPods", message))

    def _read_again(self, name: Name) -> Name:
        found = self._found.get(name)
        return self.put_service(found) if found is not None else name

    def _drop_slice(self, name: Name) -> Name | None:
        known = self._slices.pop(name, None)
        if known is None:
            return None
        others = self._slices_of[known.service]
        others.discard(name)
        if not others:
            del self._slices_of[known.service]
        return known.service


def record_id(publisher: str, name: Name, member: Member = ITSELF) -> str:
    """Return the id of a record: unique, readable, and with the publisher's prefix."""
    parts = [*name, *filter(None, member)]
    digest = hashlib.sha256("/".join(parts).encode()).hexdigest()[:12]
    shown = "-".join([*filter(None, member), name[1], name[0]])
    readable = re.sub(r"[^a-z0-9-]", "-", shown)[: MAX_ID - len(publisher) - 14].strip("-")
    return f"{publisher}-{readable}-{digest}"


def _without(export: Export, finding: Finding) -> Export:
    return Export(ports=(), proxy_protocol=False, health=None, findings=(*export.findings, finding))
