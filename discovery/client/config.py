"""What a discovery client is made from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from discovery.client.desired_state import REASSERT_AFTER_S
from discovery.client.servers import BACKOFF
from discovery.client.view import GRACE_S
from discovery.pacing.backoff import Backoff

LEASE_TTL_S = 10  # renewed at a third, so two renewals may be lost
CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryClientConfig:
    """Which servers a client uses, who it is to them, and how it times things."""

    urls: Sequence[str]
    """In order of preference: `https://HOST:PORT`, or `http://` to loopback."""

    network: str
    """The network that we are in."""

    token: str | None = field(default=None, repr=False)

    ca_file: Path | None = None
    """Verifies the servers; the system's authorities by default."""

    cert_file: Path | None = None
    key_file: Path | None = None
    """The certificate that we show, instead of a token."""

    insecure: bool = False
    """Permits `http://` to other hosts, which shows the token on the way."""

    snapshot_file: Path | None = None
    """Where the view is saved, so that the next start has one while discovery is down."""

    lease_ttl_s: int = LEASE_TTL_S

    grace_s: float = GRACE_S
    """For how long records stay in the view that a new store does not have yet."""

    reassert_after_s: float = REASSERT_AFTER_S
    """How long we wait before we write a record again that another process has overwritten."""

    close_timeout_s: float = CLOSE_TIMEOUT_S
    """How long `close` may take to end the lease."""

    backoff: Backoff = BACKOFF
    """Pauses between attempts, once every server has been tried."""
