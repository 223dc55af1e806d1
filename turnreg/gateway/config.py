"""Settings of a gateway."""

import math
from dataclasses import dataclass, field

from discovery.model.addresses import TargetList
from sniproxy.access.rules import Policy
from sniproxy.engine import DEFAULT_BUFFER_BYTES
from sniproxy.formats.client_hello import DEFAULT_MAX_HELLO_BYTES
from turnreg.gateway.activation import DEFAULT_MAX_HELD, ActivationRule
from turnreg.gateway.limits import GatewayLimits

DEFAULT_HELLO_TIMEOUT_S = 5.0
"""From the bind to the last byte of the ClientHello. The relay had all of it before it dialled, so this is time for transport."""

DEFAULT_DIAL_TIMEOUT_S = 3.0
"""For the TCP handshake with a service in our own network: enough to retransmit a lost SYN after 1 s."""

DEFAULT_IDLE_TIMEOUT_S = math.inf
DEFAULT_HALF_CLOSE_TIMEOUT_S = 600.0
"""As at the relay. The lower of the two ends the stream."""

DEFAULT_MAX_STREAMS = 16_384
"""As at the relay. Each stream takes two descriptors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Settings of one gateway."""

    id: str
    network: str
    domain: str
    allow: TargetList
    """Addresses and ports that may be dialled. For a name, each address that is dialled is checked."""
    policy: Policy = field(default_factory=Policy)
    """Rules for streams, by the network and client that they come from."""
    activate: tuple[ActivationRule, ...] = ()
    """How sleeping services are woken; the first rule that matches a name applies."""
    max_held: int = DEFAULT_MAX_HELD
    """Most streams that wait for services to wake."""
    listen: tuple[tuple[str, int], ...] = ()
    """Where relays may connect directly, without a TURN server."""
    guard: tuple[tuple[str, int], ...] = ()
    """Our own addresses that are not services (discovery servers, the admin server). They are never dialled for a stream."""
    max_hello_bytes: int = DEFAULT_MAX_HELLO_BYTES
    max_streams: int = DEFAULT_MAX_STREAMS
    max_streams_per_network: int = 0
    """Most streams from one network, so that none takes the others' share; 0 for no such limit."""
    hello_timeout_s: float = DEFAULT_HELLO_TIMEOUT_S
    dial_timeout_s: float = DEFAULT_DIAL_TIMEOUT_S
    buffer_bytes: int = DEFAULT_BUFFER_BYTES
    """What the kernel may hold of one direction of a slow stream."""
    idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S
    half_close_timeout_s: float = DEFAULT_HALF_CLOSE_TIMEOUT_S
    require_epoch: bool = False
    """Refuse relays of versions without epochs (sniproxy.tunnel.epoch). Only their preambles could be replayed after a restart."""
    limits: GatewayLimits = field(default_factory=GatewayLimits)
