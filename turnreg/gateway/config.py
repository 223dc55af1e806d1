"""Settings of a gateway."""

from dataclasses import dataclass, field

from discovery.model.addresses import TargetList
from sniproxy.access.rules import Policy
from sniproxy.formats.client_hello import DEFAULT_MAX_HELLO_BYTES
from turnreg.gateway.activation import DEFAULT_MAX_HELD, ActivationRule
from turnreg.gateway.limits import GatewayLimits

DEFAULT_HELLO_TIMEOUT_S = 5.0
"""From the bind to the last byte of the ClientHello. The relay had it whole before it dialled: this covers the way here."""

DEFAULT_DIAL_TIMEOUT_S = 3.0
"""For the TCP handshake with a service in our own network: one lost SYN is sent again after 1 s."""

DEFAULT_IDLE_TIMEOUT_S = 3600.0
DEFAULT_HALF_CLOSE_TIMEOUT_S = 600.0
"""As at the relay: whichever is lower ends the stream."""

DEFAULT_MAX_STREAMS = 16_384
"""As at the relay: two descriptors a stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What an operator decides about a gateway."""

    id: str
    network: str
    domain: str
    allow: TargetList
    """What may be dialled, checked on the address that is dialled."""
    policy: Policy = field(default_factory=Policy)
    """Which streams may go where, by the network and client that they come from."""
    activate: tuple[ActivationRule, ...] = ()
    """How sleeping services are woken; the first rule that matches a name applies."""
    max_held: int = DEFAULT_MAX_HELD
    """Streams that wait for services to wake."""
    listen: tuple[tuple[str, int], ...] = ()
    """Where relays may come directly, without a TURN server."""
    guard: tuple[tuple[str, int], ...] = ()
    """Addresses of our own that are no services (discovery servers, the admin server): never dialled for a stream."""
    max_hello_bytes: int = DEFAULT_MAX_HELLO_BYTES
    max_streams: int = DEFAULT_MAX_STREAMS
    max_streams_per_network: int = 0
    """From one network, so that none takes the others' share; 0 is no limit of its own."""
    hello_timeout_s: float = DEFAULT_HELLO_TIMEOUT_S
    dial_timeout_s: float = DEFAULT_DIAL_TIMEOUT_S
    idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S
    half_close_timeout_s: float = DEFAULT_HALF_CLOSE_TIMEOUT_S
    require_epoch: bool = False
    """Refuse relays from before epochs (sniproxy.tunnel.epoch). Only their preambles could count again after a restart."""
    limits: GatewayLimits = field(default_factory=GatewayLimits)
