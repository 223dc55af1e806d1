"""The `log`, `discovery_tls` and `keys` sections: logging, TLS with discovery servers, and signing keys."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from crossnet.config.schema import key, rule
from crossnet.config.types import Boolean, Count, ExistingFile, KeyFile, LogFormat, LogLevel, NetworkId
from discovery.model.validation import Fault

DEFAULT_REFUSED_PER_S = 100
"""More than anybody reads, and a hundredth of what a flood of refused streams would write. The limit is for each event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    """The log, which is written to stderr."""

    format: LogFormat = "json"
    """One JSON object or one logfmt line for each event."""
    level: LogLevel = "info"
    """Lowest level that is written."""
    refused_per_second: Count = DEFAULT_REFUSED_PER_S
    """Limit of lines per second for each event (refused streams, wrong passwords, …). Further lines are summarised in one, and
    counted in the metrics. Streams that were open always get their line. 0: no limit."""
    probes: Boolean = False
    """Also write a line for each health check or scan: connections that end without a byte (reason `probe`). Metrics count them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryTlsSection:
    """How discovery servers' certificates are verified, and our client certificate."""

    ca: ExistingFile
    """CA for the certificates of discovery servers."""
    cert: ExistingFile | None = None
    """Our client certificate, instead of a token."""
    key: ExistingFile | None = None
    """Its key."""

    @rule("cert", "key")
    def _pair(self) -> Iterator[Fault]:
        if (self.cert is None) != (self.key is None):
            yield Fault(".cert" if self.cert is None else ".key", "cert and key, or neither", "one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySection:
    """A key with which relays of network `from` sign what they send to gateways of network `to`."""

    file: KeyFile
    """The secret: 32 bytes in hexadecimal, as printed by `openssl rand -hex 32`. Both networks need the same."""
    source: NetworkId = dataclasses.field(metadata=key("from"))
    """The network whose relays sign with it."""
    to: NetworkId
    """The network whose gateways accept it."""

    @property
    def secret(self) -> bytes:
        """The 32 bytes."""
        return bytes.fromhex(self.file.text)
