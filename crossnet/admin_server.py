"""The admin server: health, readiness, metrics, live streams, the current view of discovery, effective configuration.

It has no authentication, and listens on loopback unless configured otherwise. Its pages contain names of services and addresses of
clients, which a web page in a browser on this machine must not be able to read. So it accepts requests only if their Host is an
address or `localhost`, not a name that an attacker could point here.

It only reads, except that it can end a stream: for a client on loopback that sends the header `Crossnet-Admin`, which a web page
cannot send to another origin without a preflight, and that is never granted.
"""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_network
from typing import Protocol, TypeAlias

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from discovery.http.listener import Connection, Listener, ListenerLimits
from discovery.model.mesh import Mesh
from sniproxy.access.name_pattern import NamePattern

MAX_REQUEST_BYTES = 1024
"""Limit of a request's body. No request needs one."""

PROBES = frozenset({"/healthz", "/readyz"})

LIMITS = ListenerLimits(connections=256, connections_per_address=256, request_bytes=64 * 1024, files_share=16)
"""For Prometheus, people, and many scripts. Descriptors are mainly for streams: at most a sixteenth of them is for this server."""

ANSWER_TIMEOUT_S = 60.0
PIECE_ITEMS = 100
"""Rows or records written at once, which takes a millisecond."""

GUARD_HEADER = "Crossnet-Admin"
"""Header that a request needs, with any value, to change something."""

Row: TypeAlias = Mapping[str, object]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Process(Protocol):
    """The process that the admin server shows, which is implemented by Inspection."""

    registry: CollectorRegistry

    def waiting_for(self) -> list[str]:
        """Return what is not ready yet; empty when everything is."""

    def stale_s(self) -> float | None:
        """Return how old the view of discovery is in seconds, since a server last confirmed it; None without servers."""

    def status(self) -> dict[str, object]:
        """Return the state of the process, for people and `crossnet status`."""

    def streams(self) -> dict[str, list[dict[str, object]]]:
        """Return the open streams by role."""

    def ended_streams(self) -> dict[str, list[dict[str, object]]]:
        """Return the streams that have ended most recently, by role."""

    def end_stream(self, stream: bytes) -> bool:
        """End an open stream by its id; False if there is none."""

    def view(self) -> Mesh:
        """Return the current mesh."""

    def effective_config(self) -> object:
        """Return the configuration with secrets hidden."""


