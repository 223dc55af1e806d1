"""A discovery server as it was before negotiated fields, in front of a real one."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from discovery.model.spec import NEGOTIATED

NEW = {field.partition(".")[2] for field in NEGOTIATED}
KEPT_HEADERS = ("Authorization", "If-Match", "If-None-Match", "Content-Type")


class OlderServer:
    """The server. `is_old` is set to False when it is upgraded."""

    def __init__(self, url: str) -> None:
        self.url = ""
        self.is_old = True
        self.watches: list[dict[str, str]] = []
        """The query of each watch."""

        self._behind = url
        self._open: list[web.Request] = []

    def upgrade(self) -> None:
        """Become a server of this version, which ends all watches."""
        self.is_old = False
        for request in self._open:
            assert request.transport is not None
            request.transport.abort()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        query, data = dict(request.query), await request.read()
        if request.path == "/v1/watch":
            self.watches.append(dict(query))
        if self.is_old:
            query.pop("fields", None)
            if data and NEW & json.loads(data).get("spec", {}).keys():
                return web.json_response({"error": "bad_record", "detail": "unknown field"}, status=400)
        headers = {name: request.headers[name] for name in KEPT_HEADERS if name in request.headers}
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method, self._behind + request.path, params=query, data=data or None, headers=headers
            ) as answer,
        ):
            kept = {name: value for name, value in answer.headers.items() if name in ("Content-Type", "Crossnet-Epoch")}
            if not self.is_old:
                kept["Crossnet-Fields"] = answer.headers["Crossnet-Fields"]
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            self._open.append(request)
            try:
                async for piece in answer.content.iter_any():
                    await response.write(piece)
            finally:
                self._open.remove(request)
        return response


@asynccontextmanager
async def older_server(at: Any) -> AsyncIterator[OlderServer]:
    """Serve on loopback, in front of a server."""
    server = OlderServer(at.url)
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
