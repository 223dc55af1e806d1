"""Second connections: how the upload of a stream that is open finds its way to that stream (sniproxy.stream.ends)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from sniproxy.stream.framed import Framed
from sniproxy.stream.preamble import Preamble

_Key = tuple[str, bytes]


def _key(preamble: Preamble) -> _Key:
    # The network is proven by the key that signed: no other network's relay can join a stream, even if it learnt its id.
    return preamble.from_network, preamble.stream_id


class Continuations:
    """The streams that may get a second connection, and those connections until they are taken."""

    def __init__(self) -> None:
        self._expected: dict[_Key, asyncio.Future[Framed]] = {}

    @contextmanager
    def expected(self, preamble: Preamble) -> Iterator[Callable[[], Awaitable[Framed]]]:
        """Let a second connection come while the block runs; what is given waits for it."""
        key = _key(preamble)
        arrival: asyncio.Future[Framed] = asyncio.get_running_loop().create_future()
        self._expected[key] = arrival
        try:
            yield lambda: asyncio.shield(arrival)
        finally:
            del self._expected[key]
            if arrival.done():
                arrival.result().wire.close()
            else:
                arrival.cancel()

    def bring(self, preamble: Preamble, framed: Framed) -> bool:
        """Hand a proven second connection to its stream; False where no such stream waits for one."""
        arrival = self._expected.get(_key(preamble))
        if arrival is None or arrival.done():
            return False
        arrival.set_result(framed)
        return True
