"""The publisher as a role."""

from collections.abc import Iterator
from typing import ClassVar

from crossnet.app import role_configs
from crossnet.app.readiness import Condition
from crossnet.app.role import Role
from discovery.publisher import Publisher


class PublisherRole(Role):
    """Publishes services of a Kubernetes cluster."""

    name: ClassVar[str] = "publisher"
    publisher: Publisher

    async def open(self) -> None:
        """Start to follow the cluster."""
        host = self.host
        section = host.config.publisher
        assert section is not None

        async def opened() -> Publisher:
            return Publisher(
                role_configs.publisher_config(host.config, section), host.discovery, registry=host.registry
            )

        self.publisher = await self.begin(opened())
        host.run(self.name, self.publisher.run())

    def conditions(self) -> Iterator[Condition]:
        """Yield the condition that the cluster has been listed."""
        yield Condition("cluster", () if self.publisher.listed else ("a first list of the cluster",))
