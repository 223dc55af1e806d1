"""Connections that are not authenticated yet. If there are too many, the oldest one of the busiest client is closed."""

from typing import Generic, TypeVar

Connection = TypeVar("Connection")


class UnauthenticatedConnections(Generic[Connection]):
    """The unauthenticated connections in order of arrival, in total and per client."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[Connection, str] = {}
        self._of: dict[str, dict[Connection, None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def admit(self, connection: Connection, client: str) -> Connection | None:
        """Add a connection. Returns the connection that must be closed for it, None if there was room.

        Of three clients (this one, that of the oldest connection and that of the newest), the one with the most connections loses
        its oldest one. So a flood from a few addresses displaces only itself, even if honest clients are far away and need a round
        trip or three.

        Args:
            client: distinguishes clients, see `turnreg.stun.auth.client_key`.
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
        """Remove a connection that has authenticated or is gone. Does nothing the second time."""
        client = self._waiting.pop(connection, None)
        if client is None:
            return
        mine = self._of[client]
        del mine[connection]
        if not mine:
            del self._of[client]
