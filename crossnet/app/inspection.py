"""The state of a running process for the admin server, and through it for people, Prometheus and `crossnet status`."""

import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from crossnet.app.readiness import conditions
from crossnet.config.schema import encode
from crossnet.config.sections import Config
from discovery.client.contract import Discovery
from discovery.model.mesh import Mesh
from sniproxy.streams.stream_log import StreamLog

if TYPE_CHECKING:
    from crossnet.app.app import App


class Inspection:
    """A view of one application. It only reads, except that it can end a stream."""

    def __init__(self, app: "App") -> None:
        self._app = app
        self.registry = app.registry

    def waiting_for(self) -> list[str]:
        """Return what is not ready yet; empty when everything is."""
        return [words for condition in conditions(self._app) for words in condition.lacks]

    def stale_s(self) -> float | None:
        """Return how old the view of discovery is in seconds, since a server last confirmed it; None without servers."""
        age_s: float | None = getattr(self._discovery, "age_s", None)
        return age_s

    def status(self) -> dict[str, object]:
        """Return the state of the process, for people and `crossnet status`."""
        view = self.view()
        return {
            "version": version("crossnet"),
            "network": self._app.config.network,
            "domain": self._app.config.domain,
            "roles": self._app.chosen,
            "seconds": round(time.time() - self._app.started_at, 1),
            "waiting_for": self.waiting_for(),
            "conditions": {condition.name: list(condition.lacks) or "ok" for condition in conditions(self._app)},
            "listening": self._app.listening,
            "config": self._app.reloader.status if self._app.reloader is not None else None,
            "streams": {role: len(rows) for role, rows in self.streams().items()},
            "discovery": {
                "sources": [str(source) for source in self._app.config.discovery],
                "synced": self._discovery is not None and self._discovery.synced,
                "connected": getattr(self._discovery, "connected", None),
                "age_s": self.stale_s(),
                "revision": view.revision,
                "records": len(view),
                "networks": sorted(view.networks),
                "troubles": [words for _, words in getattr(self._discovery, "troubles", ())],
                "rivals": list(getattr(self._discovery, "rivals", ())),
                "clock_ahead_s": getattr(self._discovery, "clock_ahead_s", None),
            },
            "relay_sources": [],
            "registrations": [],
            "upstreams": [],
            **{name: shown for role in self._app.opened for name, shown in role.status().items()},
        }

    def streams(self) -> dict[str, list[dict[str, object]]]:
        """Return the open streams by role."""
        return {name: ledger.rows() for name, ledger in self._ledgers()}

    def ended_streams(self) -> dict[str, list[dict[str, object]]]:
        """Return the streams that have ended most recently, by role."""
        return {name: ledger.ended() for name, ledger in self._ledgers()}

    def _ledgers(self) -> Iterator[tuple[str, StreamLog]]:
        for name, role in self._app.roles.items():
            if role.ledger is not None:
                yield name, role.ledger

    def end_stream(self, stream: bytes) -> bool:
        """End an open stream by its id; False if there is none."""
        found = [ledger.find(stream) for _, ledger in self._ledgers()]
        for account in found:
            if account is not None:
                account.stop("ended at the admin server")
        return any(found)

    def view(self) -> Mesh:
        """Return the current mesh."""
        return self._discovery.mesh if self._discovery is not None else Mesh.EMPTY

    @property
    def _discovery(self) -> Discovery | None:
        return self._app.discovery if self._app.speaks_to_discovery else None

    def effective_config(self) -> object:
        """Return the configuration with secrets hidden."""
        return encode(Config, self._app.config)
