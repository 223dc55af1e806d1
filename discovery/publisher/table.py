"""Converts Kubernetes Services and EndpointSlices to service records. Sans-IO.

Published are the endpoints that are ready or, if none of a port is, those that end and still serve, as kube-proxy uses them. Of a
headless Service, each pod with a hostname has a record of its own, such as db-0.db.shop.svc.cluster.local.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from discovery.model.addresses import BadAddress, format_endpoint, parse_address, refusal
from discovery.model.names import MAX_PORT, is_ldh_label, is_service_name
from discovery.model.spec import MAX_ENDPOINTS, MAX_ID, ServiceSpec
from discovery.publisher.export import Export, Finding, listed, read_export
from discovery.publisher.objects import SERVICE_NAME, EndpointFields, Name, Port, ServiceObject, SliceObject, name_of

log = logging.getLogger(__name__)

MAX_OBJECTS = 100_000
"""Objects of each kind. Kubernetes itself is tested with 10,000 services."""

MAX_MEMBERS = 1000
"""Records of one headless Service's pods. A discovery server accepts 20,000 records of a network by default."""


class Member(NamedTuple):
    """Which of a Service's records it is."""

    hostname: str = ""
    """Of the pod; empty: the Service itself."""


ITSELF = Member()


class _Endpoint(NamedTuple):
    addresses: tuple[str, ...]
    ready: bool
    ends_serving: bool
    """It ends, and still serves."""

    hostname: str


@dataclass(frozen=True, slots=True)
class _Slice:
    service: Name
    endpoints: tuple[_Endpoint, ...]
    ports: tuple[tuple[str, int], ...]
    """Name and number."""

    refused: tuple[str, ...]
    """Addresses that may not be dialled, or that are none."""


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

    specs: dict[Member, ServiceSpec] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


class ServiceTable:
    """The Services of a cluster that ask to be exported, and the records to publish."""

    def __init__(self, cluster_domain: str, max_objects: int = MAX_OBJECTS) -> None:
        self._domain = cluster_domain
        self._max_objects = max_objects
        self._services: dict[Name, _Service] = {}
        self._slices: dict[Name, _Slice] = {}
        self._slices_of: dict[Name, set[Name]] = {}
        self._is_full = False

    def put_service(self, found: ServiceObject) -> Name:
        """Store the current state of a Service. Returns its name, since its records may change."""
        name = name_of(found.metadata)
        export = read_export(found)
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
        return name

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
        refused: list[str] = []
        endpoints = tuple(_endpoints(found, refused))
        self._slices[name] = _Slice(of, endpoints, tuple(_named(found.ports or ())), tuple(refused))
        self._slices_of.setdefault(of, set()).add(name)
        return of

    def delete_slice(self, found: SliceObject) -> Name | None:
        """Remove an EndpointSlice. Returns the name of the Service that it belonged to."""
        return self._drop_slice(name_of(found.metadata))

    def retain_services(self, names: Iterable[Name]) -> set[Name]:
        """Remove all other Services, after a complete list. Returns the removed names."""
        gone = set(self._services) - set(names)
        for name in gone:
            del self._services[name]
        return gone

    def retain_slices(self, names: Iterable[Name]) -> set[Name]:
        """Remove all other EndpointSlices, after a complete list. Returns the names of their Services."""
        gone = set(self._slices) - set(names)
        return {of for name in gone if (of := self._drop_slice(name)) is not None}

    def exported(self) -> set[Name]:
        """Return the names of all Services that ask to be exported."""
        return set(self._services)

    def slice_names(self) -> set[Name]:
        """Return the names of all EndpointSlices."""
        return set(self._slices)

    def reference(self, name: Name) -> tuple[str, str]:
        """Return the uid and resourceVersion of a Service; empty if it does not ask to be exported."""
        service = self._services.get(name)
        return (service.uid, service.version) if service is not None else ("", "")

    def publication(self, name: Name) -> Publication:
        """Return what to publish of a Service, and what of it cannot be published. Nothing, if it does not ask to be exported."""
        made = Publication()
        service = self._services.get(name)
        if service is None:
            return made
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
        return made

    def _spec(self, full: str, service: _Service, slices: Sequence[_Slice], made: Publication) -> ServiceSpec:
        ports = {}
        for name, port in service.export.ports:
            endpoints = _delivering(name, slices, every=service.every_endpoint)
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

    def _add_members(self, full: str, service: _Service, slices: Sequence[_Slice], made: Publication) -> None:
        """Add the pods that have a hostname and an endpoint that delivers, as a cluster's own DNS names them."""
        unfit, beyond = [], False
        for hostname, theirs in sorted(_by_hostname(slices).items()):
            name = f"{hostname}.{full}"
            if not is_ldh_label(hostname) or not is_service_name(name):
                unfit.append(hostname[:253])
                continue
            ports = {
                str(port): _delivering(port_name, theirs, every=service.every_endpoint)[:MAX_ENDPOINTS]
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


def _named(ports: Iterable[Port]) -> Iterator[tuple[str, int]]:
    for port in ports:
        if port.is_tcp and port.port is not None and 1 <= port.port <= MAX_PORT:
            yield port.name or "", port.port


def _endpoints(found: SliceObject, refused: list[str]) -> Iterator[_Endpoint]:
    """Yield the endpoints that may be dialled, and note the addresses of others."""
    if found.addressType not in ("IPv4", "IPv6"):
        refused += (
            f"{address[:63]} ({found.addressType})" for each in found.endpoints or () for address in each.addresses
        )
        return
    for each in found.endpoints or ():
        addresses = []
        for address in each.addresses:
            try:
                why = refusal(parse_address(address))
            except BadAddress:
                why = "not an address"
            if why is None:
                addresses.append(address)
            else:
                refused.append(f"{address[:63]} ({why})")
        if addresses:
            yield _Endpoint(tuple(addresses), *_state(each), each.hostname or "")


def _state(found: EndpointFields) -> tuple[bool, bool]:
    """Return whether an endpoint is ready, and whether it ends and still serves."""
    conditions = found.conditions
    if conditions is None:
        return True, False  # Kubernetes: an unknown `ready` should be interpreted as true
    ready = conditions.ready is not False
    return ready, not ready and conditions.serving is True and conditions.terminating is True


def _delivering(port_name: str, slices: Iterable[_Slice], *, every: bool) -> list[str]:
    """Return the endpoints of a port that get streams: those that are ready or, if none is, those that end and still serve.

    `every` does not look at their state.
    """
    ready: set[str] = set()
    ending: set[str] = set()
    for found in slices:
        for number in (number for name, number in found.ports if name == port_name):
            for endpoint in found.endpoints:
                chosen = ready if every or endpoint.ready else ending if endpoint.ends_serving else None
                if chosen is not None:
                    chosen.update(format_endpoint(parse_address(address), number) for address in endpoint.addresses)
    return sorted(ready or ending)


def _by_hostname(slices: Iterable[_Slice]) -> Mapping[str, list[_Slice]]:
    """Return the endpoints of each hostname, as slices of their own."""
    found: dict[str, list[_Slice]] = {}
    for each in slices:
        of: dict[str, list[_Endpoint]] = {}
        for endpoint in each.endpoints:
            if endpoint.hostname:
                of.setdefault(endpoint.hostname, []).append(endpoint)
        for hostname, endpoints in of.items():
            found.setdefault(hostname, []).append(_Slice(each.service, tuple(endpoints), each.ports, ()))
    return found
