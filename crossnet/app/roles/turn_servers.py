"""The records of TURN servers that somebody else runs, such as coturn, as a role."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

from crossnet.app.publication import publish_turn_servers
from crossnet.app.role import Role
from crossnet.config.reload import Refused
from crossnet.config.sections import Config


class TurnServersRole(Role):
    """Writes their records. It is there without any, too, for a file that is changed to have some."""

    name: ClassVar[str] = "turn_servers"

    @property
    def active(self) -> bool:
        """Whether there are any."""
        return bool(self.host.config.turn_servers)

    def publish(self) -> None:
        """Write the records."""
        publish_turn_servers(self.host.config, self.host.discovery)

    def changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Write and withdraw what has changed."""
        if old.turn_servers != new.turn_servers:
            yield partial(self._republish, old, new)

    def _republish(self, old: Config, new: Config) -> None:
        if not self.host.speaks_to_discovery:
            raise Refused("$.turn_servers: expected a restart, since no role of this process speaks to discovery yet")
        publish_turn_servers(new, self.host.discovery, instead_of=old)
