"""What the fairness benches share: when a real client beside attackers is served well enough, and how that is told."""

import socket
from collections.abc import Sequence
from typing import Any

FACTOR, FLOOR_MS = 5.0, 25.0
"""The p99 beside attackers may be five times the p99 alone, or 25 ms, whichever is more."""

LIMIT_S = 5.0
"""A try that takes longer counts as this long."""

PAUSE_S = 0.005
"""Between two tries of the real client."""

DRAIN_S = 3
"""What the processes are given to drain."""

FIRST = -15
"""How nice the flooded process and its real client are with --first; the attackers stay as they are."""


def compared(alone: Sequence[float], beside: Sequence[float]) -> dict[str, Any]:
    """Return p50 and p99 of both, which are milliseconds in order of size, and whether the aim is met."""
    before, after = share(alone, 0.99), share(beside, 0.99)
    return {
        "alone_p50_ms": round(share(alone, 0.5), 2),
        "alone_p99_ms": round(before, 2),
        "p50_ms": round(share(beside, 0.5), 2),
        "p99_ms": round(after, 2),
        "tries": len(beside),
        "ok": after <= max(FACTOR * before, FLOOR_MS),
    }


def share(values: Sequence[float], part: float) -> float:
    """Return the value below which that part of them lies."""
    return values[min(len(values) - 1, int(len(values) * part))]


def free_port() -> int:
    """Return a port of loopback that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
