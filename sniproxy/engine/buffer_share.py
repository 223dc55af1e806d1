"""How much of one direction of a stream the kernel may hold: little while its reader is slow, more once it moves fast.

Without I/O. Large buffers save CPU time for a stream that moves fast, since more is moved for each wake-up. For one whose reader is
slow they only store what nobody waits for. So each direction starts with the share of a slow reader, and earns the large one.
"""

from collections.abc import Callable
from typing import Final

DEFAULT_BUFFER_BYTES: Final = 1024 * 1024
"""For one direction of a slow stream, at one hop. Measured at the relay: 0.7 MiB of it are used."""

MIN_BUFFER_BYTES: Final = 512 * 1024
"""A gateway's receive queue must take the 96 KiB of an upload that a relay sends unconfirmed, even if the service does not read
(sniproxy/tunnel/PROTOCOL.md, section 8). The queue gets half of this."""

SHARES: Final = 4
"""Two for the receive queue, which is charged with the overhead of its packets; one for the pipe; one for the send queue."""

EARNED_PART: Final = 4
"""A direction may hold a quarter of what it has moved since its reader was last slow. What all later hops hold passes through it
before it sees that a reader is slow: with a half, gateways took slow readers for fast and held 2.5 MiB for each."""

FAST_FROM: Final = 4
"""With so many times its first share a direction counts as fast: after 4 MiB, by default."""

STALL_S: Final = 0.5
"""A reader that takes nothing for so long is slow. On a busy machine, readers of fast streams wait for a tenth of a second."""

WINDOW_S: Final = 0.5
"""The rate is measured over at least this long."""

FAST_BYTES_PER_S: Final = 5_000_000
"""Below this, a share is moved twenty times a second or less, and wake-ups cost nothing."""


class BufferShare:
    """The share of one direction. To be updated now and then as bytes move, and at every look at a stream that does not move."""

    __slots__ = ("_ask_at", "_base", "_fast_since", "_rate_at", "_rate_moved", "share")

    def __init__(self, buffer_bytes: int, moved: int, now: float) -> None:
        """Begin with the share of a slow reader.

        Args:
            buffer_bytes: what the kernel may hold of a slow stream's direction.
            moved: bytes moved so far.
            now: seconds of any clock.
        """
        self._base = max(buffer_bytes, MIN_BUFFER_BYTES) // SHARES
        self._fast_since = moved
        self._rate_at, self._rate_moved = now, moved
        self._ask_at = now
        self.share: int | None = self._base
        """Bytes; None: what a fast stream gets."""

    @property
    def is_small(self) -> bool:
        """Whether this is the share of a slow reader."""
        return self.share == self._base

    def update(self, moved: int, now: float, full_s: float, may_be_fast: Callable[[], bool]) -> None:
        """Adapt the share.

        Args:
            moved: bytes moved so far.
            now: by the same clock as before.
            full_s: the longest time since the last update for which the reader has taken nothing.
            may_be_fast: whether this process may give out another large share; asked at most twice a second.
        """
        passed_s = now - self._rate_at
        if full_s >= STALL_S:
            self._slow_down(moved, now)
        elif passed_s >= WINDOW_S:
            is_fast = moved - self._rate_moved >= FAST_BYTES_PER_S * passed_s
            self._rate_at, self._rate_moved = now, moved
            if not is_fast:
                self._slow_down(moved, now)
        self._grow(moved, now, may_be_fast)

    def _grow(self, moved: int, now: float, may_be_fast: Callable[[], bool]) -> None:
        earned = (moved - self._fast_since) // EARNED_PART
        while self.share is not None and earned >= 2 * self.share:
            if 2 * self.share < FAST_FROM * self._base:
                self.share *= 2
            elif now < self._ask_at:
                return
            elif may_be_fast():
                self.share = None
            else:
                self._ask_at = now + WINDOW_S

    def _slow_down(self, moved: int, now: float) -> None:
        self.share = self._base
        self._fast_since = self._rate_moved = moved
        self._rate_at = now
