"""Warm streams at the gateway: connections that relays keep ready for new streams. `sniproxy.relay.warm_pool` is the other side."""

import asyncio
from collections import Counter

from sniproxy.tunnel.capsules import CapsuleError
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Open, Ping, Pong, Ready
from sniproxy.tunnel.verify import share_of
from turnreg.gateway.limits import GatewayLimits


class WarmStreams:
    """The connections that wait for a stream, with the network that each comes from."""

    def __init__(self, limits: GatewayLimits | None = None) -> None:
        self._limits = limits or GatewayLimits()
        self._waiting: dict[CapsuleConnection, str] = {}
        self._of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def refusal(self, network: str, networks: int) -> str | None:
        """Return why another connection of this network, one of `networks`, is not kept ready; None if it is."""
        most = self._limits.max_warm
        if len(self._waiting) >= most:
            return f"{most} connections are kept ready"
        share = share_of(most, networks)
        return f"{share} connections of network {network!r} are kept ready" if self._of[network] >= share else None

    async def wait(self, connection: CapsuleConnection, network: str) -> bytes | None:
        """Send READY, answer PINGs, and return the preamble in OPEN; None if the connection ended before.

        Raises:
            CapsuleError: the relay broke the protocol.
        """
        connection.ends.warm = True
        self._waiting[connection] = network
        self._of[network] += 1
        try:
            await connection.send(Ready())
            while True:
                async with asyncio.timeout(self._limits.warm_silence_s):
                    match await connection.next_message():
                        case Ping(token):
                            await connection.send(Pong(token))
                        case Open(preamble):
                            return preamble
                        case message:
                            raise CapsuleError(f"{message.type.name} before OPEN")
        except (OSError, EOFError):  # TimeoutError is an OSError
            return None
        finally:
            del self._waiting[connection]
            self._of[network] -= 1

    def close(self) -> None:
        """Let all of them go; their relays use other gateways."""
        for connection in self._waiting:
            connection.stream.reset()
