"""The certificate of the TLS listeners, read again when its files change."""

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
"""RFC 7443. A client that offers others only, or none as most do, is served all the same."""


class Certificates:
    """Holds the TLS context for the next connection. A renewal that cannot be read leaves the last good one in use."""

    def __init__(self, cert: Path, key: Path, *, poll_interval_s: float = POLL_INTERVAL_S) -> None:
        """Read them. Raises OSError (ssl.SSLError is one) if that fails."""
        self._poll_interval_s = poll_interval_s
        self._cert, self._key = cert, key
        self._files = FileFingerprint((cert, key))
        self.context = self._load()

    async def renew(self, listeners: Iterable[Listener]) -> None:
        """Give the listeners a new context whenever the files have changed, until cancelled."""
        while True:
            await asyncio.sleep(self._poll_interval_s)
            if self.look():
                for listener in listeners:
                    listener.tls = self.context

    def look(self) -> bool:
        """Read the files again if they have changed; tell whether there is a new context."""
        try:
            if not self._files.changed():
                return False
            # Into a context of its own: half a renewal (a certificate without its key yet) must not spoil the one in use.
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
