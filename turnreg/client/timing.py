"""Timeouts and limits of an allocation."""

from dataclasses import dataclass

TRANSACTION_TIMEOUT_S = 5.0
"""How long to wait for the answer to a request. TCP retransmits lost segments, so such a silence means that the server hangs or the
path is dead. RFC 8489, section 6.2.2, would wait 39.5 s, far too long for the streams that wait for the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Timeouts, periods and limits. The defaults are for real networks; tests shorten them."""

    transaction_s: float = TRANSACTION_TIMEOUT_S
    connect_s: float = 4.0
    """Long enough for two retransmissions of a SYN."""
    user_timeout_s: float = 20.0
    """TCP_USER_TIMEOUT of the control connection: the kernel gives up when data stays unacknowledged for that long. Streams do not
    have it: it would treat a reader that pauses as dead."""
    keepalive_s: float = 10.0
    """Period of keep-alive requests. NATs keep a mapping for minutes; the point is to find a dead path within 30 s: 10 + 5 for a
    Binding without an answer + 2 × 5 for the Refresh that confirms it."""
    lifetime_s: int = 600
    """Lifetime to request: the usual default (RFC 8656, section 3.2). It is refreshed after half of what the server grants."""
    permission_refresh_s: float = 200.0
    """Permissions last 300 s (RFC 8656, section 9): a refresh may fail, and its retry come 40 s late, and still be in time."""
    refused_retry_s: float = 30.0
    """Pause before an address that the server refused is tried again."""
    nonce_fresh_s: float = 0.05
    """How long ago the nonce may have been verified when a bind is signed with it. A new verification runs while the data
    connection is opened, so it costs no time, and twenty requests a second are no load for a server. A bind between the expiry of a
    nonce and the next verification is lost. coturn does not notify the relay, which tries another allocation after its 3 s for
    READY (measured: at 40 binds a second, one bind at every third expiry of a nonce)."""
    bind_s: float = 8.0
    """Timeout for one bind, connecting included. coturn drops the peer after 30 s."""
    close_s: float = 2.0
    """Timeout for deleting the allocation."""
    max_binds: int = 128
    """Most data connections that are opened at once; `.bind_concurrency` lowers it if binds are slow."""
    max_waiting: int = 1024
    """Peers announced and not yet bound. Further ones are not bound, and the server drops them after its timeout."""
    max_queued_s: float = 2.5
    """A peer that was queued for longer is not bound: its relay gives up 3 s after it connected."""
    tries: int = 2
    """How often an unanswered Refresh or CreatePermission is sent before the server counts as lost."""
