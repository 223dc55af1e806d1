"""Second connections: a relay moves the upload of an open stream to a new connection (sniproxy.tunnel.state)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.preamble import Preamble

_Key = tuple[str, bytes]


def _key(preamble: Preamble) -> _Key:
    # The signing key proves the network, so a relay of another network cannot join a stream even if it knows the stream's id.
    return preamble.from_network, preamble.stream_id


class _Place:
    """Holds the second connection of one stream until the stream takes it."""

    __slots__ = ("_arrived", "connection", "taken")

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        self.connection: CapsuleConnection | None = None
        self.taken = False

    def put(self, connection: CapsuleConnection) -> None:
        """Store a connection. An earlier one is reset: its relay did not get READY on it and dialled again."""
        if self.connection is not None:
            self.connection.stream.reset()
        self.connection = connection
        self._arrived.set()

    async def take(self) -> CapsuleConnection:
        """Wait for the connection and take it."""
        await self._arrived.wait()
        assert self.connection is not None
        self.taken = True
        return self.connection


class SecondConnections:
    """The streams that may get a second connection, and the connections that they have not taken yet."""

    def __init__(self) -> None:
        self._places: dict[_Key, _Place] = {}

    @contextmanager
    def expected(self, preamble: Preamble) -> Iterator[Callable[[], Awaitable[CapsuleConnection]]]:
        """Accept a second connection while the block runs. Yields a function that waits for it. It is closed after the block."""
        key = _key(preamble)
        place = self._places[key] = _Place()
        try:
            yield place.take
        finally:
            # If a relay gave up an attempt just as it was opened, the same stream is here twice; the last one counts.
            if self._places.get(key) is place:
                del self._places[key]
            if place.connection is not None:
                place.connection.stream.reset()  # nothing on it but READY: a close would keep the local port (TIME_WAIT)

    def awaits(self, preamble: Preamble) -> bool:
        """Tell whether the stream that this preamble continues is open here and has not taken a second connection yet."""
        place = self._places.get(_key(preamble))
        return place is not None and not place.taken

    def bring(self, preamble: Preamble, connection: CapsuleConnection) -> bool:
        """Hand a verified second connection to its stream; False if no stream awaits it."""
        if not self.awaits(preamble):
            return False
        self._places[_key(preamble)].put(connection)
        return True
