"""TLS alerts: how a connection that is refused learns why.

A relay holds no keys and needs none here: before the server has answered, alerts travel in the clear (RFC 8446 section 6)."""

import enum


class AlertDescription(enum.IntEnum):
    """The alerts that a relay sends, all fatal (RFC 8446 section 6.2)."""

    ACCESS_DENIED = 49
    """The name is known, this client may not go there."""
    DECODE_ERROR = 50
    """The ClientHello is broken."""
    INTERNAL_ERROR = 80
    """The name is good, but there is no way to it now."""
    UNRECOGNIZED_NAME = 112
    """The name is missing, unusable or unknown (RFC 6066 section 3)."""


def alert_record(description: AlertDescription) -> bytes:
    """Return the record of a fatal alert, in the version that every client reads."""
    return bytes((21, 3, 3, 0, 2, 2, description))
