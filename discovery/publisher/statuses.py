"""Writes the condition `Valid` into the status of ServiceExports (KEP-1645): whether their Service is exported, and if not, why.

A condition is written by server-side apply, which leaves the conditions of others alone.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from discovery.publisher.events import EVENT_TIMING, EventTiming
from discovery.publisher.kubernetes import KubeApi, KubeError, KubeRefused
from discovery.publisher.objects import ExportObject, Name, name_of
from discovery.publisher.table import Publication

log = logging.getLogger(__name__)

EXPORTS = "/apis/multicluster.x-k8s.io/v1alpha1"
VALID, NO_SERVICE, INVALID_TYPE = "Valid", "NoService", "InvalidServiceType"  # reasons of the API's own
_REASONS = {"ExternalName": INVALID_TYPE}


@dataclass(frozen=True, slots=True)
class Condition:
    """What a ServiceExport is told."""

    status: str
    """`True` or `False`."""

    reason: str
    message: str


def condition_of(made: Publication) -> Condition:
    """Return the condition of a ServiceExport whose Service is published in this way."""
    message = "; ".join(finding.message for finding in made.findings)
    if made.specs:
        return Condition("True", VALID, message)
    reason = made.findings[0].reason if made.findings else NO_SERVICE
    return Condition("False", _REASONS.get(reason, reason), message)


def is_written(found: ExportObject, condition: Condition) -> bool:
    """Return whether a ServiceExport has this condition."""
    valid = found.valid
    return valid is not None and Condition(valid.status, valid.reason, valid.message) == condition


class StatusWriter:
    """Writes conditions while `run` runs."""

    def __init__(
        self,
        api: KubeApi,
        *,
        timing: EventTiming = EVENT_TIMING,
        wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`timing` is that of Events."""
        self._api = api
        self._timing = timing
        self._wall_clock = wall_clock
        self._wanted: dict[Name, tuple[ExportObject, Condition]] = {}
        self._written: dict[Name, tuple[Condition, float]] = {}
        self._new = asyncio.Event()
        self._failed = False

    def put(self, name: Name, found: ExportObject | None, made: Publication) -> None:
        """Replace what is to be said of a ServiceExport; None: there is none."""
        self._wanted.pop(name, None)
        if found is None:
            self._written.pop(name, None)
            return
        condition = condition_of(made)
        before, at = self._written.get(name, (None, 0.0))
        # What was written and has gone again is another writer's: it is not fought.
        is_fought = before == condition and asyncio.get_running_loop().time() - at < self._timing.again_s
        if not is_written(found, condition) and not is_fought:
            self._wanted[name] = (found, condition)
            self._new.set()

    async def run(self) -> None:
        """Write until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._wanted:
                self._new.clear()
                await self._new.wait()
            name, (found, condition) = next(iter(self._wanted.items()))
            try:
                await self._write(name, found, condition)
            except (KubeError, OSError) as error:
                if not self._failed:
                    log.warning("the status of ServiceExports cannot be written: %s", error)
                self._failed = True
                await asyncio.sleep(self._timing.refused_s)
            else:
                self._failed = False
                if self._wanted.get(name) == (found, condition):
                    del self._wanted[name]
                self._written[name] = (condition, loop.time())
                await asyncio.sleep(self._timing.pause_s)

    async def _write(self, name: Name, found: ExportObject, condition: Condition) -> None:
        """Apply the condition. Raises KubeError, OSError."""
        try:
            path = f"{EXPORTS}/namespaces/{name[0]}/serviceexports/{name[1]}/status"
            await self._api.apply(path, self._body(found, condition))
        except KubeRefused as error:
            if error.status != 404:  # it has gone
                raise

    def _body(self, found: ExportObject, condition: Condition) -> dict[str, Any]:
        namespace, name = name_of(found.metadata)
        valid = found.valid
        now = self._wall_clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        since = valid.lastTransitionTime if valid is not None and valid.status == condition.status else now
        written = {
            "type": "Valid",
            "status": condition.status,
            "reason": condition.reason,
            "message": condition.message,
            "lastTransitionTime": since or now,
            "observedGeneration": found.metadata.generation,
        }
        return {
            "apiVersion": EXPORTS.removeprefix("/apis/"),
            "kind": "ServiceExport",
            "metadata": {"namespace": namespace, "name": name},
            "status": {"conditions": [written]},
        }
