"""Configuration of a discovery client."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from discovery.client.desired_state import REASSERT_AFTER_S
from discovery.client.servers import BACKOFF
from discovery.client.view import GRACE_S
from discovery.pacing.backoff import Backoff

LEASE_TTL_S = 10
"""Leases are renewed after a third of this, so two renewals may be lost."""

CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryClientConfig:
    """Servers that a client uses, its credentials, and its timings."""

    urls: Sequence[str]
    """In order of preference: `https://HOST:PORT`, or `http://` to loopback."""

    network: str
    """Network of this process."""

    token: str | None = field(default=None, repr=False)
    """Token for the servers, None for a certificate or for servers without tokens."""

    ca_file: Path | None = None
    """CA that verifies the servers; the system's CAs by default."""

    cert_file: Path | None = None
    key_file: Path | None = None
    """Client certificate, instead of a token."""

    insecure: bool = False
    """Permit `http://` to other hosts, which sends the token in clear text."""

    snapshot_file: Path | None = None
    """File in which the mesh is saved, so that the next start has one even if discovery is down."""

    lease_ttl_s: int = LEASE_TTL_S
    """TTL of the lease that our records are attached to, in seconds."""

    grace_s: float = GRACE_S
    """How long records stay in the mesh, in seconds, that a new store does not have yet."""

    reassert_after_s: float = REASSERT_AFTER_S
    """Seconds until a record that another process has overwritten is written again."""

    close_timeout_s: float = CLOSE_TIMEOUT_S
    """Seconds that `close` may take to end the lease."""

    backoff: Backoff = BACKOFF
    """Pauses between attempts after every server has been tried."""
