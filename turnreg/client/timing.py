"""How long an allocation's doings take, and how many there are at once."""

from dataclasses import dataclass

TRANSACTION_TIMEOUT_S = 5.0
"""How long a request may go unanswered. TCP repeats lost segments by itself: silence for that long is a server that
hangs, or a path that is gone. RFC 8489, section 6.2.2, would wait 39.5 s, far too long for whoever waits behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The defaults are for real networks; tests shorten them."""

    transaction_s: float = TRANSACTION_TIMEOUT_S
    connect_s: float = 4.0
    """Long enough for one lost SYN to be sent again, twice."""
    user_timeout_s: float = 20.0
    """TCP_USER_TIMEOUT of the control connection: what we sent stays unacknowledged for that long, and the kernel gives up.
    Streams do not have it: it would count a reader that pauses as gone."""
    keepalive_s: float = 10.0
    """Silence after which the server is sent something that it answers. NATs keep a mapping for minutes; what counts is that a
    dead path is found within 30 s: 10 + 5 for a Binding that is not answered + 2 × 5 for a Refresh, which is asked to be sure."""
    lifetime_s: int = 600
    """Asked for: the usual default (RFC 8656, section 3.2). What the server grants counts; half of it is the period."""
    permission_refresh_s: float = 200.0
    """Permissions last 300 s (RFC 8656, section 9): a refresh may fail and come 40 s late, and still be in time."""
    refused_retry_s: float = 30.0
    """When an address that the server refused is tried again."""
    nonce_fresh_s: float = 0.05
    """How old the last proof of the nonce may be when a bind is signed with it. The new proof is in flight while the
    data connection is opened, so it costs no time, and twenty requests a second are nothing to a server. A bind between the
    end of a nonce and the next proof is lost, and coturn tells its relay nothing: after READY's 3 s that asks another allocation
    (measured: with 40 binds a second one at every third end of a nonce)."""
    bind_s: float = 8.0
    """From the announcement to the bound stream. coturn drops the peer after 30 s."""
    close_s: float = 2.0
    """For giving the allocation back."""
    max_binds: int = 128
    """Data connections being opened at once, at most: how many depends on how quick they are (`.bind_concurrency`)."""
    max_waiting: int = 1024
    """Peers announced and not yet bound; more are left to the server, whose timer ends them."""
    max_queued_s: float = 2.5
    """A peer that has waited for longer to be bound is left out: its relay gives up 3 s after it connected."""
    tries: int = 2
    """How often an unanswered Refresh or CreatePermission is sent before the server counts as gone."""
