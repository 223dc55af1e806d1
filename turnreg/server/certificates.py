"""The certificate of the TLS listeners, reloaded when its files change."""

import asyncio
import logging
import ssl
from collections.abc import Iterable
from pathlib import Path

from discovery.files.fingerprint import FileFingerprint
from sniproxy.engine import Listener

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 5.0
"""How often the files are checked, at the cost of two stat calls."""

ALPN = "stun.turn"
"""RFC 7443. A client that offers only other protocols, or none as most clients do, is served too."""


class Certificates:
    """Holds the TLS context for new connections. If a renewed certificate cannot be loaded, the last good one stays in use."""

    def __init__(self, cert: Path, key: Path, *, poll_interval_s: float = POLL_INTERVAL_S) -> None:
        """Load certificate and key. Raises OSError (ssl.SSLError is one) if that fails."""
        self._poll_interval_s = poll_interval_s
        self._cert, self._key = cert, key
        self._files = FileFingerprint((cert, key))
        self.context = self._load()

    async def renew(self, listeners: Iterable[Listener]) -> None:
        """Give the listeners a new context whenever the files have changed. Runs until cancelled."""
        while True:
            await asyncio.sleep(self._poll_interval_s)
            if self.look():
                for listener in listeners:
                    listener.tls = self.context

    def look(self) -> bool:
        """Reload the files if they have changed. Returns whether there is a new context."""
        try:
            if not self._files.changed():
                return False
            # A new context, so that half a renewal (a certificate whose key is not there yet) does not break the one in use.
            self.context = self._load()
        except OSError as error:
            log.error("turn: the certificate is not renewed: %s", error)
            return False
        log.info("turn_certificate", extra={"event": {"file": str(self._cert)}})
        return True

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._cert, self._key)
        context.set_alpn_protocols([ALPN])
        return context
