"""Converts Kubernetes Services and EndpointSlices to service records. Sans-IO.

The annotation crossnet.io/export exports a Service: `true` for all its TCP ports, or a comma-separated list of port names or
numbers. crossnet.io/proxy-protocol is the PROXY protocol header that it expects: `v1`, `v2`, or `true` for v2.
crossnet.io/health-check has its endpoints checked by relays and gateways: `tcp` or `tls`, and optionally the seconds between two
checks, such as `tls 30`. Only endpoints that are ready are published.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec

from discovery.model.addresses import BadAddress, format_endpoint, parse_address, refusal
from discovery.model.names import is_service_name
from discovery.model.spec import (
    MAX_CHECK_INTERVAL_S,
    MAX_ENDPOINTS,
    MAX_ID,
    MAX_PORTS,
    HealthCheck,
    ServiceSpec,
)

log = logging.getLogger(__name__)

EXPORT = "crossnet.io/export"
PROXY_PROTOCOL = "crossnet.io/proxy-protocol"
HEALTH_CHECK = "crossnet.io/health-check"
SERVICE_NAME = "kubernetes.io/service-name"
_HEADERS: Mapping[str, bool | Literal["v1", "v2"]] = {"true": True, "v1": "v1", "v2": "v2"}
_HEALTH = re.compile(r"(tcp|tls)(?:\s+([0-9]{1,4})s?)?")
MAX_OBJECTS = 100_000
"""Objects of each kind. Kubernetes itself is tested with 10,000 services."""

Name: TypeAlias = tuple[str, str]
"""Namespace and name."""


class _Meta(msgspec.Struct):
    name: str
    namespace: str = ""
    resourceVersion: str = ""  # noqa: N815 - Kubernetes' word
    annotations: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class _Port(msgspec.Struct):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class _ServiceSpec(msgspec.Struct):
    ports: list[_Port] | None = None


class ServiceObject(msgspec.Struct):
    """A Service, with only the fields that are used here."""

    metadata: _Meta
    spec: _ServiceSpec = msgspec.field(default_factory=_ServiceSpec)


class _Conditions(msgspec.Struct):
    ready: bool | None = None


class _Endpoint(msgspec.Struct):
    addresses: list[str] = []
    conditions: _Conditions | None = None


class SliceObject(msgspec.Struct):
    """An EndpointSlice, with only the fields that are used here."""

    metadata: _Meta
    addressType: str = "IPv4"  # noqa: N815
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


@dataclass(frozen=True, slots=True)
class _Slice:
    service: Name
    addresses: tuple[str, ...]
    ports: tuple[tuple[str, int], ...]
    """Name and number."""


@dataclass(frozen=True, slots=True)
class _Service:
    ports: tuple[tuple[str, int], ...]
    proxy_protocol: bool | Literal["v1", "v2"]
    health: HealthCheck | None


class ServiceTable:
    """The exported Services of a cluster, and the specs to publish."""

    def __init__(self, cluster_domain: str, max_objects: int = MAX_OBJECTS) -> None:
        self._domain = cluster_domain
        self._max_objects = max_objects
        self._services: dict[Name, _Service] = {}
        self._slices: dict[Name, _Slice] = {}
        self._slices_of: dict[Name, set[Name]] = {}

    def put_service(self, found: ServiceObject) -> Name:
        """Store the current state of a Service. Returns its name, since its record may change."""
        name = (found.metadata.namespace, found.metadata.name)
        asked = (found.metadata.annotations or {}).get(EXPORT, "")
        ports = tuple(_exported(found, asked))
        if not ports or (name not in self._services and len(self._services) >= self._max_objects):
            self._services.pop(name, None)
            return name
        annotations = found.metadata.annotations or {}
        wants_header = _HEADERS.get(annotations.get(PROXY_PROTOCOL, ""), False)
        self._services[name] = _Service(ports, wants_header, _health(annotations.get(HEALTH_CHECK, "")))
        return name

    def delete_service(self, found: ServiceObject) -> Name:
        """Remove a Service. Returns its name, since its record may change."""
        name = (found.metadata.namespace, found.metadata.name)
        self._services.pop(name, None)
        return name

    def put_slice(self, found: SliceObject) -> Name | None:
        """Store the current state of an EndpointSlice. Returns the name of the Service whose record may change."""
        service = (found.metadata.labels or {}).get(SERVICE_NAME)
        name = (found.metadata.namespace, found.metadata.name)
        if not service or found.addressType not in ("IPv4", "IPv6"):
            return self._drop_slice(name)
        if name not in self._slices and len(self._slices) >= self._max_objects:
            return None
        of = (found.metadata.namespace, service)
        self._drop_slice(name)
        self._slices[name] = _Slice(of, tuple(_ready(found)), tuple(_named(found.ports or ())))
        self._slices_of.setdefault(of, set()).add(name)
        return of

    def delete_slice(self, found: SliceObject) -> Name | None:
        """Remove an EndpointSlice. Returns the name of the Service that it belonged to."""
        return self._drop_slice((found.metadata.namespace, found.metadata.name))

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
        """Return the names of all exported Services."""
        return set(self._services)

    def slice_names(self) -> set[Name]:
        """Return the names of all EndpointSlices."""
        return set(self._slices)

    def spec(self, name: Name) -> ServiceSpec | None:
        """Return the spec to publish for a Service, None if it is not exported or its name cannot be published."""
        service = self._services.get(name)
        full = f"{name[1]}.{name[0]}.svc.{self._domain}"
        if service is None or not is_service_name(full):
            return None
        slices = [self._slices[key] for key in sorted(self._slices_of.get(name, ()))]
        ports = {}
        for port_name, port in service.ports[:MAX_PORTS]:
            endpoints = sorted(
                {
                    format_endpoint(parse_address(address), number)
                    for found in slices
                    for slice_port, number in found.ports
                    if slice_port == port_name
                    for address in found.addresses
                }
            )
            if len(endpoints) > MAX_ENDPOINTS:
                event = {"service": full, "port": port, "endpoints": len(endpoints), "published": MAX_ENDPOINTS}
                log.warning("a service has too many endpoints", extra={"event": event})
            ports[str(port)] = endpoints[:MAX_ENDPOINTS]
        return ServiceSpec(name=full, ports=ports, proxy_protocol=service.proxy_protocol, health=service.health)

    def _drop_slice(self, name: Name) -> Name | None:
        known = self._slices.pop(name, None)
        if known is None:
            return None
        others = self._slices_of[known.service]
        others.discard(name)
        if not others:
            del self._slices_of[known.service]
        return known.service


def record_id(publisher: str, name: Name) -> str:
    """Return the id of a Service's record: unique, readable, and with the publisher's prefix."""
    digest = hashlib.sha256("/".join(name).encode()).hexdigest()[:12]
    readable = re.sub(r"[^a-z0-9-]", "-", f"{name[1]}-{name[0]}")[: MAX_ID - len(publisher) - 14].strip("-")
    return f"{publisher}-{readable}-{digest}"


def _exported(found: ServiceObject, asked: str) -> Iterable[tuple[str, int]]:
    wanted = {item.strip() for item in asked.split(",")} - {""}
    if not wanted or wanted == {"false"}:
        return
    for port in found.spec.ports or ():
        name, number = port.name or "", port.port
        if (port.protocol or "TCP") != "TCP" or number is None or not 1 <= number <= 65535:
            continue
        if wanted == {"true"} or name in wanted or str(number) in wanted:
            yield name, number


def _health(asked: str) -> HealthCheck | None:
    """Read the annotation; one that means nothing asks for no check, as a wrong `proxy-protocol` asks for no header."""
    found = _HEALTH.fullmatch(asked.strip())
    if found is None:
        return None
    check: Literal["tcp", "tls"] = "tls" if found[1] == "tls" else "tcp"
    if found[2] is None:
        return HealthCheck(check=check)
    interval_s = int(found[2])
    return HealthCheck(check=check, interval_s=interval_s) if 1 <= interval_s <= MAX_CHECK_INTERVAL_S else None


def _named(ports: Iterable[_Port]) -> Iterable[tuple[str, int]]:
    for port in ports:
        if (port.protocol or "TCP") == "TCP" and port.port is not None and 1 <= port.port <= 65535:
            yield port.name or "", port.port


def _ready(found: SliceObject) -> Iterable[str]:
    for endpoint in found.endpoints or ():
        # Kubernetes: an unknown `ready` should be interpreted as true.
        if endpoint.conditions is not None and endpoint.conditions.ready is False:
            continue
        for address in endpoint.addresses:
            try:
                if refusal(parse_address(address)) is None:
                    yield address
            except BadAddress:
                continue


def resource_version(item: Mapping[str, Any]) -> str:
    """Return the resourceVersion of an object or list, empty if it has none. It is opaque: only the API server interprets it."""
    metadata = item.get("metadata")
    found = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else ""
