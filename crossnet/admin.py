"""The admin server: health, readiness, metrics, live streams, the current view of discovery, effective configuration.

It only tells and changes nothing, on loopback unless configured otherwise. Names of services and addresses of clients
are in what it tells, so a web page that a browser on this machine happens to show must not read it: requests are taken
only under an address or `localhost`, never under a name that somebody may point here.
"""

import json
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Protocol

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from discovery.model import Mesh

MAX_REQUEST_BYTES = 1024
"""Of a request's body: nothing here takes one."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Process(Protocol):
    """What the admin server tells of; the running application is one."""

    registry: CollectorRegistry

    def waiting_for(self) -> list[str]:
        """Return what is not ready yet; empty when all is."""

    def status(self) -> dict[str, object]:
        """Return how the process is, for people and `crossnet status`."""

    def streams(self) -> dict[str, list[dict[str, object]]]:
        """Return the open streams by role."""

    def view(self) -> Mesh:
        """Return the current mesh."""

    def effective_config(self) -> object:
        """Return the configuration, secrets hidden."""


class AdminServer:
    """Serves one process's pages. `open` it, and `close` it last."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.address: tuple[str, int] = ("", 0)
        application = web.Application(middlewares=[_only_by_address], client_max_size=MAX_REQUEST_BYTES)
        application.add_routes(
            [
                web.get("/", self._index),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status),
                web.get("/streams", self._streams),
                web.get("/mesh", self._mesh),
                web.get("/config", self._config),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False)

    async def open(self, address: str, port: int) -> None:
        """Listen. Raises OSError."""
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, address, port, shutdown_timeout=1.0)
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        bound = self._runner.addresses[0]
        self.address = (bound[0], bound[1])

    async def close(self) -> None:
        """Stop at once."""
        await self._runner.cleanup()

    async def _index(self, request: web.Request) -> web.StreamResponse:
        paths = sorted({resource.canonical for resource in request.app.router.resources()} - {"/"})
        return web.Response(text="\n".join(paths) + "\n")

    async def _healthz(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.StreamResponse:
        del request
        waiting = self._process.waiting_for()
        return _json({"ready": not waiting, "waiting_for": waiting}, 503 if waiting else 200)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.Response(body=generate_latest(self._process.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status(self, request: web.Request) -> web.StreamResponse:
        del request
        return _json(self._process.status())

    async def _streams(self, request: web.Request) -> web.StreamResponse:
        del request
        return _json(self._process.streams())

    async def _mesh(self, request: web.Request) -> web.StreamResponse:
        del request
        mesh = self._process.view()
        return _json({"revision": mesh.revision, "records": msgspec.to_builtins(list(mesh))})

    async def _config(self, request: web.Request) -> web.StreamResponse:
        del request
        return _json(self._process.effective_config())


@web.middleware
async def _only_by_address(request: web.Request, handler: Handler) -> web.StreamResponse:
    host = request.url.host or ""
    try:
        ip_address(host)
    except ValueError:
        if host != "localhost":
            return _json({"error": "misdirected", "detail": "ask by address or as localhost"}, 421)
    return await handler(request)


def _json(value: object, status: int = 200) -> web.Response:
    text = json.dumps(value, default=str, indent=1, ensure_ascii=True)
    return web.Response(text=text + "\n", status=status, content_type="application/json")
