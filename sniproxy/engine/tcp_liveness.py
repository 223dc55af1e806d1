"""Whether the far end of a TCP connection still answers, as the kernel sees it.

Keep-alive finds a lost host only while nothing is in flight. With bytes in flight Linux retransmits for a quarter of an hour, and
probes a closed window for as long. A reader that pauses answers these probes, so it is never taken for lost: what counts is how
long nothing was answered, not how long nothing was taken.
"""

import socket
import struct
from typing import Final

TCP_RTO_MAX_MS: Final = 44
"""From Linux 6.15 on; the `socket` module does not have it."""

RTO_MAX_MS: Final = 5_000
"""The longest pause between two retransmissions or window probes, 120 s otherwise. Measured: probes to a reader that had paused for
80 s came every 5 s, and those after the loss of its host were counted one by one. Before Linux 6.15 the pause doubles up to 120 s,
so a host that is lost while its reader pauses is found up to 2 minutes later."""

UNANSWERED_S: Final = 19.0
"""How long retransmissions or probes go unanswered before a peer counts as lost. With the time to the next probe and to the next
check, each at most 5 s, it is found within 30 s."""

INFO_BYTES: Final = 60
_LAST_ACK_RECEIVED_MS: Final = struct.Struct("I")
_LAST_ACK_OFFSET: Final = 56


def bound_retransmissions(sock: socket.socket) -> None:
    """Retransmit and probe every 5 s at least, where the kernel can."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, RTO_MAX_MS)
    except OSError:
        pass  # Linux before 6.15


def unanswered_s(sock: socket.socket) -> float:
    """Return for how many seconds the peer has not answered what is in flight or a window probe; 0 if nothing is unanswered.

    After silence it counts from the last acknowledgement, which may be older than what is in flight.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_BYTES)
    except OSError:
        return 0.0  # closed, or no TCP socket: nothing that can be lost
    retransmissions, probes = info[2], info[3]  # linux/tcp.h, struct tcp_info: tcpi_retransmits, tcpi_probes
    if not (retransmissions or probes):
        return 0.0
    return float(_LAST_ACK_RECEIVED_MS.unpack_from(info, _LAST_ACK_OFFSET)[0]) / 1000
