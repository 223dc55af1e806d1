"""Second connections: how the upload of a stream that is open finds its way to that stream (sniproxy.tunnel.state)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.preamble import Preamble

_Key = tuple[str, bytes]


def _key(preamble: Preamble) -> _Key:
    # The network is proven by the key that signed: no other network's relay can join a stream, even if it learnt its id.
    return preamble.from_network, preamble.stream_id


class _Place:
    """Where the second connection of one stream is put until the stream takes it."""

    __slots__ = ("_arrived", "framed", "taken")

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        self.framed: CapsuleConnection | None = None
        self.taken = False

    def put(self, framed: CapsuleConnection) -> None:
        """Put one here; one that was here before goes, for its relay did not hear that it had come and dialled again."""
        if self.framed is not None:
            self.framed.stream.close()
        self.framed = framed
        self._arrived.set()

    async def take(self) -> CapsuleConnection:
        """Wait for it and take it."""
        await self._arrived.wait()
        assert self.framed is not None
        self.taken = True
        return self.framed


class SecondConnections:
    """The streams that may get a second connection, and those connections until they are taken."""

    def __init__(self) -> None:
        self._places: dict[_Key, _Place] = {}

    @contextmanager
    def expected(self, preamble: Preamble) -> Iterator[Callable[[], Awaitable[CapsuleConnection]]]:
        """Let a second connection come while the block runs; what is given waits for it. It is closed behind the block."""
        key = _key(preamble)
        place = self._places[key] = _Place()
        try:
            yield place.take
        finally:
            # A relay that gave up an attempt just as it was opened has the same stream in here twice; the last one counts.
            if self._places.get(key) is place:
                del self._places[key]
            if place.framed is not None:
                place.framed.stream.close()

    def awaits(self, preamble: Preamble) -> bool:
        """Tell whether the stream that this continues is here and has not gone on with a second connection yet."""
        place = self._places.get(_key(preamble))
        return place is not None and not place.taken

    def bring(self, preamble: Preamble, framed: CapsuleConnection) -> bool:
        """Hand a proven second connection to its stream; False where none awaits it."""
        if not self.awaits(preamble):
            return False
        self._places[_key(preamble)].put(framed)
        return True
