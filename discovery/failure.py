"""How a request over HTTP that failed is told: in words that mean the same each time, so that a reason is logged once."""

import aiohttp

MAX_TEXT = 300


def explained(error: BaseException) -> str:
    """Say in a line what happened; aiohttp's own words for a failed connect have the address of an object in them."""
    if isinstance(error, aiohttp.ClientConnectorError):
        why: Exception = error.os_error
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            why = error.certificate_error
        return f"cannot connect to {error.host}:{error.port}: {getattr(why, 'strerror', None) or why}"[:MAX_TEXT]
    return str(error)[:MAX_TEXT] or type(error).__name__
