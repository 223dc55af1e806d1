"""Says on a Service, as Events of the Kubernetes API, what of it cannot be published: `kubectl describe service` shows them.

A cluster forgets an Event after an hour, so one is written again while its cause lasts. What cannot be written is only missing
there: the log has it as well.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from discovery.publisher.export import Finding
from discovery.publisher.kubernetes import FIELD_MANAGER, KubeApi, KubeError, KubeRefused
from discovery.publisher.objects import Name

log = logging.getLogger(__name__)

COMPONENT = FIELD_MANAGER
MAX_MESSAGE = 1024  # of an Event, in bytes: https://pkg.go.dev/k8s.io/api/events/v1#Event


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTiming:
    """When Events are written."""

    again_s: float = 1800.0
    """An API server keeps Events for an hour (`--event-ttl`)."""

    pause_s: float = 0.2
    """Between two Events, of which a cluster with a common mistake may have thousands."""

    refused_s: float = 600.0
    """Pause after a failure, such as a missing right."""


EVENT_TIMING = EventTiming()


@dataclass(frozen=True, slots=True)
class Due:
    """An Event to write."""

    service: Name
    uid: str
    version: str
    finding: Finding
    count: int
    """How often it has been written, with this time."""


class EventSchedule:
    """Which Events are to be written, and when. Sans-IO: the time is an argument."""

    def __init__(self, again_s: float) -> None:
        """An Event is due again after `again_s`."""
        self._again_s = again_s
        self._findings: dict[Name, tuple[Finding, ...]] = {}
        self._references: dict[Name, tuple[str, str]] = {}
        self._new: dict[tuple[Name, Finding], None] = {}  # in order of arrival
        self._written: dict[tuple[Name, Finding], tuple[float, int]] = {}  # in the order in which they are due again

    def put(self, service: Name, reference: tuple[str, str], findings: Sequence[Finding]) -> bool:
        """Replace what is to be said of a Service. Returns whether something is new."""
        before = self._findings.pop(service, ())
        is_another = self._references.pop(service, reference)[0] != reference[0]
        for finding in before:
            if is_another or finding not in findings:
                self._new.pop((service, finding), None)
                self._written.pop((service, finding), None)
        if findings:
            self._references[service], self._findings[service] = reference, tuple(findings)
        new = dict.fromkeys((service, finding) for finding in findings if (service, finding) not in self._written)
        self._new |= new
        return bool(new)

    def next(self, now: float) -> Due | None:
        """Return the next Event that is due, None if none is."""
        for service, finding in self._new:
            return Due(service, *self._references[service], finding, 1)
        for (service, finding), (at, count) in self._written.items():
            return Due(service, *self._references[service], finding, count + 1) if at <= now else None
        return None

    def next_at(self) -> float | None:
        """Return when the next Event that was written is due again, None if none was."""
        return next((at for at, _ in self._written.values()), None)

    def written(self, due: Due, now: float) -> None:
        """Note that an Event was written."""
        key = (due.service, due.finding)
        if due.finding in self._findings.get(due.service, ()) and self._references[due.service][0] == due.uid:
            self._new.pop(key, None)
            self._written.pop(key, None)
            self._written[key] = (now + self._again_s, due.count)


class EventWriter:
    """Writes Events while `run` runs."""

    def __init__(
        self,
        api: KubeApi,
        publisher: str,
        *,
        timing: EventTiming = EVENT_TIMING,
        wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`publisher` is the id of the publisher that says it."""
        self._api = api
        self._publisher = publisher
        self._timing = timing
        self._wall_clock = wall_clock
        self._schedule = EventSchedule(timing.again_s)
        self._new = asyncio.Event()
        self._failed = False

    def put(self, service: Name, reference: tuple[str, str], findings: Sequence[Finding]) -> None:
        """Replace what is to be said of a Service, whose uid and resourceVersion are `reference`."""
        if self._schedule.put(service, reference, findings):
            self._new.set()

    async def run(self) -> None:
        """Write until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = self._schedule.next(loop.time())
            if due is None:
                self._new.clear()
                try:
                    async with asyncio.timeout_at(self._schedule.next_at()):
                        await self._new.wait()
                except TimeoutError:
                    pass
                continue
            try:
                await self._write(due)
            except (KubeError, OSError) as error:
                if not self._failed:
                    log.warning("Events cannot be written, Services do not say what is not exported of them: %s", error)
                self._failed = True
                await asyncio.sleep(self._timing.refused_s)
            else:
                self._failed = False
                self._schedule.written(due, loop.time())
                await asyncio.sleep(self._timing.pause_s)

    async def _write(self, due: Due) -> None:
        """Create the Event or, if it exists, renew it. Raises KubeError, OSError."""
        event = event_of(due, self._publisher, self._wall_clock())
        path = f"/api/v1/namespaces/{due.service[0]}/events"
        try:
            await self._api.create(path, event)
        except KubeRefused as error:
            if error.status == 404:
                return  # the namespace is gone
            if error.status != 409:
                raise
        else:
            return
        changes = {"lastTimestamp": event["lastTimestamp"], "count": due.count}
        try:
            await self._api.merge(f"{path}/{event['metadata']['name']}", changes)
        except KubeRefused as error:
            if error.status != 404:  # it ended in between; the next time it is created
                raise


def event_of(due: Due, publisher: str, now: datetime) -> dict[str, Any]:
    """Return the Event. Its name is the same for the same cause, so that it is one Event, whoever writes it how often."""
    namespace, name = due.service
    cause = "/".join((publisher, due.uid, due.finding.reason, due.finding.message))
    digest = hashlib.sha256(cause.encode()).hexdigest()[:16]
    at = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": namespace, "name": f"{name}.{digest}"},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Service",
            "namespace": namespace,
            "name": name,
            "uid": due.uid,
            "resourceVersion": due.version,
        },
        "reason": due.finding.reason,
        "message": due.finding.message.encode()[:MAX_MESSAGE].decode(errors="ignore"),
        "type": "Warning" if due.finding.warning else "Normal",
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": publisher,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": due.count,
    }
