"""The publisher: keeps the service records of its network in sync with the exported Services of a Kubernetes cluster.

The records have no lease, so that services do not vanish while their publisher restarts. Services that the cluster removed in
the meantime are deleted once the cluster has been listed and discovery is synced; their ids have this publisher's prefix.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.client.contract import Discovery
from discovery.model.mesh import Kind, Mesh
from discovery.pacing.backoff import Backoff
from discovery.publisher.config import PublisherConfig
from discovery.publisher.events import EVENT_TIMING, EventTiming, EventWriter
from discovery.publisher.export import Finding
from discovery.publisher.kubernetes import Gone, KubeApi, KubeError
from discovery.publisher.objects import ExportObject, Name, ServiceObject, SliceObject, name_of, resource_version
from discovery.publisher.statuses import EXPORTS, StatusWriter
from discovery.publisher.table import Publication, ServiceTable, record_id

log = logging.getLogger(__name__)

BACKOFF = Backoff(0.2, 15.0)
GIVEN_UP_AFTER = 5
"""Failures in a row to watch from a version before all is listed again. Another cluster, for one, never accepts the version."""

ObjectT = TypeVar("ObjectT", ServiceObject, SliceObject, ExportObject)


class _Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.services = Gauge(
            "crossnet_publisher_services",
            "Records of services and of their pods that are published.",
            registry=registry,
        )
        self.lists = Counter(
            "crossnet_publisher_lists", "Times that everything was listed, of both kinds.", registry=registry
        )
        self.errors = Counter("crossnet_publisher_errors", "Failures of the Kubernetes API.", registry=registry)
        self.incomplete = Gauge(
            "crossnet_publisher_incomplete_services",
            "Services of which something that they ask for cannot be published.",
            registry=registry,
        )


@dataclass
class _Resource(Generic[ObjectT]):
    """One path of the Kubernetes API that is listed and then watched, and the table's methods for its objects."""

    path: str
    shape: type[ObjectT]
    put: Callable[[ObjectT], Name | None]
    delete: Callable[[ObjectT], Name | None]
    retain: Callable[[Iterable[Name]], set[Name]]
    known: Callable[[], set[Name]]
    """Returns all names of this type in the table, including those of other paths: each namespace has its own path."""

    version: str = ""
    """Version from which the watch resumes; empty if all objects have to be listed."""

    names: set[Name] = field(default_factory=set)
    failures: int = 0
    """Failures since the watch last reported a change."""

    def replace(self, items: Iterable[dict[str, Any]]) -> set[Name]:
        """Apply a complete list. Returns the Services that may have to be published again."""
        found = [item for item in (_decoded(item, self.shape) for item in items) if item is not None]
        gone = self.names - {name_of(item.metadata) for item in found}
        self.names = {name_of(item.metadata) for item in found}
        touched = self.retain(self.known() - gone) if gone else set()
        return touched | {name for item in found if (name := self.put(item)) is not None}

    def change(self, kind: str, data: dict[str, Any]) -> Name | None:
        """Apply one event of the watch. Returns the Service that may have to be published again."""
        self.version = resource_version(data) or self.version
        item = _decoded(data, self.shape) if kind != "BOOKMARK" else None
        if item is None:
            return None
        if kind == "DELETED":
            self.names.discard(name_of(item.metadata))
            return self.delete(item)
        self.names.add(name_of(item.metadata))
        return self.put(item)


