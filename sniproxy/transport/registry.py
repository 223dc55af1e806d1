"""The list of all transports. A new transport needs one line here."""

from collections.abc import Callable

from sniproxy.transport.base import Transport, TransportConfig
from sniproxy.transport.direct import DirectTransport
from sniproxy.transport.local import LocalTransport
from sniproxy.transport.turn import TurnTransport

TRANSPORTS: list[Callable[[TransportConfig], Transport]] = [LocalTransport, DirectTransport, TurnTransport]


def make_transports(config: TransportConfig) -> tuple[Transport, ...]:
    """Return all transports for a relay with this configuration."""
    return tuple(make(config) for make in TRANSPORTS)
