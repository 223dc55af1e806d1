"""A Kubernetes API server for tests, which follows the rules of resourceVersions that matter to a publisher.

Versions are opaque text that only this server compares. A list is sent in pages of the same version, whose continuation fails
after compaction (410). A watch sends each change after its version once, in order, until its timeout; from a compacted version
it fails with 410, either as an ERROR in the stream, as a kube-apiserver does, or as a status, which is also allowed. Events can
be created and merged, and the status of a ServiceExport applied, with the checks that can fail for a publisher. One token is
accepted, which may have no right to write. Its answers have the structure of a real server's (`test_recording.py` compares them),
and it describes its resources well enough for kubectl.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import yaml
from aiohttp import web

KINDS = {
    "services": ("v1", "Service"),
    "endpointslices": ("discovery.k8s.io/v1", "EndpointSlice"),
    "events": ("v1", "Event"),
    "serviceexports": ("multicluster.x-k8s.io/v1alpha1", "ServiceExport"),
}
PLACES = {
    resource: f"/apis/{version}" if "/" in version else f"/api/{version}" for resource, (version, _) in KINDS.items()
}
VERBS = {"events": ["create", "get", "list", "patch"]}
READ = ["get", "list", "watch"]
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
        self.refuses_writes = False
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
        uid = self._objects.get(key, {"metadata": {"uid": f"uid-{self._version}"}})["metadata"]["uid"]
        metadata = {"namespace": namespace, "name": name, "uid": uid} | fields.pop("metadata", {})
        self._record(kind, key, {"metadata": metadata, **fields})

    def delete(self, resource: str, namespace: str, name: str) -> None:
        key = (resource, namespace, name)
        self._record("DELETED", key, self._objects[key])

    def found(self, resource: str) -> list[dict[str, Any]]:
        """Return all objects of a resource."""
        return [found for (kind, _, _), found in sorted(self._objects.items()) if kind == resource]

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
        groups = []
        for version, _ in KINDS.values():
            group, slash, number = version.partition("/")
            if slash:
                one = {"groupVersion": version, "version": number}
                groups.append({"name": group, "versions": [one], "preferredVersion": one})
        told: dict[str, dict[str, Any]] = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
        }
        for resource, place in PLACES.items():
            version, kind = KINDS[resource]
            verbs = VERBS.get(resource, READ)
            item = {"name": resource, "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs}
            listed = told.setdefault(place, {"kind": "APIResourceList", "groupVersion": version, "resources": []})
            listed["resources"].append(item)
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
        selected = dict(part.split("=", 1) for part in query.get("fieldSelector", "").split(",") if part)
        objects = [
            found
            for (kind, place, _), found in sorted(self._objects.items())
            if kind == resource and namespace in (None, place) and _selects(selected, found)
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

    async def _get(self, request: web.Request) -> web.StreamResponse:
        resource, namespace, name = (request.match_info[part] for part in ("resource", "namespace", "name"))
        found = self._objects.get((resource, namespace, name))
        if found is None:
            return _not_found(resource, name)
        version, kind = KINDS[resource]
        return web.json_response({"kind": kind, "apiVersion": version, **found})

    async def _create_event(self, request: web.Request) -> web.StreamResponse:
        namespace = request.match_info["namespace"]
        if self.refuses_writes:
            return _forbidden("create", "events", namespace)
        event = await request.json()
        metadata, concerns = event["metadata"], event["involvedObject"]
        name = metadata["name"]
        if not set(event) <= EVENT_FIELDS or event.get("type") not in ("Normal", "Warning"):
            return web.json_response(_status(400, f"not an Event: {sorted(event)}", "BadRequest"), status=400)
        if not concerns["namespace"] == metadata.get("namespace", namespace) == namespace:
            why = f'Event "{name}" is invalid: involvedObject.namespace: does not match event.namespace'
            return web.json_response(_status(422, why, "Invalid"), status=422)
        if ("events", namespace, name) in self._objects:
            why = f'events "{name}" already exists'
            details = {"name": name, "kind": "events"}
            return web.json_response(_status(409, why, "AlreadyExists") | {"details": details}, status=409)
        self.put("events", namespace, **_fields_of(event))
        return web.json_response(
            {"kind": "Event", "apiVersion": "v1", **self._objects["events", namespace, name]}, status=201
        )

    async def _apply_status(self, request: web.Request) -> web.StreamResponse:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        if self.refuses_writes:
            return _forbidden("patch", "serviceexports/status", namespace)
        if request.content_type != "application/apply-patch+yaml" or not request.query.get("fieldManager"):
            why = "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value: is required for apply patch"
            return web.json_response(_status(422, why, "Invalid"), status=422)
        found = self._objects.get(("serviceexports", namespace, name))
        if found is None:
            return _not_found("serviceexports.multicluster.x-k8s.io", name)
        applied = yaml.safe_load(await request.read())
        if (applied["apiVersion"], applied["kind"]) != KINDS["serviceexports"]:
            return web.json_response(_status(400, "the kind does not match", "BadRequest"), status=400)
        # A list of conditions is a map by `type` (x-kubernetes-list-type: map): those of others stay.
        conditions = {each["type"]: each for each in found.get("status", {}).get("conditions", ())}
        conditions |= {each["type"]: each for each in applied["status"]["conditions"]}
        changed = found | {"status": {"conditions": list(conditions.values())}}
        if changed != found:
            self.put("serviceexports", namespace, **_fields_of(changed))
        version, kind = KINDS["serviceexports"]
        return web.json_response({"kind": kind, "apiVersion": version, **changed})

    async def _merge_event(self, request: web.Request) -> web.StreamResponse:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        if self.refuses_writes:
            return _forbidden("patch", "events", namespace)
        if request.content_type != "application/merge-patch+json":
            return web.json_response(_status(415, "this server merges only", "UnsupportedMediaType"), status=415)
        found = self._objects.get(("events", namespace, name))
        if found is None:
            return _not_found("events", name)
        changes = await request.json()
        self.put("events", namespace, **_fields_of(found | changes))
        return web.json_response({"kind": "Event", "apiVersion": "v1", **self._objects["events", namespace, name]})

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


EVENT_FIELDS = {"kind", "apiVersion", "metadata", "involvedObject", "reason", "message", "type", "source", "count"} | {
    "firstTimestamp",
    "lastTimestamp",
    "reportingComponent",
    "reportingInstance",
}


def _fields_of(item: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `put` for an object."""
    name = item["metadata"]["name"]
    return {"name": name, **{key: value for key, value in item.items() if key not in ("kind", "apiVersion")}}


