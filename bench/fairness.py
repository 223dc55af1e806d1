"""Shared by the fairness benchmarks: the goal for a real client under attack, and the figures that are reported."""

import socket
from collections.abc import Sequence
from typing import Any

FACTOR, FLOOR_MS = 5.0, 25.0
"""The p99 under attack may be five times the p99 alone, or 25 ms, whichever is more."""

LIMIT_S = 5.0
"""Timeout of an operation; one that fails counts as this long."""

PAUSE_S = 0.005
"""Between two operations of the real client."""

DRAIN_S = 3
"""The `drain` of the processes."""

FIRST = -15
"""Nice value of the flooded process and the real client with --first; that of the attackers does not change."""


def compared(alone: Sequence[float], attacked: Sequence[float]) -> dict[str, Any]:
    """Return p50 and p99 of both lists, which are sorted milliseconds, and whether the goal is met."""
    before, after = share(alone, 0.99), share(attacked, 0.99)
    return {
        "alone_p50_ms": round(share(alone, 0.5), 2),
        "alone_p99_ms": round(before, 2),
        "p50_ms": round(share(attacked, 0.5), 2),
        "p99_ms": round(after, 2),
        "tries": len(attacked),
        "ok": after <= max(FACTOR * before, FLOOR_MS),
    }


def share(values: Sequence[float], part: float) -> float:
    """Return a quantile: the value that this part of the sorted values is below."""
    return values[min(len(values) - 1, int(len(values) * part))]


def free_port() -> int:
    """Return a port of loopback that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
