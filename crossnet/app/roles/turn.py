"""The embedded TURN server as a role."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

from crossnet.app import role_configs
from crossnet.app.role import Role
from crossnet.config.sections import Config, TurnSection
from discovery.model.mesh import Kind
from turnreg.server.server import TurnServer


class TurnRole(Role):
    """The TURN server with which gateways of other networks register."""

    name: ClassVar[str] = "turn"
    before_discovery: ClassVar[bool] = True
    server: TurnServer

    async def open(self) -> None:
        """Bind and serve."""
        config = self.host.config
        opening = TurnServer.open(role_configs.turn_config(config, _section(config)), registry=self.host.registry)
        self.server = server = await self.begin(opening)
        self.listens((*server.addresses, *server.tls_addresses, *server.udp_addresses))
        self.host.run(self.name, server.run())

    def publish(self) -> None:
        """Publish its address."""
        server, section = self.server, _section(self.host.config)
        listening = (*server.addresses, *server.tls_addresses)
        spec = role_configs.turn_spec(section, listening[0], tls=not server.addresses)
        self.host.discovery.publish(Kind.TURN, section.id, spec)

    def changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Yield the change of credentials and limits."""
        del old
        yield partial(self.server.reconfigure, role_configs.turn_config(new, _section(new)))

    def withdraw(self) -> None:
        """Withdraw the record, and refuse new allocations."""
        self.host.discovery.withdraw(Kind.TURN, _section(self.host.config).id)
        self.server.drain()

    def hand_over(self) -> None:
        """Refuse new allocations."""
        self.server.drain()

    @property
    def idle(self) -> bool:
        """Whether it relays no stream."""
        return not self.server.streams

    @property
    def open_streams(self) -> int:
        """Number of streams through its allocations."""
        return self.server.streams


def _section(config: Config) -> TurnSection:
    assert config.turn is not None
    return config.turn
