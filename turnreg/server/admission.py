"""Connections that have not shown credentials yet: at most so many, and the oldest goes first."""

from typing import Generic, TypeVar

Connection = TypeVar("Connection")


class Strangers(Generic[Connection]):
    """The connections in the order of their arrival."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def admit(self, connection: Connection) -> Connection | None:
        """Take one in. Returns the one that has to go for it, None if there was room."""
        crowded_out = None
        if len(self._waiting) >= self._limit:
            crowded_out = next(iter(self._waiting))
            del self._waiting[crowded_out]
        self._waiting[connection] = None
        return crowded_out

    def dismiss(self, connection: Connection) -> None:
        """Forget one: it has shown credentials, or it is gone. Nothing if it was forgotten before."""
        self._waiting.pop(connection, None)
