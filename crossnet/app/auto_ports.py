"""Keeps a relay listening on the ports of imported services (`relay.ports: auto`), and its record true about them."""

import asyncio
import logging
from collections.abc import Callable

from discovery.client.contract import Discovery
from discovery.model.mesh import Mesh
from sniproxy.relay.relay import Relay
from sniproxy.relay.service_ports import service_ports

log = logging.getLogger("crossnet")

LOOK_AGAIN_S = 10.0
"""How often a port that was in use is tried again, and unneeded ports are closed."""

LINGER_S = 60.0
"""An unneeded port is closed after this. A service whose lease has lapsed is usually back within seconds, and its clients must not
find a closed port meanwhile."""


class AdaptivePorts:
    """Follows discovery for one relay."""

    def __init__(
        self,
        relay: Relay,
        discovery: Discovery,
        range_: tuple[int, int],
        tell: Callable[[list[int]], None],
        *,
        own: bool = False,
    ) -> None:
        """Start without ports.

        Args:
            relay: listens on them.
            discovery: has the imported services.
            range_: the lowest and the highest port that may be opened.
            tell: called with all ports of the relay when they change.
            own: also open ports for services of the relay's own network.
        """
        self._relay = relay
        self._discovery = discovery
        self._low, self._high = range_
        self._tell = tell
        self._own = own
        self._changed = asyncio.Event()
        self._seen: dict[int, float] = {}
        self._failed: dict[int, str] = {}

    async def run(self) -> None:
        """Follow discovery until cancelled."""
        unsubscribe = self._discovery.subscribe(self._notice)
        loop = asyncio.get_running_loop()
        told: list[int] = []
        # Ports from a predecessor are kept for as long as our own would be.
        self._seen = {port: loop.time() for (_, port), _ in self._relay.adapted()}
        try:
            while True:
                self._changed.clear()
                config = self._relay.config
                wanted = service_ports(
                    self._discovery.mesh, config.network, config.imports, self._low, self._high, own=self._own
                )
                now = loop.time()
                self._seen |= dict.fromkeys(wanted, now)
                self._seen = {port: at for port, at in self._seen.items() if now - at < LINGER_S}
                failed = await self._relay.adapt(self._seen)
                for port, why in failed.items():
                    if self._failed.get(port) != why:
                        log.warning("port_not_opened", extra={"event": {"port": port, "detail": why}})
                self._failed = failed
                ports = sorted({port for _, port in self._relay.addresses})
                if ports != told:
                    told = ports
                    log.info("ports", extra={"event": {"ports": ports}})
                    self._tell(ports)
                try:
                    async with asyncio.timeout(LOOK_AGAIN_S):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            unsubscribe()

    def _notice(self, mesh: Mesh) -> None:
        del mesh
        self._changed.set()
