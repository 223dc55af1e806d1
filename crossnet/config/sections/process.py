"""How one process talks: its log, and what it shows to and expects of the servers and gateways it meets."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from crossnet.config.schema import key, rule
from crossnet.config.types import Count, ExistingFile, KeyFile, LogFormat, LogLevel, NetworkId
from discovery.model.validation import Fault

DEFAULT_REFUSED_PER_S = 100
"""More than anybody reads, and a hundredth of what a flood of refused streams would write. It counts for each event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    """How log lines are written, on stderr."""

    format: LogFormat = "json"
    """One JSON object or one logfmt line for each event."""
    level: LogLevel = "info"
    """The least severe level that is written."""
    refused_per_second: Count = DEFAULT_REFUSED_PER_S
    """Lines of each event (refused streams, wrong passwords, …); those beyond are counted in one line, and in the metrics.
    Streams that were open always have theirs. 0 is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryTlsSection:
    """How a discovery server's certificate is verified, and what we show in place of a token."""

    ca: ExistingFile
    """Authorities that sign the certificates of discovery servers."""
    cert: ExistingFile | None = None
    """Our client certificate, in place of a token."""
    key: ExistingFile | None = None
    """Its key."""

    @rule("cert", "key")
    def _pair(self) -> Iterator[Fault]:
        if (self.cert is None) != (self.key is None):
            yield Fault(".cert" if self.cert is None else ".key", "cert and key, or neither", "one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySection:
    """A key that signs what relays of `from` send to gateways of `to`."""

    file: KeyFile
    """The secret: 32 bytes, as `openssl rand -hex 32` prints them. Both networks have the same."""
    source: NetworkId = dataclasses.field(metadata=key("from"))
    """The network whose relays sign with it."""
    to: NetworkId
    """The network whose gateways accept it."""

    @property
    def secret(self) -> bytes:
        """The 32 bytes."""
        return bytes.fromhex(self.file.text)