def _selects(fields: dict[str, str], found: dict[str, Any]) -> bool:
    """Return whether an object has these fields, each a path such as involvedObject.name."""
    for path, wanted in fields.items():
        value: Any = found
        for part in path.split("."):
            value = value.get(part, "")
        if value != wanted:
            return False
    return True


def _not_found(resource: str, name: str) -> web.Response:
    details = {"name": name, "kind": resource}
    return web.json_response(
        _status(404, f'{resource} "{name}" not found', "NotFound") | {"details": details}, status=404
    )


def _forbidden(verb: str, resource: str, namespace: str) -> web.Response:
    why = (
        f'{resource} is forbidden: User "publisher" cannot {verb} resource "{resource}" in the namespace "{namespace}"'
    )
    return web.json_response(_status(403, why, "Forbidden") | {"details": {"kind": resource}}, status=403)


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
    for path in dict.fromkeys(("/api", "/apis", *PLACES.values())):
        application.router.add_get(path, server._tell_resources)
    for resource, place in PLACES.items():
        application.router.add_get(f"{place}/{resource}", server._answer)
        application.router.add_get(f"{place}/namespaces/{{namespace}}/{resource}", server._answer)
        application.router.add_get(f"{place}/namespaces/{{namespace}}/{{resource:{resource}}}/{{name}}", server._get)
    application.router.add_post("/api/v1/namespaces/{namespace}/events", server._create_event)
    place = PLACES["serviceexports"]
    application.router.add_patch(
        f"{place}/namespaces/{{namespace}}/serviceexports/{{name}}/status", server._apply_status
    )
    application.router.add_patch("/api/v1/namespaces/{namespace}/events/{name}", server._merge_event)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    server.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        server.end_watches()
        await runner.cleanup()
