"""The embedded TURN server: STUN and TURN (RFC 8489, RFC 8656) over TCP, TLS and UDP, with TCP allocations (RFC 6062).

UDP allocations and the active Connect are there for those who switch them on; mobility, ADDITIONAL-ADDRESS-FAMILY, third-party
authorisation and MESSAGE-INTEGRITY-SHA256 are not, and are not advertised. What it does better than the stock server that this
project met: nothing is read from a peer before its ConnectionBind, so no early byte is lost; FIN is passed on one direction at a
time, with all that came before it; a failed bind can be read and leaves the peer waiting for a better one.
"""

from turnreg.server.allocation import Limits, Refusal
from turnreg.server.config import TurnServerConfig
from turnreg.server.server import TurnServer

__all__ = ["Limits", "Refusal", "TurnServer", "TurnServerConfig"]
