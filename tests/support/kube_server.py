"""A Kubernetes API server for tests, which follows the rules of resourceVersions that matter to a publisher.

Versions are opaque text that only this server compares. A list is sent in pages of the same version, whose continuation fails
after compaction (410). A watch sends each change after its version once, in order, until its timeout; from a compacted version
it fails with 410, either as an ERROR in the stream, as a kube-apiserver does, or as a status, which is also allowed. One token
is accepted. Its answers have the structure of a real server's (`test_recording.py` compares them), and it describes its
resources well enough for kubectl.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

KINDS = {"services": ("v1", "Service"), "endpointslices": ("discovery.k8s.io/v1", "EndpointSlice")}
PLACES = {"services": "/api/v1", "endpointslices": "/apis/discovery.k8s.io/v1"}
LIMIT_S = 20.0


class KubeServer:
    """The cluster."""

    def __init__(self, token: str = "t0ken") -> None:
        self.token = token
        self.url = ""
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.gone_in_stream = True
        self.page = 2
        self.watches = 0
        self.told: dict[str, str] = {}
        """Version of the last change that a watch was sent, by resource."""
        self._letter = "v"
        self._version = 1000
        self._compacted = 1000
        self._objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._history: list[tuple[int, str, str, dict[str, Any]]] = []
        self._changed = asyncio.Event()
        self._ended = 0

    @property
    def version(self) -> str:
        """The version of the last change."""
        return f"{self._letter}{self._version}"

    def put(self, resource: str, namespace: str, name: str, **fields: Any) -> None:
        key = (resource, namespace, name)
        kind = "MODIFIED" if key in self._objects else "ADDED"
        metadata = {"namespace": namespace, "name": name} | fields.pop("metadata", {})
        self._record(kind, key, {"metadata": metadata, **fields})

    def delete(self, resource: str, namespace: str, name: str) -> None:
        key = (resource, namespace, name)
        self._record("DELETED", key, self._objects[key])

    def bookmark(self) -> None:
        """Send watchers a version without a change of their objects."""
        self._record("BOOKMARK", ("", "", ""), {"metadata": {}})

    def compact(self) -> None:
        """Compact: forget all history."""
        self._compacted = self._version
        self._history.clear()

    def forget(self) -> None:
        """Become another cluster: without objects, and with versions of another form."""
        self._objects.clear()
        self.compact()
        self._letter = "w"
        self.end_watches()

    def end_watches(self) -> None:
        """End all watches, as a server does at their timeout."""
        self._ended += 1
        self._notify()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until a condition on requests, changes or watches holds."""
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                await self._changed.wait()

    def _notify(self) -> None:
        """Wake watches and tests."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _record(self, kind: str, key: tuple[str, str, str], found: dict[str, Any]) -> None:
        self._version += 7  # not by one, which clients must not rely on
        found = {**found, "metadata": {**found["metadata"], "resourceVersion": self.version}}
        if kind == "DELETED":
            del self._objects[key]
        elif kind != "BOOKMARK":
            self._objects[key] = found
        self._history.append((self._version, kind, key[0], found))
        self._notify()

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response(_status(401, "Unauthorized", "Unauthorized"), status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _tell_resources(self, request: web.Request) -> web.StreamResponse:
        """Answer the requests with which kubectl discovers resources."""
        group = {"groupVersion": "discovery.k8s.io/v1", "version": "v1"}
        groups = [{"name": "discovery.k8s.io", "versions": [group], "preferredVersion": group}]
        told: dict[str, dict[str, Any]] = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
        }
        for resource, place in PLACES.items():
            version, kind = KINDS[resource]
            item = {"name": resource, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["list", "watch"]}
            told[place] = {"kind": "APIResourceList", "groupVersion": version, "resources": [item]}
        return web.json_response(told[request.path])

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        resource, namespace = request.path.rpartition("/")[2], request.match_info.get("namespace")
        self.asked.append((resource, query))
        self._notify()
        if query.get("watch") in ("true", "1"):
            return await self._watch(request, resource, namespace, query)
        version, start = self._version, 0
        if "continue" in query:
            version, start = map(int, query["continue"].split("/"))
            if version < self._compacted:
                gone = _status(410, "The provided continue parameter is too old", "Expired")
                gone["metadata"] = {"continue": f"{self._version}/{start}"}
                return web.json_response(gone, status=410)
        objects = [
            found
            for (kind, place, _), found in sorted(self._objects.items())
            if kind == resource and namespace in (None, place)
        ]
        page = min(self.page, int(query.get("limit", "0")) or len(objects))
        left = len(objects) - start - page
        metadata: dict[str, Any] = {"resourceVersion": f"{self._letter}{version}"}
        if left > 0:
            metadata |= {"continue": f"{version}/{start + page}", "remainingItemCount": left}
        group, item = KINDS[resource]
        told = {
            "kind": f"{item}List",
            "apiVersion": group,
            "metadata": metadata,
            "items": objects[start : start + page],
        }
        return web.json_response(told)

    async def _watch(
        self, request: web.Request, resource: str, namespace: str | None, query: dict[str, str]
    ) -> web.StreamResponse:
        version = query["resourceVersion"]
        if not version.startswith(self._letter):
            return web.json_response(_status(500, "this server gave no such version"), status=500)
        at = int(version[1:])
        gone = _status(410, f"too old resource version: {at} ({self._compacted})", "Expired")
        if at < self._compacted and not self.gone_in_stream:
            return web.json_response(gone, status=410)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if at < self._compacted:
            await response.write(_line("ERROR", gone))
            return response
        group, item = KINDS[resource]
        ended = self._ended
        self.watches += 1
        self._notify()
        try:
            async with asyncio.timeout(int(query.get("timeoutSeconds", "1800"))):
                while self._ended == ended:
                    changed = self._changed
                    for number, kind, of, found in list(self._history):
                        if number <= at:
                            continue
                        place = found["metadata"].get("namespace")
                        if of == resource and namespace in (None, place):
                            told = {"kind": item, "apiVersion": group, **found}
                        elif kind == "BOOKMARK" and query.get("allowWatchBookmarks") == "true":
                            metadata = {**found["metadata"], "creationTimestamp": None}
                            told = {"kind": item, "apiVersion": group, "metadata": metadata}
                        else:
                            continue
                        at = number
                        await response.write(_line(kind, told))
                        self.told[resource] = found["metadata"]["resourceVersion"]
                        self._notify()
                    await changed.wait()
        except TimeoutError:
            pass
        finally:
            self.watches -= 1
            self._notify()
        return response


def _line(kind: str, found: object) -> bytes:
    return json.dumps({"type": kind, "object": found}).encode() + b"\n"


def _status(code: int, message: str, reason: str | None = None) -> dict[str, Any]:
    told = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
    return told | ({"reason": reason} if reason is not None else {}) | {"code": code}


@asynccontextmanager
async def kube_server(tls: ssl.SSLContext | None = None) -> AsyncIterator[KubeServer]:
    """Serve on loopback."""
    server = KubeServer()
    application = web.Application(middlewares=[server._authenticate])
    for path in ("/api", "/apis", *PLACES.values()):
        application.router.add_get(path, server._tell_resources)
    for resource, place in PLACES.items():
        application.router.add_get(f"{place}/{resource}", server._answer)
        application.router.add_get(f"{place}/namespaces/{{namespace}}/{resource}", server._answer)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    server.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        server.end_watches()
        await runner.cleanup()
