"""Descriptions of failed HTTP requests. The same cause always gives the same text, so that it can be logged once."""

import ssl
from datetime import UTC, datetime

import aiohttp
from cryptography import x509

MAX_TEXT = 300
ASK_TIMEOUT_S = 3.0

_OUT_OF_TIME = frozenset({9, 10})  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED


def explained(error: BaseException) -> str:
    """Describe an error in one line. aiohttp's own text for a failed connect contains an object's address."""
    if isinstance(error, aiohttp.ClientConnectorError):
        why: Exception = error.os_error
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            why = error.certificate_error
        return f"cannot connect to {error.host}:{error.port}: {getattr(why, 'strerror', None) or why}"[:MAX_TEXT]
    return str(error)[:MAX_TEXT] or type(error).__name__


def is_out_of_time(error: BaseException) -> bool:
    """Return whether a certificate is not yet valid, or has expired, by our clock."""
    why = error.certificate_error if isinstance(error, aiohttp.ClientConnectorCertificateError) else error
    return isinstance(why, ssl.SSLCertVerificationError) and why.verify_code in _OUT_OF_TIME


def certificate_dates(host: str, port: int) -> str:
    """Fetch a server's certificate again, without verification, and describe how far our clock is outside its validity period.

    Blocks for a few seconds at most. Returns an empty string if the certificate cannot be read or is valid now.
    """
    try:
        pem = ssl.get_server_certificate((host, port), timeout=ASK_TIMEOUT_S)
        certificate = x509.load_pem_x509_certificate(pem.encode())
    except (OSError, ValueError):
        return ""
    now = datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    said = f"our clock says {now:%Y-%m-%dT%H:%M:%SZ}"
    if now < begins:
        wait_s = (begins - now).total_seconds()
        return f"it becomes valid in {wait_s:.0f} s, at {begins:%Y-%m-%dT%H:%M:%SZ}; {said}"
    if now > ends:
        return f"it expired {(now - ends).total_seconds():.0f} s ago, at {ends:%Y-%m-%dT%H:%M:%SZ}; {said}"
    return ""
