"""GET / and its style and script: the page that a server shows to people."""

import time

from aiohttp import web

from discovery.api import page
from discovery.api.page import PageState, render_page
from discovery.api.record_ages import RecordAges
from discovery.api.tokens import Principal
from discovery.model.mesh import Mesh
from discovery.store import Store


class PageRoutes:
    """The routes GET /, /page.css and /page.js."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ages = RecordAges(time.monotonic)
        store.subscribe(self._ages.apply)

    async def open(self) -> None:
        """Note which records exist at the start: their ages are unknown."""
        self._ages.known([record.key for record in (await self._store.snapshot()).records])

    async def show(self, request: web.Request, principal: Principal) -> web.Response:
        """Render the page as this client may see it, for one network if the query names one."""
        snapshot = await self._store.snapshot()
        mesh = Mesh.of(view for record in snapshot.records if (view := principal.view(record)) is not None)
        state = PageState(
            epoch=self._store.epoch,
            revision=snapshot.revision,
            stale_s=self._store.stale_s,
            reader=principal.name,
            ages=self._ages.now(),
        )
        network = request.query.get("network", "")[:63] or None
        return web.Response(
            text=render_page(mesh, state, network), content_type="text/html", headers=page.SECURITY_HEADERS
        )

    async def style(self, _: web.Request) -> web.Response:
        """Return the style sheet, which is the same for all clients."""
        return web.Response(text=page.STYLE, content_type="text/css", headers=page.SECURITY_HEADERS)

    async def script(self, _: web.Request) -> web.Response:
        """Return the script, which is the same for all clients."""
        return web.Response(text=page.SCRIPT, content_type="text/javascript", headers=page.SECURITY_HEADERS)
