"""Names in messages, where a compression pointer may replace the rest of a name (RFC 1035 section 4.1.4).

Pointers are followed only backwards and names are limited to 255 bytes, so no message makes this loop or grow. Sans-IO.
"""

from collections.abc import Iterator

from dnsgw.message.question import HEADER_SIZE, MAX_LABEL, MAX_WIRE_NAME

POINTER = 0xC0
"""The two high bits of a pointer."""


class Malformed(ValueError):
    """The message is not well-formed."""


def enclosing(name: bytes) -> Iterator[bytes]:
    """Yield a name in wire form and all its parents, up to the root. A name that is cut short just ends early."""
    position = 0
    while position < len(name) and (length := name[position]):
        yield name[position:]
        position += length + 1
    yield b"\0"


def name_at(data: bytes, position: int, stop: int | None = None) -> bytes:
    """Return the name that begins at `position`, decompressed. If `stop` is given, it must not extend beyond that.

    Raises Malformed.
    """
    parts = []
    size = 1
    limit = len(data) if stop is None else stop
    try:
        while length := data[position]:
            if length >= POINTER:
                target = (length & 0x3F) << 8 | data[position + 1]
                if position + 2 > limit or target >= position or target < HEADER_SIZE:
                    raise Malformed("a pointer leads nowhere")
                position, limit = target, position
                continue
            end = position + 1 + length
            size += length + 1
            if length > MAX_LABEL or size > MAX_WIRE_NAME or end >= limit:
                raise Malformed("a name is too long")
            parts.append(data[position:end])
            position = end
    except IndexError as error:
        raise Malformed("a name is cut short") from error
    return b"".join(parts) + b"\0"


def skip_name(data: bytes, position: int) -> int:
    """Return the position behind the name that begins at `position`. Raises Malformed or IndexError."""
    begin = position
    while length := data[position]:
        if length >= POINTER:
            return position + 2
        position += length + 1
        if length > MAX_LABEL or position - begin >= MAX_WIRE_NAME:
            raise Malformed("a label is of no known type")
    return position + 1
