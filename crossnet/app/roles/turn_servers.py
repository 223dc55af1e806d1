"""The records of external TURN servers, such as coturn, as a role."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

from crossnet.app.publication import publish_turn_servers
from crossnet.app.role import Role
from crossnet.config.reload import Refused
from crossnet.config.sections import Config


class TurnServersRole(Role):
    """Writes their records. It exists even if there are none, since a changed file may add some."""

    name: ClassVar[str] = "turn_servers"

    @property
    def active(self) -> bool:
        """Whether any are configured."""
        return bool(self.host.config.turn_servers)

    def publish(self) -> None:
        """Write the records."""
        publish_turn_servers(self.host.config, self.host.discovery)

    def changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Yield the change of the records."""
        if old.turn_servers != new.turn_servers:
            yield partial(self._republish, old, new)

    def _republish(self, old: Config, new: Config) -> None:
        if not self.host.speaks_to_discovery:
            raise Refused("$.turn_servers: expected a restart, since no role of this process speaks to discovery yet")
        publish_turn_servers(new, self.host.discovery, instead_of=old)
