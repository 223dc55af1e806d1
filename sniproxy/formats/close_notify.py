"""Recognises a TLS close_notify (RFC 8446 section 6.1) from outside, by the type and length of its record alone. Sans-IO.

A record of two bytes of data has the same length in TLS 1.3. So this is evidence only together with what the client does next.
"""

from typing import Final

_STARTS: Final = (
    b"\x17\x03\x03\x00\x13",  # TLS 1.3: two bytes of alert, the true type, a tag of 16 bytes
    b"\x15\x03\x03\x00\x1a",  # TLS 1.2 with GCM: an explicit nonce of 8 bytes, two bytes of alert, a tag of 16 bytes
    b"\x15\x03\x03\x00\x12",  # TLS 1.2 with ChaCha20-Poly1305: two bytes of alert, a tag of 16 bytes
)
_SIZES: Final = frozenset(len(start) + start[4] for start in _STARTS)


def is_close_notify(tail: bytes, size: int) -> bool:
    """Return whether a piece of a stream may end with a close_notify.

    Args:
        tail: the last bytes of the piece; nothing if they were not seen, because the kernel moved them.
        size: of the piece.
    """
    if not tail:
        return size in _SIZES
    return any(tail[-len(start) - start[4] :].startswith(start) for start in _STARTS)
