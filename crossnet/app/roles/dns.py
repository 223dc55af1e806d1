"""The resolver as a role."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

from crossnet.app import role_configs
from crossnet.app.role import Role
from crossnet.config.reload import Refused
from crossnet.config.sections import Config
from discovery.model.mesh import Kind, VipSpec
from dnsgw.config import DnsConfig
from dnsgw.server import DnsServer


class DnsRole(Role):
    """Answers the questions of this network's clients."""

    name: ClassVar[str] = "dns"
    server: DnsServer

    async def open(self) -> None:
        """Bind, follow discovery and serve."""
        discovery = self.host.discovery

        def claim(id: str, spec: VipSpec) -> None:  # noqa: A002 - the record's own word
            discovery.publish(Kind.VIP, id, spec, leased=False, if_absent=True)

        self.server = server = DnsServer(_config(self.host.config), registry=self.host.registry, claim=claim)
        await self.begin(server.open())
        self.listens((str(address), port) for address, port in server.addresses)
        discovery.subscribe(server.apply)
        if discovery.synced:
            server.apply(discovery.mesh)
        self.host.run(self.name, server.run())

    def changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Yield the change of live settings, such as upstreams, zones and limits."""
        del old
        yield partial(self._reconfigure, _config(new))

    def _reconfigure(self, config: DnsConfig) -> None:
        try:
            self.server.reconfigure(config)
        except (OSError, ValueError) as error:
            raise Refused(f"$.dns: {error}") from error

    async def give_back(self) -> None:
        """Close all sockets to clients and upstreams."""
        await self.server.close()

    def status(self) -> dict[str, object]:
        """Return the state of the upstreams."""
        return {"upstreams": self.server.status()}


def _config(config: Config) -> DnsConfig:
    assert config.dns is not None
    return role_configs.dns_config(config, config.dns)
