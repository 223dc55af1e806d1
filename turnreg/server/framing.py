"""STUN messages out of a TCP stream (RFC 8489, section 6.2.2): one header says how long each is.

`MessageReader` holds at most one message and what one read brought behind it: a length that we would not take is refused
when its four bytes are there, before anything of it is waited for.
"""

from turnreg.stun import Message, frame_length

READ_BYTES = 4096
"""How much to read at once: two messages of the greatest length, and some twenty of the usual one."""


class MessageReader:
    """Feed it what a read brought, then take messages until there is none."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        """Take bytes of the stream. Take out all messages before feeding more, so that nothing piles up."""
        self._buffer += data

    def take(self) -> Message | None:
        """Return the next whole message, None if more bytes are needed.

        Raises:
            StunError: this is not STUN, or a message is malformed or too long. The stream is of no use any more.
        """
        length = frame_length(self._buffer[:8])
        if length is None or len(self._buffer) < length:
            return None
        message = Message.parse(self._buffer[:length])
        self._buffer = self._buffer[length:]
        return message

    def take_rest(self) -> bytes:
        """Return what is left of the stream: payload, when the message before it was a ConnectionBind."""
        rest, self._buffer = self._buffer, b""
        return rest
