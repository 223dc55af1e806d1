"""The two ways in which a process stops: for good, or replaced by a successor.

    end         withdraw the records; serve clients that still know of us for a while; stop accepting; wait for the streams
    hand over   leave the records; serve relays that still use our allocations for a while; stop accepting; wait for the streams

Both finish when every role is idle, after `drain` in total, or on a second signal.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from crossnet.app.role import Role

log = logging.getLogger("crossnet")

LOOK_S = 0.1

GIVE_BACK_S = 5.0
"""Time limit for giving back allocations and records; leases expire by themselves."""


async def end(roles: Sequence[Role], drain_s: float, hurry: asyncio.Event) -> None:
    """Drain without a successor."""
    _announce(roles, drain_s)
    for role in roles:
        role.withdraw()
    await _see_off(roles, drain_s, hurry)


async def hand_over(roles: Sequence[Role], drain_s: float, hurry: asyncio.Event) -> None:
    """Drain after a successor has taken over the sockets and records."""
    _announce(roles, drain_s)
    await _see_off(roles, drain_s, hurry)


def _announce(roles: Sequence[Role], drain_s: float) -> None:
    event = {"seconds": drain_s, "streams": _streams(roles), "hint": "a second signal ends at once"}
    log.info("draining", extra={"event": event})


async def _see_off(roles: Sequence[Role], drain_s: float, hurry: asyncio.Event) -> None:
    now = asyncio.get_running_loop().time()
    deadline = now + drain_s
    await _sleep_unless_forced(min(max((role.comes_until(now) for role in roles), default=now), deadline), hurry)
    for role in roles:
        role.stop_accepting()
    while not all(role.idle for role in roles):
        now = asyncio.get_running_loop().time()
        if now >= deadline or hurry.is_set():
            break
        await _sleep_unless_forced(min(now + LOOK_S, deadline), hurry)
    if left := _streams(roles):
        log.warning("cut", extra={"event": {"streams": left}})


async def _sleep_unless_forced(until: float, hurry: asyncio.Event) -> None:
    """Sleep until a time of the loop, or until a second signal."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            await hurry.wait()


def _streams(roles: Sequence[Role]) -> int:
    return sum(role.open_streams for role in roles)