class Publisher:
    """The publisher role: `run` it until cancelled."""

    def __init__(
        self,
        config: PublisherConfig,
        discovery: Discovery,
        *,
        registry: CollectorRegistry | None = None,
        backoff: Backoff = BACKOFF,
        event_timing: EventTiming = EVENT_TIMING,
    ) -> None:
        """Raises ValueError, OSError, ssl.SSLError for a configuration that cannot be used."""
        config = config.resolved()
        assert config.api is not None
        self._config = config
        self._discovery = discovery
        self._api = KubeApi(
            config.api,
            token_file=config.token_file,
            ca_file=config.ca_file,
            page=config.page,
            watch_s=config.watch_s,
        )
        self._backoff = backoff
        self._table = ServiceTable(
            config.cluster_domain,
            reads_exports=config.service_exports,
            clusterset_domain=config.clusterset_domain,
            cluster=config.network,
        )
        self._metrics = _Metrics(registry if registry is not None else CollectorRegistry())
        self._events = EventWriter(self._api, config.id, timing=event_timing)
        self._statuses = StatusWriter(self._api, timing=event_timing)
        self._published: set[str] = set()
        self._records_of: dict[Name, frozenset[str]] = {}
        self._findings: dict[Name, tuple[Finding, ...]] = {}
        self._unlisted: set[str] = set()
        self._complete = False
        self._reconciled = False

    @property
    def listed(self) -> bool:
        """Whether every path has been listed once."""
        return self._complete

    async def run(self) -> None:
        """List, watch and publish until cancelled."""
        scopes = [f"/namespaces/{namespace}" for namespace in self._config.namespaces] or [""]
        services = [f"/api/v1{scope}/services" for scope in scopes]
        slices = [f"/apis/discovery.k8s.io/v1{scope}/endpointslices" for scope in scopes]
        exports = [f"{EXPORTS}{scope}/serviceexports" for scope in scopes if self._config.service_exports]
        self._unlisted = {*services, *slices, *exports}
        unsubscribe = self._discovery.subscribe(self._reconcile)
        table = self._table
        try:
            async with self._api, asyncio.TaskGroup() as group:
                group.create_task(self._events.run())
                group.create_task(self._statuses.run())
                for path in services:
                    group.create_task(
                        self._follow(
                            _Resource(
                                path,
                                ServiceObject,
                                put=table.put_service,
                                delete=table.delete_service,
                                retain=table.retain_services,
                                known=table.service_names,
                            )
                        )
                    )
                for path in slices:
                    group.create_task(
                        self._follow(
                            _Resource(
                                path,
                                SliceObject,
                                put=table.put_slice,
                                delete=table.delete_slice,
                                retain=table.retain_slices,
                                known=table.slice_names,
                            )
                        )
                    )
                for path in exports:
                    group.create_task(
                        self._follow(
                            _Resource(
                                path,
                                ExportObject,
                                put=table.put_export,
                                delete=table.delete_export,
                                retain=table.retain_exports,
                                known=table.export_names,
                            )
                        )
                    )
        finally:
            unsubscribe()

    async def _follow(self, resource: _Resource[ObjectT]) -> None:
        """List and watch the objects of one path until cancelled."""
        while True:
            try:
                if not resource.version:
                    await self._list(resource)
                await self._watch(resource)
                continue  # the server ends a watch after `watch_s`; it is resumed at once
            except Gone as error:
                log.info("the cluster's history is no longer available, everything is listed again: %s", error)
                resource.version = ""
            except (KubeError, OSError) as error:
                self._metrics.errors.inc()
                if resource.failures in (0, GIVEN_UP_AFTER):
                    log.warning("the Kubernetes API failed: %s", error)
                resource.failures += 1
                if resource.failures >= GIVEN_UP_AFTER:
                    resource.version = ""
            await asyncio.sleep(self._backoff.pause_s(resource.failures + 1))

    async def _list(self, resource: _Resource[ObjectT]) -> None:
        """List all objects, and note the version to watch from. Raises KubeError, OSError."""
        items, version = await self._api.list_all(resource.path)
        resource.version = version
        touched = resource.replace(items)
        self._metrics.lists.inc()
        self._unlisted.discard(resource.path)
        # Nothing is published before all paths have been listed for the first time; then everything is.
        self._publish(touched if self._complete else touched | self._table.exported())
        self._complete = not self._unlisted
        self._reconcile(self._discovery.mesh)

    async def _watch(self, resource: _Resource[ObjectT]) -> None:
        """Publish changes until the server ends the watch. Raises KubeError, OSError; Gone if the path has to be listed again."""
        loop = asyncio.get_running_loop()
        started, seen = loop.time(), False
        async with aclosing(self._api.watch(resource.path, resource.version)) as changes:
            async for kind, data in changes:
                resource.failures, seen = 0, True
                name = resource.change(kind, data)
                self._publish({name} if name is not None else ())
        if not seen and loop.time() - started <= self._backoff.first_s:
            raise KubeError(f"{resource.path}: the watch ended as soon as it started")

    def _publish(self, names: Iterable[Name]) -> None:
        if self._unlisted:
            # The existing records are better than those of a cluster that is listed only in part: endpoints would be missing.
            return
        for name in names:
            made = self._table.publication(name)
            specs = {record_id(self._config.id, name, member): spec for member, spec in made.specs.items()}
            for gone in self._records_of.pop(name, frozenset()) - specs.keys():
                self._published.discard(gone)
                self._discovery.withdraw(Kind.SERVICE, gone, network=self._config.network)
            for key, spec in specs.items():
                self._published.add(key)
                self._discovery.publish(Kind.SERVICE, key, spec, network=self._config.network, leased=False)
            if specs:
                self._records_of[name] = frozenset(specs)
            self._report(name, made)
            self._statuses.put(name, self._table.export(name), made)
        self._metrics.services.set(len(self._published))
        self._metrics.incomplete.set(len(self._findings))

    def _report(self, name: Name, made: Publication) -> None:
        """Say in the log what is new of what cannot be published, and on the Service all of it."""
        findings = tuple(made.findings)
        before = self._findings.pop(name, ())
        if findings:
            self._findings[name] = findings
        for finding in findings:
            if finding not in before:
                event = {"namespace": name[0], "service": name[1], "reason": finding.reason, "why": finding.message}
                level = logging.WARNING if finding.warning else logging.INFO
                log.log(level, "a service is not exported as it asks", extra={"event": event})
        self._events.put(name, (made.uid, made.version), findings if made.uid else ())

    def _reconcile(self, mesh: Mesh) -> None:
        """Withdraw records of an earlier run, once the cluster has been listed and discovery is synced."""
        if self._reconciled or not self._complete or not self._discovery.synced:
            return
        self._reconciled = True
        for record in mesh.services(self._config.network):
            if record.id.startswith(f"{self._config.id}-") and record.id not in self._published:
                log.info(
                    "a service is no longer exported", extra={"event": {"id": record.id, "name": record.spec.name}}
                )
                # Only published records can be withdrawn.
                where = self._config.network
                self._discovery.publish(Kind.SERVICE, record.id, record.spec, network=where, leased=False)
                self._discovery.withdraw(Kind.SERVICE, record.id, network=where)


def _decoded(data: dict[str, Any], shape: type[ObjectT]) -> ObjectT | None:
    try:
        return msgspec.convert(data, shape)
    except msgspec.ValidationError as error:
        log.warning("an object of the cluster is skipped: %s", error)
        return None
