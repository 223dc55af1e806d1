"""The interface of a byte stream, whatever carries it: a socket, TLS over a socket, or something without a socket.

All code above the engine uses this interface. `SocketStream` and `TlsStream` implement it, and so does a transport's own stream,
with or without a descriptor: `fd` and os.splice are used only if `spliceable` is true.
"""

from collections.abc import Iterable
from typing import Protocol

from sniproxy.engine.quantum import Quantum
from sniproxy.engine.socket_memory import SocketMemory

Buffer = bytes | bytearray | memoryview
"""Data that can be written."""

DEFAULT_READ_BYTES = 64 * 1024
"""The most that one read of a copied stream returns: about what a socket buffer of default size holds."""


class StreamClosed(ConnectionError):
    """Our own side has closed the stream."""


class ByteStream(Protocol):
    """A connection that carries bytes both ways, in order, and ends each way separately. One reader and one writer at a time."""

    @property
    def spliceable(self) -> bool:
        """Whether the descriptor carries the stream's own bytes, so that os.splice may move them."""

    @property
    def fd(self) -> int:
        """The file descriptor, if the stream is spliceable."""

    @property
    def peer(self) -> tuple[str, int]:
        """Address and port of the far end, as far as known."""

    @property
    def local(self) -> tuple[str, int]:
        """Address and port of our end, as far as known."""

    @property
    def closed(self) -> bool:
        """Whether our own side has closed the stream."""

    @property
    def quantum(self) -> Quantum:
        """What may still be read before other connections run. Code that parses messages from it spends the quantum too."""

    @property
    def memory(self) -> SocketMemory | None:
        """The kernel's memory of the stream's socket; None if it has none."""

    @property
    def holds_unread(self) -> bool:
        """Whether bytes were given back by `unread` and not read again."""

    def unread(self, data: Buffer) -> None:
        """Give bytes back: the next read returns them first."""

    def take_unread(self) -> bytes:
        """Remove and return the bytes that were given back, without reading more."""

    async def recv(self, limit: int = DEFAULT_READ_BYTES, *, low: int = 1) -> bytes:
        """Read what is available, up to `limit` bytes, and wait for the first byte if nothing is; b"" at the end of the stream.

        Args:
            limit: the most bytes to return.
            low: if nothing is available, wait for this many bytes, provided that the stream can.

        Raises:
            OSError: the peer reset the connection, or is gone.
            TimeoutError: `expire` was called.
            StreamClosed: our own side closed the stream meanwhile.
        """

    async def recv_exactly(self, count: int) -> bytes:
        """Read exactly `count` bytes. Raises EOFError if the stream ends earlier, otherwise as `recv`."""

    def try_recv(self, limit: int = DEFAULT_READ_BYTES) -> bytes:
        """Read what is available right now; b"" if that is nothing, or at the end of the stream."""

    async def readable(self, low: int = 1) -> None:
        """Wait until a read would return at once: with bytes, the end, or an error."""

    async def take_turn(self) -> None:
        """Let other connections run if the quantum is used up. Raises as `readable`."""

    def expire(self) -> None:
        """Make pending and later reads raise TimeoutError."""

    def try_send(self, buffers: Iterable[Buffer], flags: int = 0) -> int:
        """Write what the stream takes right now, and return how many bytes it took. Raises as `send`."""

    async def send(self, *buffers: Buffer, more: bool = False) -> None:
        """Write all of `buffers`. `more`: more data follows at once. Raises OSError if the connection is gone."""

    async def writable(self) -> None:
        """Wait until the stream takes more bytes, or the connection is gone."""

    @property
    def is_full(self) -> bool:
        """Whether a writer waits until the stream takes more."""

    def take_full_s(self) -> float:
        """Return the longest time in seconds for which a writer has waited since the last call, or waits now."""

    def wake_writer(self) -> None:
        """Let a waiting writer try again."""

    def lost_peer(self) -> bool:
        """Return whether the far end has stopped answering. To be asked every few seconds."""

    def has_delivered(self, *, all_but: int) -> bool:
        """Return whether the far end has received all that we wrote but so many bytes, as far as can be known."""

    async def flushed(self, limit_s: float) -> bool:
        """Wait at most `limit_s` seconds until the far end has received everything we wrote; return whether it has."""

    def shutdown_write(self) -> None:
        """End our sending direction; reading goes on. Does nothing if the connection is already gone."""

    def close(self) -> None:
        """Close; pending reads and writes raise StreamClosed."""

    def reset(self) -> None:
        """Close so that the far end cannot mistake it for a regular end. Unsent bytes are dropped."""

    async def drain_and_close(self, *, limit_bytes: int = 64 * 1024, limit_s: float = 1.0) -> None:
        """End our direction, read and discard within these limits, then close, so that our last bytes arrive."""
