"""When a process is ready: every condition in one place, with its state and, where it does not hold, the words for it."""

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
    """One thing that must hold."""

    name: str
    lacks: tuple[str, ...] = ()
    """What is waited for, in words; a discovery server's own where it is the one that refuses."""

    @property
    def holds(self) -> bool:
        """Whether nothing is lacking."""
        return not self.lacks


def conditions(app: "App") -> list[Condition]:
    """Say which conditions this process has, and which of them hold."""
    if app.stopping:
        return [Condition("running", ("the end: draining",))]
    if not app.started:
        return [Condition("running", ("the start of all roles",))]
    found = [Condition("running")]
    if app.speaks_to_discovery:
        found.append(Condition("discovery_view", () if app.discovery.synced else ("a first view of discovery",)))
        # A file has no troubles. Servers that are away are none either: what runs goes on without them.
        troubles: tuple[tuple[str, str], ...] = getattr(app.discovery, "troubles", ())
        found.extend(
            Condition(name, tuple(words for of, words in troubles if of == name))
            for name in ("discovery_access", "discovery_records")
        )
    for role in app.roles.values():
        found.extend(role.conditions())
    return found


class ReadinessMetric(Collector):
    """`crossnet_ready{condition}`: 1 where it holds."""

    def __init__(self, app: "App") -> None:
        """Take whose conditions are told."""
        self._app = app

    def collect(self) -> Iterator[Metric]:
        """Give the metric as it is now."""
        metric = GaugeMetricFamily(
            "crossnet_ready", "Whether a condition of readiness holds; /readyz has the words.", labels=["condition"]
        )
        for condition in conditions(self._app):
            metric.add_metric([condition.name], float(condition.holds))
        yield metric
