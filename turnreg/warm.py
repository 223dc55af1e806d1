"""Warm streams at the gateway: connections that relays keep ready, until one brings a stream (sniproxy.warm is the other end)."""

import asyncio

from sniproxy.stream.capsule import CapsuleError
from sniproxy.stream.control import Open, Ping, Pong, Ready
from sniproxy.stream.framed import Framed

LIMIT_SILENT_S = 60.0
"""A relay asks every 25 s whether we live: here two of its PINGs are missing."""

MAX_WARM = 4096
"""Kept ready at one gateway, for all relays together: eight relays' most."""


class WarmStreams:
    """The connections that wait for a stream."""

    def __init__(self) -> None:
        self._waiting: set[Framed] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, framed: Framed) -> bytes | None:
        """Say READY, answer PINGs, and return the preamble that OPEN brings; None if the connection ended before.

        Raises:
            CapsuleError: the relay broke the protocol.
        """
        framed.ends.warm = True
        self._waiting.add(framed)
        try:
            await framed.send(Ready())
            while True:
                async with asyncio.timeout(LIMIT_SILENT_S):
                    match await framed.next_message():
                        case Ping(token):
                            await framed.send(Pong(token))
                        case Open(preamble):
                            return preamble
                        case message:
                            raise CapsuleError(f"{message.type.name} before OPEN")
        except (OSError, EOFError):  # TimeoutError is an OSError
            return None
        finally:
            self._waiting.discard(framed)

    def close(self) -> None:
        """End them all: their relays go elsewhere."""
        for framed in self._waiting:
            framed.wire.close()
