"""TLS alerts, which tell a refused client why.

A relay has no keys and needs none here: before the server has answered, alerts are sent in the clear (RFC 8446 section 6)."""

import enum


class AlertDescription(enum.IntEnum):
    """The alerts that a relay sends, all fatal (RFC 8446 section 6.2)."""

    ACCESS_DENIED = 49
    """The name is known, but this client may not connect to it."""
    DECODE_ERROR = 50
    """The ClientHello is malformed."""
    INTERNAL_ERROR = 80
    """The name is valid, but there is no route to it now."""
    UNRECOGNIZED_NAME = 112
    """The name is missing, unusable or unknown (RFC 6066 section 3)."""


def alert_record(description: AlertDescription) -> bytes:
    """Return the record of a fatal alert, with a record version that every client accepts."""
    return bytes((21, 3, 3, 0, 2, 2, description))
