"""The publisher: keeps the service records of its network as the Services that are exported in a Kubernetes cluster.

Records are written without a lease: services must not vanish because their publisher is restarted. What was withdrawn in
the cluster meanwhile is found when both are known again, by the ids that are made here alone.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.client.contract import Discovery
from discovery.model.mesh import Kind, Mesh
from discovery.pacing.backoff import Backoff
from discovery.publisher.config import PublisherConfig
from discovery.publisher.kubernetes import Gone, KubeApi, KubeError
from discovery.publisher.table import (
    Name,
    ServiceObject,
    ServiceTable,
    SliceObject,
    record_id,
    resource_version,
)

log = logging.getLogger(__name__)

BACKOFF = Backoff(0.2, 15.0)
GIVEN_UP_AFTER = 5
"""Failures to watch from one version: it may never be understood again, as after a cluster was replaced by another."""

ObjectT = TypeVar("ObjectT", ServiceObject, SliceObject)


class _Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.services = Gauge("crossnet_publisher_services", "Services that are published.", registry=registry)
        self.lists = Counter(
            "crossnet_publisher_lists", "Times that everything was listed, of both kinds.", registry=registry
        )
        self.errors = Counter("crossnet_publisher_errors", "Failures of the Kubernetes API.", registry=registry)


class Publisher:
    """The role. `run` it; everything else it does by itself."""

    def __init__(
        self, config: PublisherConfig, discovery: Discovery, *, registry: CollectorRegistry | None = None
    ) -> None:
        """Take a configuration. Raises ValueError, OSError, ssl.SSLError for one that cannot be used."""
        config = config.resolved()
        assert config.api is not None
        self._config = config
        self._discovery = discovery
        self._api = KubeApi(config.api, token_file=config.token_file, ca_file=config.ca_file)
        self._table = ServiceTable(config.cluster_domain)
        self._metrics = _Metrics(registry if registry is not None else CollectorRegistry())
        self._published: set[str] = set()
        self._unlisted: set[str] = set()
        self._complete = False
        self._reconciled = False

    @property
    def listed(self) -> bool:
        """Whether everything has been listed once."""
        return self._complete

    async def run(self) -> None:
        """Publish until cancelled."""
        scopes = [f"/namespaces/{namespace}" for namespace in self._config.namespaces] or [""]
        services = [f"/api/v1{scope}/services" for scope in scopes]
        slices = [f"/apis/discovery.k8s.io/v1{scope}/endpointslices" for scope in scopes]
        self._unlisted = {*services, *slices}
        unsubscribe = self._discovery.subscribe(self._reconcile)
        table = self._table
        try:
            async with self._api, asyncio.TaskGroup() as group:
                for path in services:
                    group.create_task(
                        self._follow(
                            path, ServiceObject, table.put_service, table.delete_service, table.retain_services
                        )
                    )
                for path in slices:
                    group.create_task(
                        self._follow(path, SliceObject, table.put_slice, table.delete_slice, table.retain_slices)
                    )
        finally:
            unsubscribe()

    async def _follow(
        self,
        path: str,
        shape: type[ObjectT],
        put: Callable[[ObjectT], Name | None],
        delete: Callable[[ObjectT], Name | None],
        retain: Callable[[Iterable[Name]], set[Name]],
    ) -> None:
        """List and watch the objects of one path for ever."""
        loop = asyncio.get_running_loop()
        version = ""
        names: set[Name] = set()
        failures = 0
        while True:
            try:
                if not version:
                    items, version = await self._api.list_all(path)
                    found = [item for item in (_decoded(item, shape) for item in items) if item is not None]
                    gone = names - {_name(item) for item in found}
                    names = {_name(item) for item in found}
                    # Of our own path alone: each namespace has one.
                    touched = retain(self._all_names(shape) - gone) if gone else set()
                    touched |= {name for item in found if (name := put(item)) is not None}
                    self._metrics.lists.inc()
                    self._unlisted.discard(path)
                    # At the first time that all is listed, everything: what came before waited for that.
                    self._publish(touched if self._complete else touched | self._table.exported())
                    self._complete = not self._unlisted
                    self._reconcile(self._discovery.mesh)
                began, told = loop.time(), False
                async with aclosing(self._api.watch(path, version)) as changes:
                    async for kind, data in changes:
                        failures, told = 0, True
                        version = resource_version(data) or version
                        item = _decoded(data, shape) if kind != "BOOKMARK" else None
                        if item is None:
                            continue
                        if kind == "DELETED":
                            names.discard(_name(item))
                            name = delete(item)
                        else:
                            names.add(_name(item))
                            name = put(item)
                        self._publish({name} if name is not None else ())
                if told or loop.time() - began > BACKOFF.first_s:
                    continue  # the server ends a watch when its time is over: resumed at once
                raise KubeError(f"{path}: the watch ended as soon as it began")
            except Gone as error:
                log.info("the cluster's history is gone: everything is listed anew: %s", error)
                version = ""
            except (KubeError, OSError) as error:
                self._metrics.errors.inc()
                if failures in (0, GIVEN_UP_AFTER):
                    log.warning("the Kubernetes API failed: %s", error)
                failures += 1
                if failures >= GIVEN_UP_AFTER:
                    version = ""
            await asyncio.sleep(BACKOFF.pause_s(failures + 1))

    def _all_names(self, shape: type[ObjectT]) -> set[Name]:
        return self._table.exported() if shape is ServiceObject else self._table.slice_names()

    def _publish(self, names: Iterable[Name]) -> None:
        if self._unlisted:
            # Half of a cluster is worse than what stands there: endpoints would be missing.
            return
        for name in names:
            key, spec = record_id(self._config.id, name), self._table.spec(name)
            if spec is not None:
                self._published.add(key)
                self._discovery.publish(Kind.SERVICE, key, spec, network=self._config.network, leased=False)
            elif key in self._published:
                self._published.discard(key)
                self._discovery.withdraw(Kind.SERVICE, key, network=self._config.network)
        self._metrics.services.set(len(self._published))

    def _reconcile(self, mesh: Mesh) -> None:
        """Once, when both sides are known: withdraw what an earlier run left there."""
        if self._reconciled or not self._complete or not self._discovery.synced:
            return
        self._reconciled = True
        for record in mesh.services(self._config.network):
            if record.id.startswith(f"{self._config.id}-") and record.id not in self._published:
                log.info(
                    "a service is no longer exported", extra={"event": {"id": record.id, "name": record.spec.name}}
                )
                # Desired for a moment, so that it can be withdrawn.
                where = self._config.network
                self._discovery.publish(Kind.SERVICE, record.id, record.spec, network=where, leased=False)
                self._discovery.withdraw(Kind.SERVICE, record.id, network=where)


def _name(item: ServiceObject | SliceObject) -> Name:
    return (item.metadata.namespace, item.metadata.name)


def _decoded(data: dict[str, Any], shape: type[ObjectT]) -> ObjectT | None:
    try:
        return msgspec.convert(data, shape)
    except msgspec.ValidationError as error:
        log.warning("an object of the cluster is left out: %s", error)
        return None
