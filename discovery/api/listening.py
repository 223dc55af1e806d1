"""Where a discovery server listens, and with which certificates: both outlive every change of the other."""

import asyncio
import socket
import ssl
from contextlib import ExitStack

from aiohttp import web

from discovery.server_config import DiscoveryServerConfig

BACKLOG = 128

FIRST_REQUEST_S = 20.0
"""What a connection may take until it has asked something whole. Later requests have aiohttp's keep-alive, and bodies a limit
of their own; before the first one aiohttp waits for ever."""

LOOK_S = 5.0


class Listening:
    """The listening sockets. Connections wait in them while the certificates are changed, and none is refused."""

    def __init__(self, config: DiscoveryServerConfig) -> None:
        self._config = config
        self._runner: web.AppRunner
        self._sockets: list[socket.socket] = []
        self._sites: list[web.SockSite] = []
        self._asked: set[object] = set()
        self._first_seen: dict[object, float] = {}

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Where it listens, in the order of the configuration."""
        names = [listener.getsockname() for listener in self._sockets]
        return tuple((str(name[0]), int(name[1])) for name in names)

    async def open(self, runner: web.AppRunner, tls: ssl.SSLContext | None) -> None:
        """Listen for a runner that has been set up. Raises OSError, and then nothing is open."""
        self._runner = runner
        with ExitStack() as opened:
            for host, port in self._config.listen:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                listener = opened.enter_context(socket.create_server((host, port), family=family, backlog=BACKLOG))
                self._sockets.append(listener)
            await self.renew(tls)
            opened.pop_all()

    async def renew(self, tls: ssl.SSLContext | None) -> None:
        """Take later connections with this context: what the one before trusted, and every session that it gave, is void."""
        before = self._sites
        self._sites = []
        for listener in self._sockets:
            site = web.SockSite(self._runner, listener.dup(), ssl_context=tls, backlog=BACKLOG)
            self._sites.append(site)
            await site.start()
        for site in before:
            await site.stop()

    def asks(self, request: web.Request) -> None:
        """Note that a connection has asked something."""
        self._asked.add(request.protocol)

    async def run(self) -> None:
        """End connections that ask nothing, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_S)
            assert self._runner.server is not None
            connections = self._runner.server.connections
            self._first_seen = {each: self._first_seen.get(each, loop.time()) for each in connections}
            self._asked.intersection_update(connections)
            for connection in connections:
                silent_s = loop.time() - self._first_seen[connection] if connection not in self._asked else 0.0
                if silent_s > FIRST_REQUEST_S and connection.transport is not None:
                    connection.transport.abort()

    def cut_certified(self) -> int:
        """End every connection whose client has shown a certificate, so that it has to show it anew; gives how many."""
        assert self._runner.server is not None
        found = [connection.transport for connection in self._runner.server.connections]
        certified = [transport for transport in found if transport and transport.get_extra_info("peercert")]
        for transport in certified:
            transport.abort()
        return len(certified)

    def close(self) -> None:
        """Listen no more; the runner ends what is connected."""
        for listener in self._sockets:
            listener.close()
