"""The embedded TURN server: TCP allocations (RFC 6062) with back-pressure where others drop bytes.

Not here: UDP allocations (442), channels, the active Connect (403), mobility. What it does better than the stock server
that this project met: nothing is read from a peer before its ConnectionBind, so no early byte is lost; FIN is passed on one
direction at a time, with all that came before it; a failed bind can be read and leaves the peer waiting for a better one.
"""

from turnreg.server.allocation import Limits, Refusal
from turnreg.server.config import TurnServerConfig
from turnreg.server.server import TurnServer

__all__ = ["Limits", "Refusal", "TurnServer", "TurnServerConfig"]
