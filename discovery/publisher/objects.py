"""The Kubernetes objects that a publisher reads, with only the fields that it uses. Sans-IO."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

SERVICE_NAME = "kubernetes.io/service-name"
"""Label of an EndpointSlice: its Service."""

Name: TypeAlias = tuple[str, str]
"""Namespace and name."""


class Metadata(msgspec.Struct):
    """The metadata of an object."""

    name: str
    namespace: str = ""
    uid: str = ""
    resourceVersion: str = ""  # noqa: N815 - Kubernetes' word
    annotations: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    generation: int = 0


class Port(msgspec.Struct):
    """A port of a Service or an EndpointSlice."""

    name: str | None = None
    port: int | None = None
    protocol: str | None = None

    @property
    def is_tcp(self) -> bool:
        """Whether streams are sent to it; TCP is the default."""
        return (self.protocol or "TCP") == "TCP"


class ServiceFields(msgspec.Struct):
    """The spec of a Service."""

    type: str | None = None
    clusterIP: str | None = None  # noqa: N815
    publishNotReadyAddresses: bool | None = None  # noqa: N815
    ports: list[Port] | None = None


class ServiceObject(msgspec.Struct):
    """A Service."""

    metadata: Metadata
    spec: ServiceFields = msgspec.field(default_factory=ServiceFields)


class Conditions(msgspec.Struct):
    """The conditions of an endpoint; None: unknown."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class EndpointFields(msgspec.Struct):
    """An endpoint: the addresses of one pod."""

    addresses: list[str] = []
    conditions: Conditions | None = None
    hostname: str | None = None


class SliceObject(msgspec.Struct):
    """An EndpointSlice."""

    metadata: Metadata
    addressType: str = "IPv4"  # noqa: N815
    endpoints: list[EndpointFields] | None = None
    ports: list[Port] | None = None


class ConditionFields(msgspec.Struct):
    """A condition of a ServiceExport."""

    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""
    observedGeneration: int = 0  # noqa: N815
    lastTransitionTime: str = ""  # noqa: N815


class ExportStatus(msgspec.Struct):
    """The status of a ServiceExport."""

    conditions: list[ConditionFields] | None = None


class ExportObject(msgspec.Struct):
    """A ServiceExport of the Multi-Cluster Services API (KEP-1645): exports the Service of the same name."""

    metadata: Metadata
    status: ExportStatus | None = None

    @property
    def valid(self) -> ConditionFields | None:
        """The condition `Valid`, None if it was not written yet."""
        found = (self.status.conditions if self.status is not None else None) or ()
        return next((each for each in found if each.type == "Valid"), None)


def name_of(metadata: Metadata) -> Name:
    """Return the namespace and name of an object."""
    return (metadata.namespace, metadata.name)


def resource_version(item: Mapping[str, Any]) -> str:
    """Return the resourceVersion of an object or list, empty if it has none. It is opaque: only the API server interprets it."""
    metadata = item.get("metadata")
    found = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else ""
