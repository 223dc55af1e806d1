"""What the kernel may hold for a TCP socket, and what it holds.

- Unsent bytes are bounded by TCP_NOTSENT_LOWAT. What is in flight comes on top, as much as the path needs.
- The receive queue is bounded by SO_RCVBUF alone. TCP_WINDOW_CLAMP bounds each announced window, but the kernel announces another
  one while the buffer has room, and raises the clamp whenever it enlarges the buffer by itself. SO_RCVBUF ends this tuning. It must
  not be set before the handshake, which would choose a window scale for it. SO_BUF_LOCK (Linux 5.15) starts the tuning again.
- A buffer must never become smaller than what was announced: the kernel would drop it on arrival, and its sender would wait for
  a retransmission timeout. So a large buffer is made small once nothing is announced: some time after it was full.
"""

import functools
import socket
import struct
from pathlib import Path
from typing import Final

SO_BUF_LOCK: Final = 72
SO_MEMINFO: Final = 55
"""Linux 4.12. The `socket` module has neither."""

_LOCK_RECEIVE: Final = 2
_MEMORY: Final = struct.Struct("9I")
_INFO_BYTES: Final = 236
_MIN_RTT_AT: Final = 148  # linux/tcp.h, struct tcp_info: tcpi_min_rtt, tcpi_rcv_wnd (Linux 6.2)
_RECEIVE_WINDOW_AT: Final = 232
_U32: Final = struct.Struct("I")
_UNKNOWN: Final = 0xFFFF_FFFF

OVERHEAD: Final = 2
"""What a queued byte is charged at most, for packets of a network. The kernel doubles SO_RCVBUF for the same reason."""

TUNE_FROM_BYTES: Final = 2 * 1024 * 1024
"""The kernel enlarges a buffer when more is read in a round trip than ever before. It counts even while it may not enlarge it, so a
full buffer would never grow again: it needs this much to begin with, or what the system allows."""

USUAL_RMEM_MAX: Final = 212_992
"""Linux's default of net.core.rmem_max."""


@functools.cache
def largest_receive() -> int:
    """Return the largest receive buffer that can be set, including overhead: twice net.core.rmem_max."""
    try:
        return OVERHEAD * int(Path("/proc/sys/net/core/rmem_max").read_text())
    except (OSError, ValueError):
        return OVERHEAD * USUAL_RMEM_MAX  # some kernels show it only outside of network namespaces


class SocketMemory:
    """The kernel's memory of one TCP socket. Nothing here raises OSError: what cannot be set stays the kernel's business."""

    __slots__ = ("_is_locked", "_sock", "_unsent")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_locked = False
        self._unsent: int | None = None

    def limit_unsent(self, size: int | None) -> None:
        """Take no more to send while so many bytes are unsent; None: as the system's default."""
        if size != self._unsent:
            self._unsent = size
            self._set(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size or 0)

    def tune_receive(self) -> None:
        """Let the kernel tune the size of the receive queue, as it does at first."""
        if self._is_locked:
            self._enlarge(TUNE_FROM_BYTES)
            self._is_locked = False
            self._set(socket.SOL_SOCKET, SO_BUF_LOCK, 0)

    def limit_receive(self, size: int) -> bool:
        """Let the receive queue hold so many bytes, including their overhead. False if the system allows only fewer.

        The limit of one that has been larger is lowered by later calls, when the sender may send nothing more.
        """
        if not self._is_locked:
            # It keeps its size. Fails before Linux 5.15, where it could never be tuned again: so it stays as it is.
            self._is_locked = self._set(socket.SOL_SOCKET, SO_BUF_LOCK, _LOCK_RECEIVE)
            if not self._is_locked:
                return True
        now = self.receive_limit
        if now < size:
            self._enlarge(size)
            return self.receive_limit >= size
        if now > size and (window := self._info(_RECEIVE_WINDOW_AT)) is not None:
            promised = self.held()[0] + OVERHEAD * window if window else 0
            if max(size, promised) < min(now, largest_receive()):
                self._set(socket.SOL_SOCKET, socket.SO_RCVBUF, max(size, promised) // OVERHEAD)
        return True

    def _enlarge(self, size: int) -> None:
        size = min(size, largest_receive())
        if size > self.receive_limit:
            self._set(socket.SOL_SOCKET, socket.SO_RCVBUF, size // OVERHEAD)
            # Otherwise no window is larger than the buffer was before.
            self._set(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, size)

    @property
    def receive_limit(self) -> int:
        """The size of the receive buffer, including overhead."""
        try:
            return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        except OSError:
            return 0

    def min_rtt_s(self) -> float:
        """Return the round trip time without queues, as far as known; 0 if it is not."""
        micros = self._info(_MIN_RTT_AT)
        return 0.0 if micros is None or micros == _UNKNOWN else micros / 1e6

    def held(self) -> tuple[int, int]:
        """Return the bytes of the receive queue and of the send queue, including overhead."""
        try:
            memory = self._sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMORY.size)
            fields = _MEMORY.unpack(memory)
        except (OSError, struct.error):
            return 0, 0
        return fields[0], fields[5]  # linux/sock_diag.h: SK_MEMINFO_RMEM_ALLOC, SK_MEMINFO_WMEM_QUEUED

    def _info(self, at: int) -> int | None:
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:
            return None
        return None if len(info) < at + _U32.size else int(_U32.unpack_from(info, at)[0])

    def _set(self, level: int, option: int, value: int) -> bool:
        try:
            self._sock.setsockopt(level, option, value)
        except OSError:
            return False
        return True