class AdminServer:
    """Serves the pages of one process. `open` it first, and `close` it last."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.address: tuple[str, int] = ("", 0)
        application = web.Application(middlewares=[self._in_turn, _only_by_address], client_max_size=MAX_REQUEST_BYTES)
        application.add_routes(
            [
                web.get("/", self._index),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status),
                web.get("/streams", self._streams),
                web.delete("/streams/{stream}", self._end_stream),
                web.get("/mesh", self._mesh),
                web.get("/config", self._config),
            ]
        )
        self._listener = Listener("admin", LIMITS, process.registry)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)

    async def open(self, address: str, port: int, inherited: socket.socket | None = None) -> None:
        """Listen, with the inherited socket if there is one. Raises OSError."""
        await self._runner.setup()
        try:
            self._listener.open(self._runner, [(address, port)], inherited=inherited)
        except OSError:
            await self._runner.cleanup()
            raise
        (self.address,) = self._listener.addresses

    async def run(self) -> None:
        """Answer requests until closed or cancelled."""
        await self._listener.run()

    def fileno(self) -> int:
        """Return the descriptor of the listening socket, for a successor."""
        (listening,) = self._listener.sockets
        return listening.fileno()

    async def close(self) -> None:
        """Stop at once. May be called again."""
        self._listener.close()
        await self._runner.cleanup()

    @web.middleware
    async def _in_turn(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer clients with many requests after all others."""
        protocol = request.protocol
        if isinstance(protocol, Connection):
            protocol.busy = True
        try:
            # Every page except the probes takes milliseconds, so other work gets a turn between two of them.
            crowd = self._listener.crowds(request) or request.path not in PROBES
            await self._listener.gate.enter(id(protocol), crowd=crowd)
            return await handler(request)
        finally:
            if isinstance(protocol, Connection):
                protocol.busy = False

    async def _index(self, request: web.Request) -> web.StreamResponse:
        paths = sorted({resource.canonical for resource in request.app.router.resources()} - {"/"})
        return web.Response(text="\n".join(paths) + "\n")

    async def _healthz(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.StreamResponse:
        del request
        waiting = self._process.waiting_for()
        # A process with an old view of discovery is ready; the answer says how old it is.
        told = {"ready": not waiting, "waiting_for": waiting, "stale_s": self._process.stale_s()}
        return _json(told, 503 if waiting else 200)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.Response(body=generate_latest(self._process.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status(self, request: web.Request) -> web.StreamResponse:
        del request
        return _json(self._process.status())

    async def _streams(self, request: web.Request) -> web.StreamResponse:
        try:
            wanted = _filter(request.query)
        except ValueError as error:
            return _json({"error": "bad_filter", "detail": str(error)}, 400)
        # Only streams that have ended have a reason.
        rows = self._process.ended_streams() if "reason" in request.query else self._process.streams()
        found = {role: [row for row in of_role if wanted(row)] for role, of_role in rows.items()}
        return await self._in_pieces(request, _pieces(found))

    async def _end_stream(self, request: web.Request) -> web.StreamResponse:
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        if peer is None or not ip_address(peer[0].partition("%")[0]).is_loopback:
            return _json({"error": "forbidden", "detail": "streams are ended from this machine only"}, 403)
        if GUARD_HEADER not in request.headers:
            return _json({"error": "forbidden", "detail": f"send the header {GUARD_HEADER}: 1"}, 403)
        try:
            stream = bytes.fromhex(request.match_info["stream"])
        except ValueError:
            stream = b""
        if not self._process.end_stream(stream):
            return _json({"error": "not_found", "detail": "no stream of this id is open"}, 404)
        return _json({"ended": stream.hex()})

    async def _mesh(self, request: web.Request) -> web.StreamResponse:
        mesh = self._process.view()
        return await self._in_pieces(request, _pieces({"revision": mesh.revision, "records": list(mesh)}))

    async def _in_pieces(self, request: web.Request, pieces: Iterable[str]) -> web.StreamResponse:
        """Send a large answer in pieces, between which streams and other requests get their turn."""
        response = web.StreamResponse()
        response.content_type = "application/json"
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await response.prepare(request)
                for number, piece in enumerate(pieces):
                    await self._listener.gate.enter(id(request), crowd=number > 0)
                    await response.write(piece.encode())
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _config(self, request: web.Request) -> web.StreamResponse:
        del request
        return _json(self._process.effective_config())


def _filter(query: Mapping[str, str]) -> Callable[[Row], bool]:
    """Parse a filter of rows; all of its conditions must hold. Raises ValueError."""
    checks = [_check(name, value) for name, value in query.items()]
    return lambda row: all(check(row) for check in checks)


def _check(name: str, value: str) -> Callable[[Row], bool]:
    if name == "network":
        return lambda row: value in (row.get("network"), row.get("from_network"))
    if name == "client":
        clients = ip_network(value)
        return lambda row: ip_address(str(row.get("client", "::"))) in clients
    if name == "sni":
        pattern = NamePattern.parse(value.lower())
        return lambda row: pattern.matches(str(row.get("sni", "")))
    if name in ("state", "reason"):
        return lambda row: value in ("*", row.get(name))
    raise ValueError(f"{name!r} is none of network, client (an address or CIDR), sni (* is a label), state, reason")


@web.middleware
async def _only_by_address(request: web.Request, handler: Handler) -> web.StreamResponse:
    host = ""
    try:
        host = request.url.host or ""  # ValueError: the Host header can be anything
        ip_address(host)
    except ValueError:
        if host != "localhost":
            return _json({"error": "misdirected", "detail": "ask by address or as localhost"}, 421)
    return await handler(request)


def _json(value: object, status: int = 200) -> web.Response:
    text = json.dumps(value, default=str, indent=1, ensure_ascii=True)
    return web.Response(text=text + "\n", status=status, content_type="application/json")


def _pieces(value: Mapping[str, object]) -> Iterator[str]:
    """Yield JSON text, with up to PIECE_ITEMS items of a list at a time."""
    before = "{"
    for name, items in value.items():
        yield f"{before}{json.dumps(name)}: "
        before = ",\n"
        if not isinstance(items, list):
            yield json.dumps(items, default=str)
            continue
        yield "["
        for start in range(0, len(items), PIECE_ITEMS):
            part = msgspec.to_builtins(items[start : start + PIECE_ITEMS], enc_hook=str)
            text = ",\n".join(json.dumps(item, default=str) for item in part)
            yield text if start == 0 else f",\n{text}"
        yield "]"
    yield "}\n" if value else "{}\n"
