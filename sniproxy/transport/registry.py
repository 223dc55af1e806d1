"""The transports that there are. A new one is a line here."""

from collections.abc import Callable

from sniproxy.transport.base import Transport, TransportConfig
from sniproxy.transport.direct import DirectTransport
from sniproxy.transport.local import LocalTransport
from sniproxy.transport.turn import TurnTransport

TRANSPORTS: list[Callable[[TransportConfig], Transport]] = [LocalTransport, DirectTransport, TurnTransport]


def make_transports(config: TransportConfig) -> tuple[Transport, ...]:
    """Make all of them for a relay."""
    return tuple(make(config) for make in TRANSPORTS)
