"""TLS for clients, with certificate files that may be replaced at run time."""

import logging
import ssl
from pathlib import Path

from discovery.files.fingerprint import FileFingerprint

log = logging.getLogger(__name__)


class TlsFiles:
    """The CA that verifies servers and our client certificate, read again when their files change."""

    def __init__(self, ca: Path | None = None, certificate: Path | None = None, key: Path | None = None) -> None:
        """Without a CA the system's CAs are used. Raises OSError, ssl.SSLError."""
        self._files = ca, certificate, key
        self._stamp = FileFingerprint(self._files)
        self._context = self._read()

    def current(self) -> ssl.SSLContext:
        """Return the context for the next connection. Invalid files are logged and not used."""
        if self._stamp.changed():
            try:
                self._context = self._read()
            except OSError as error:  # ssl.SSLError is one
                log.warning(
                    "the certificates %s cannot be used, the previous ones stay in use: %s", self._names(), error
                )
        return self._context

    def _names(self) -> str:
        return ", ".join(str(path) for path in self._files if path is not None)

    def _read(self) -> ssl.SSLContext:
        ca, certificate, key = self._files
        context = ssl.create_default_context(cafile=str(ca) if ca is not None else None)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        return context
