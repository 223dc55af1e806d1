"""Connections that are not authenticated yet. When there are too many, the oldest one of the busiest client is closed."""

from typing import Generic, TypeVar

Connection = TypeVar("Connection")


class UnauthenticatedConnections(Generic[Connection]):
    """The connections in the order of their arrival, in all and of each client."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[Connection, str] = {}
        self._of: dict[str, dict[Connection, None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def admit(self, connection: Connection, client: str) -> Connection | None:
        """Take one in. Returns the one that has to go for it, None if there was room.

        It is the oldest of whoever has the most among this client and those of the oldest and of the newest one: a flood from a few
        addresses crowds out itself, however far away the clients are that mean it well and need a round trip or three.

        Args:
            client: what clients are told apart by, see `turnreg.stun.auth.client_key`.
        """
        crowded_out = None
        if len(self._waiting) >= self._limit:
            clients = self._waiting.values()
            most = max(next(iter(clients)), next(reversed(clients)), client, key=lambda one: len(self._of.get(one, ())))
            crowded_out = next(iter(self._of[most]))
            self.dismiss(crowded_out)
        self._waiting[connection] = client
        self._of.setdefault(client, {})[connection] = None
        return crowded_out

    def dismiss(self, connection: Connection) -> None:
        """Forget one: it has shown credentials, or it is gone. Nothing if it was forgotten before."""
        client = self._waiting.pop(connection, None)
        if client is None:
            return
        mine = self._of[client]
        del mine[connection]
        if not mine:
            del self._of[client]
