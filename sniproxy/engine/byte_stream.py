"""What a stream of bytes can do, whatever carries it: a socket, TLS over one, or something that is no socket at all.

Everything above the engine is written against this. `SocketStream` and `TlsStream` fulfil it, and so does a transport's own stream,
whether it has a descriptor or not: only where `spliceable` is true are `fd` and os.splice used.
"""

from collections.abc import Iterable
from typing import Protocol

from sniproxy.engine.quantum import Quantum

Buffer = bytes | bytearray | memoryview
"""What may be written."""

DEFAULT_READ_BYTES = 64 * 1024
"""One read of a stream that is copied: what a default-sized socket buffer hands over at once."""


class StreamClosed(ConnectionError):
    """Our own side has closed the stream that a read or write waits for."""


class ByteStream(Protocol):
    """One connection: bytes both ways, in order, with an end for each way. One reader and one writer at a time."""

    @property
    def spliceable(self) -> bool:
        """Whether what is on the descriptor is the stream itself, so that os.splice may move it."""

    @property
    def fd(self) -> int:
        """The descriptor, where the stream is spliceable."""

    @property
    def peer(self) -> tuple[str, int]:
        """Address and port of the far end, as far as they are known."""

    @property
    def local(self) -> tuple[str, int]:
        """Address and port of our end, likewise."""

    @property
    def closed(self) -> bool:
        """Whether our own side has closed it."""

    @property
    def quantum(self) -> Quantum:
        """What may still be read before others run. Whoever parses messages out of what was read spends from it, too."""

    @property
    def holds_unread(self) -> bool:
        """Whether bytes that were given back wait to be read."""

    def unread(self, data: Buffer) -> None:
        """Give bytes back: the next read returns them first."""

    def take_unread(self) -> bytes:
        """Take what was given back, without reading on."""

    async def recv(self, limit: int = DEFAULT_READ_BYTES, *, low: int = 1) -> bytes:
        """Read what is there, up to `limit` bytes, waiting for the first one; b"" at the end of the stream.

        Args:
            low: where nothing is there, wait for that many, if the stream can.

        Raises:
            OSError: the peer reset the connection, or was found gone.
            TimeoutError: `expire` was called.
            StreamClosed: our own side closed it meanwhile.
        """

    async def recv_exactly(self, count: int) -> bytes:
        """Read exactly `count` bytes. Raises EOFError if the stream ends before, and what `recv` raises."""

    def try_recv(self, limit: int = DEFAULT_READ_BYTES) -> bytes:
        """Read what is there right now; b"" where that is nothing, or an end."""

    async def readable(self, low: int = 1) -> None:
        """Wait until a read would return something: bytes, the end, or an error."""

    async def take_turn(self) -> None:
        """Let others run where the quantum is used up. Errors as for `readable`."""

    def expire(self) -> None:
        """Make pending and later reads raise TimeoutError."""

    def try_send(self, buffers: Iterable[Buffer], flags: int = 0) -> int:
        """Write what the stream takes right now, and say how many bytes it took. Errors as for `send`."""

    async def send(self, *buffers: Buffer, more: bool = False) -> None:
        """Write all of `buffers`. `more`: more follows at once. Raises OSError where the connection is gone."""

    async def writable(self) -> None:
        """Wait until the stream takes more bytes, or is gone."""

    async def flushed(self, limit_s: float) -> bool:
        """Wait until the far end has everything that we wrote, or `limit_s` seconds; say whether it has."""

    def shutdown_write(self) -> None:
        """Say that we write no more; reading goes on. Quietly nothing where the connection is gone already."""

    def close(self) -> None:
        """Close; pending reads and writes raise StreamClosed."""

    def reset(self) -> None:
        """Close so that the far end cannot mistake it for an end. Unsent bytes are dropped."""

    async def drain_and_close(self, *, limit_bytes: int = 64 * 1024, limit_s: float = 1.0) -> None:
        """Say the end, read and discard for a bounded while, then close: our last bytes arrive."""
