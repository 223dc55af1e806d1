"""Reading STUN messages and ChannelData from a TCP stream (RFC 8489, section 6.2.2; RFC 8656, section 12.5).

`MessageReader` buffers at most one message and the rest of one read. A length that is too large is refused as soon as the first
four bytes are there, before the message is awaited.
"""

from typing import NamedTuple

from turnreg.stun.message import (
    MAX_DATAGRAM_BYTES,
    MAX_INDICATION_BYTES,
    MAX_MESSAGE_BYTES,
    Message,
    StunError,
    frame_length,
)

READ_BYTES = 4096
"""Size of a read: two messages of maximum length, or about twenty usual ones."""
DATAGRAM_READ_BYTES = 64 * 1024
"""Size of a read from a client that sends datagrams over a stream: about forty full ones."""

MIN_CHANNEL, MAX_CHANNEL = 0x4000, 0x7FFF
"""Channel numbers. In RFC 8656, section 12, they end at 0x4FFF; clients by RFC 5766, such as coturn's, use up to 0x7FFF."""
CHANNEL_HEADER_BYTES = 4


class ChannelData(NamedTuple):
    """A datagram with a four-byte header instead of an indication (RFC 8656, section 12.4)."""

    channel: int
    data: bytes


def parse_channel_data(packet: bytes) -> ChannelData:
    """Parse the ChannelData in one datagram; bytes after it are padding (RFC 8656, section 12.5). Raises StunError."""
    if len(packet) < CHANNEL_HEADER_BYTES:
        raise StunError("a ChannelData message is shorter than its header")
    channel, length = int.from_bytes(packet[:2], "big"), int.from_bytes(packet[2:4], "big")
    if not MIN_CHANNEL <= channel <= MAX_CHANNEL:
        raise StunError(f"{channel:#06x} is not a channel number")
    if CHANNEL_HEADER_BYTES + length > len(packet):
        raise StunError("a ChannelData message is shorter than its length field says")
    return ChannelData(channel, packet[CHANNEL_HEADER_BYTES : CHANNEL_HEADER_BYTES + length])


def pack_channel_data(channel: int, data: bytes, *, padded: bool) -> bytes:
    """Return the bytes. `padded`: pad to a multiple of four, as a stream requires; the length field excludes the padding."""
    padding = bytes(-len(data) % 4) if padded else b""
    return channel.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data + padding


class MessageReader:
    """Splits a stream into messages: feed it the bytes of a read, then take messages until there is none."""

    __slots__ = ("_at", "_buffer", "datagrams")

    def __init__(self) -> None:
        self._buffer = b""
        self._at = 0
        self.datagrams = False
        """Accept datagrams from the client: long indications and ChannelData. Set when it has a UDP allocation."""

    def feed(self, data: bytes) -> None:
        """Add bytes of the stream. Take all messages before feeding more, so that the buffer does not grow."""
        self._buffer = self._buffer[self._at :] + data
        self._at = 0

    def take(self) -> Message | ChannelData | None:
        """Return the next whole message, None if more bytes are needed.

        Raises:
            StunError: this is not STUN, or a message is malformed or too long. The rest of the stream cannot be read.
        """
        prefix = self._buffer[self._at : self._at + 8]
        if self.datagrams and prefix and prefix[0] & 0xC0 == 0x40:
            return self._take_channel_data(prefix)
        limit = MAX_INDICATION_BYTES if self.datagrams else MAX_MESSAGE_BYTES
        length = frame_length(prefix, limit)
        if length is None or len(self._buffer) - self._at < length:
            return None
        message = Message.parse(self._buffer[self._at : self._at + length], limit)
        self._at += length
        return message

    def _take_channel_data(self, prefix: bytes) -> ChannelData | None:
        if len(prefix) < CHANNEL_HEADER_BYTES:
            return None
        length = int.from_bytes(prefix[2:4], "big")
        if length > MAX_DATAGRAM_BYTES:
            raise StunError(f"ChannelData of {length} bytes is longer than any datagram")
        end = self._at + CHANNEL_HEADER_BYTES + length + -length % 4
        if len(self._buffer) < end:
            return None
        message = parse_channel_data(self._buffer[self._at : end])
        self._at = end
        return message

    def take_rest(self) -> bytes:
        """Return the bytes that are left: after a ConnectionBind, they are payload."""
        rest, self._buffer, self._at = self._buffer[self._at :], b"", 0
        return rest
