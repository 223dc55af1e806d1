"""When a process is ready: all conditions, whether they hold, and if not, a description of what is missing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from crossnet.app.app import App


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of readiness."""

    name: str
    lacks: tuple[str, ...] = ()
    """Descriptions of what is missing; if a discovery server refuses something, its own words."""

    @property
    def holds(self) -> bool:
        """Whether nothing is missing."""
        return not self.lacks


def conditions(app: "App") -> list[Condition]:
    """Return all conditions of this process, fulfilled or not."""
    if app.stopping:
        return [Condition("running", ("the end: draining",))]
    if not app.started:
        return [Condition("running", ("the start of all roles",))]
    found = [Condition("running")]
    if app.speaks_to_discovery:
        found.append(Condition("discovery_view", () if app.discovery.synced else ("a first view of discovery",)))
        # A mesh file has no troubles. Unreachable servers do not count: running processes work without them.
        troubles: tuple[tuple[str, str], ...] = getattr(app.discovery, "troubles", ())
        found.extend(
            Condition(name, tuple(words for of, words in troubles if of == name))
            for name in ("discovery_access", "discovery_records")
        )
    for role in app.roles.values():
        found.extend(role.conditions())
    return found


class ReadinessMetric(Collector):
    """The metric `crossnet_ready{condition}`: 1 if the condition holds."""

    def __init__(self, app: "App") -> None:
        """Report the conditions of `app`."""
        self._app = app

    def collect(self) -> Iterator[Metric]:
        """Yield the current metric."""
        metric = GaugeMetricFamily(
            "crossnet_ready", "Whether a condition of readiness holds; /readyz has the words.", labels=["condition"]
        )
        for condition in conditions(self._app):
            metric.add_metric([condition.name], float(condition.holds))
        yield metric
