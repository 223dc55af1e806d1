"""An API server of the tests' own: it keeps the rules of resourceVersions that a publisher must live with.

Versions are opaque text that only this server compares. A list is told in pages, all of one version, and its continuation
ends with compaction (410). A watch tells every change after its version once, in order; from a version that was compacted
it fails with 410, as a status or as an ERROR in the stream, as real servers do. One token is known.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

KINDS = {"services": "Service", "endpointslices": "EndpointSlice"}


class KubeServer:
    """The cluster."""

    def __init__(self, token: str = "t0ken") -> None:
        self.token = token
        self.url = ""
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.gone_in_stream = False
        self.page = 2
        self.watches = 0
        self._version = 1000
        self._compacted = 1000
        self._objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._history: list[tuple[int, str, str, dict[str, Any]]] = []
        self._changed = asyncio.Event()
        self._end = asyncio.Event()

    def put(self, resource: str, namespace: str, name: str, **fields: Any) -> None:
        key = (resource, namespace, name)
        kind = "MODIFIED" if key in self._objects else "ADDED"
        metadata = {"namespace": namespace, "name": name} | fields.pop("metadata", {})
        self._record(kind, key, {"metadata": metadata, **fields})

    def delete(self, resource: str, namespace: str, name: str) -> None:
        key = (resource, namespace, name)
        self._record("DELETED", key, self._objects[key])

    def bookmark(self) -> None:
        """Tell watchers of a version at which nothing of theirs changed."""
        self._record("BOOKMARK", ("", "", ""), {"metadata": {}})

    def compact(self) -> None:
        """Forget all history."""
        self._compacted = self._version
        self._history.clear()

    def end_watches(self) -> None:
        """End every watch, as a server does when their time is over."""
        self._end.set()
        self._end = asyncio.Event()

    def _record(self, kind: str, key: tuple[str, str, str], found: dict[str, Any]) -> None:
        self._version += 7  # never by one: nobody may count on that
        found = {**found, "metadata": {**found["metadata"], "resourceVersion": f"v{self._version}"}}
        if kind == "DELETED":
            del self._objects[key]
        elif kind != "BOOKMARK":
            self._objects[key] = found
        self._history.append((self._version, kind, key[0], found))
        self._changed.set()
        self._changed = asyncio.Event()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        query = dict(request.query)
        resource, namespace = request.path.rpartition("/")[2], request.match_info.get("namespace")
        self.asked.append((resource, query))
        if query.get("watch") == "true":
            return await self._watch(request, resource, namespace, query["resourceVersion"])
        version, start = self._version, 0
        if "continue" in query:
            version, start = map(int, query["continue"].split("/"))
            if version < self._compacted:
                return _status(410, "The provided continue parameter is too old")
        objects = [
            found
            for (kind, place, _), found in sorted(self._objects.items())
            if kind == resource and namespace in (None, place)
        ]
        more = start + self.page < len(objects)
        metadata = {"resourceVersion": f"v{version}"} | ({"continue": f"{version}/{start + self.page}"} if more else {})
        return web.json_response({"metadata": metadata, "items": objects[start : start + self.page]})

    async def _watch(
        self, request: web.Request, resource: str, namespace: str | None, version: str
    ) -> web.StreamResponse:
        if not version.startswith("v"):
            return _status(400, "this server gave no such version")
        at = int(version[1:])
        if at < self._compacted and not self.gone_in_stream:
            return _status(410, "too old resource version")
        response = web.StreamResponse()
        await response.prepare(request)
        if at < self._compacted:
            error = {"kind": "Status", "code": 410, "message": "too old resource version"}
            await response.write(json.dumps({"type": "ERROR", "object": error}).encode() + b"\n")
            return response
        end = self._end
        self.watches += 1
        try:
            while not end.is_set():
                changed = self._changed
                for number, kind, of, found in list(self._history):
                    place = found["metadata"].get("namespace")
                    if number > at and (kind == "BOOKMARK" or (of == resource and namespace in (None, place))):
                        at = number
                        await response.write(json.dumps({"type": kind, "object": found}).encode() + b"\n")
                while not changed.is_set() and not end.is_set():
                    await asyncio.sleep(0.01)
        finally:
            self.watches -= 1
        return response


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)


@asynccontextmanager
async def kube_server() -> AsyncIterator[KubeServer]:
    """Serve on loopback."""
    server = KubeServer()
    application = web.Application()
    for base, resource in (("/api/v1", "services"), ("/apis/discovery.k8s.io/v1", "endpointslices")):
        application.router.add_get(f"{base}/{resource}", server._answer)
        application.router.add_get(f"{base}/namespaces/{{namespace}}/{resource}", server._answer)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        server.end_watches()
        await runner.cleanup()
