"""The embedded TURN server: STUN and TURN (RFC 8489, RFC 8656) over TCP, TLS and UDP, with TCP allocations (RFC 6062).

UDP allocations and the active Connect are supported but off by default. Mobility, ADDITIONAL-ADDRESS-FAMILY, third-party
authorisation and MESSAGE-INTEGRITY-SHA256 are not supported, and not advertised. It improves on coturn in three ways: nothing is
read from a peer before its ConnectionBind, so no early byte is lost; FIN is forwarded for each direction separately, after all the
bytes before it; and a failed bind gets an error answer, after which the peer can still be bound.
"""

from turnreg.server.allocation import Limits, Refusal
from turnreg.server.config import TurnServerConfig
from turnreg.server.server import TurnServer

__all__ = ["Limits", "Refusal", "TurnServer", "TurnServerConfig"]
