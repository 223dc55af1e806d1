"""The discovery server as a role."""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

from crossnet.app import role_configs
from crossnet.app.role import Role
from crossnet.config.sections import Config
from discovery.api import DiscoveryServer, DiscoveryServerConfig


class DiscoveryServerRole(Role):
    """Answers clients of discovery, including our own."""

    name: ClassVar[str] = "discovery_server"
    before_discovery: ClassVar[bool] = True
    server: DiscoveryServer

    async def open(self) -> None:
        """Bind and serve."""
        self.server = DiscoveryServer(_config(self.host.config), registry=self.host.registry)
        opened: asyncio.Future[tuple[tuple[str, int], ...]] = asyncio.get_running_loop().create_future()

        async def hold() -> None:
            # The context owns the server's tasks, and must be left by the task that entered it.
            try:
                async with self.server.serving() as addresses:
                    opened.set_result(addresses)
                    await asyncio.get_running_loop().create_future()
            except Exception as error:
                if opened.done():
                    raise
                opened.set_exception(error)

        self.host.run(self.name, hold())
        self.listens(await self.begin(opened))

    def changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Yield the change of live settings, such as limits and secrets."""
        del old
        yield partial(self.server.reconfigure, _config(new))


def _config(config: Config) -> DiscoveryServerConfig:
    assert config.discovery_server is not None
    return role_configs.discovery_server_config(config, config.discovery_server)
