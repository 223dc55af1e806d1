"""Connect to the first of several endpoints that answers, as RFC 8305 section 5 does it for the addresses of a host.

The next endpoint is dialled as soon as one fails, and beside one that stays silent for a moment. The first to answer wins; the
others are closed before they have carried a byte. All sockets of one call wait on one future: no task for each attempt.
"""

import asyncio
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from sniproxy.engine.local_ports import connect_error
from sniproxy.engine.socket_address import socket_address
from sniproxy.engine.socket_stream import SocketStream, tune

Endpoint: TypeAlias = tuple[str, int]
"""An IP literal and a port."""

STAGGER_S: Final = 0.25
"""How long an endpoint may stay silent before the next one is dialled beside it (RFC 8305 section 8: Connection Attempt Delay)."""

MIN_STAGGER_S: Final = 0.1
"""The same for endpoints of which little is hoped for, and where there are many: the least that RFC 8305 section 8 recommends."""

MAX_OUTSTANDING: Final = 16
"""Attempts at a time. One more gives up the oldest, which has been silent for longer than most services take."""

OnFailed: TypeAlias = Callable[[Endpoint, OSError], None]
"""Told of an endpoint that failed, timed out, or was still silent after its head start when another answered (TimeoutError)."""

HeadStart: TypeAlias = Callable[[Endpoint], float]
"""How many seconds an endpoint may stay silent before the next one is dialled beside it."""


def stagger(_endpoint: Endpoint) -> float:
    """Give every endpoint the head start of RFC 8305."""
    return STAGGER_S


@dataclass(frozen=True, slots=True)
class FirstConnected:
    """The endpoint that answered."""

    stream: SocketStream
    endpoint: Endpoint
    attempts: int
    """How many were dialled, this one included."""


async def connect_first(
    endpoints: Iterator[Endpoint],
    *,
    timeout_s: float,
    limit_s: float,
    on_failed: OnFailed,
    head_start_s: HeadStart = stagger,
) -> FirstConnected | None:
    """Connect to the first endpoint that answers; None if none does, or none was left to try within `limit_s` seconds.

    Args:
        endpoints: in the order in which to try them. The next one is asked for only when it is to be dialled, so that it may
            still be left out.
        timeout_s: for each endpoint, from its own SYN.
        limit_s: for all together.
    """
    race = _Race(endpoints, timeout_s=timeout_s, head_start_s=head_start_s, on_failed=on_failed)
    try:
        return await race.run(limit_s)
    finally:
        race.close()


class _Race:
    def __init__(
        self, endpoints: Iterator[Endpoint], *, timeout_s: float, head_start_s: HeadStart, on_failed: OnFailed
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._endpoints = endpoints
        self._timeout_s = timeout_s
        self._head_start_s = head_start_s
        self._on_failed = on_failed
        self._outstanding: dict[
            socket.socket, tuple[Endpoint, float]
        ] = {}  # with the time of the SYN, the oldest first
        self._settled: list[socket.socket] = []
        self._waiter: asyncio.Future[None] | None = None
        self._attempts = 0

    async def run(self, limit_s: float) -> FirstConnected | None:
        next_at = now = self._loop.time()
        deadline = now + limit_s
        are_left = True
        while True:
            for sock in self._take_settled():
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return self._won(sock, now)
                self._failed(sock, OSError(code, os.strerror(code)))
                next_at = now
            while self._outstanding and now >= self._oldest_since() + self._timeout_s:
                self._silent(now)
            if not self._outstanding:
                if not are_left:
                    return None
                next_at = now
            if now >= deadline:
                while self._outstanding:
                    self._silent(now)
                return None
            if are_left and now >= next_at:
                endpoint = next(self._endpoints, None)
                if endpoint is None:
                    are_left = False
                elif self._dial(endpoint, now):
                    next_at = now + self._head_start_s(endpoint)
                else:
                    await asyncio.sleep(0)  # hundreds may fail at once, as without a route
            elif not self._settled:
                wake_at = min(deadline, self._oldest_since() + self._timeout_s)
                await self._wait(min(wake_at, next_at) if are_left else wake_at)
            now = self._loop.time()

    def _dial(self, endpoint: Endpoint, now: float) -> bool:
        """Send a SYN. False if that failed at once."""
        if len(self._outstanding) == MAX_OUTSTANDING:
            self._silent(now)
        address, port = endpoint
        self._attempts += 1
        sock = None
        try:
            if not 0 < port < 1 << 16:
                raise OSError(errno.EADDRNOTAVAIL, "no such port")
            family = socket.AF_INET if ipaddress.ip_address(address).version == 4 else socket.AF_INET6
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            tune(sock)
            code = sock.connect_ex(socket_address(address, port))
            if code not in (0, errno.EINPROGRESS):
                raise connect_error(code, address)
        except OSError as error:
            if sock is not None:
                sock.close()
            self._on_failed(endpoint, error)
            return False
        self._outstanding[sock] = endpoint, now
        if code:
            self._loop.add_writer(sock.fileno(), self._on_settled, sock)
        else:
            self._settled.append(sock)
        return True

    def _on_settled(self, sock: socket.socket) -> None:
        self._loop.remove_writer(sock.fileno())
        self._settled.append(sock)
        self._wake()

    def _take_settled(self) -> list[socket.socket]:
        settled, self._settled = self._settled, []
        return settled

    async def _wait(self, until: float) -> None:
        """Wait until an attempt is settled, or for the time to act."""
        self._waiter = self._loop.create_future()
        timer = self._loop.call_at(until, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _oldest_since(self) -> float:
        return next(iter(self._outstanding.values()))[1]

    def _silent(self, now: float) -> None:
        """Give up the oldest attempt."""
        sock, (_, since) = next(iter(self._outstanding.items()))
        self._failed(sock, TimeoutError(errno.ETIMEDOUT, f"no answer in {now - since:.1f} s"))

    def _failed(self, sock: socket.socket, error: OSError) -> None:
        endpoint, _ = self._outstanding[sock]
        self._give_up(sock)
        self._on_failed(endpoint, error)

    def _won(self, sock: socket.socket, now: float) -> FirstConnected:
        endpoint, _ = self._outstanding.pop(sock)
        for other, (place, since) in self._outstanding.items():
            if now >= since + self._head_start_s(place) and other not in self._settled:
                error = TimeoutError(errno.ETIMEDOUT, f"no answer in {now - since:.1f} s, and another gave one")
                self._on_failed(place, error)
        try:
            return FirstConnected(SocketStream(sock, endpoint), endpoint, self._attempts)
        except BaseException:
            sock.close()
            raise

    def _give_up(self, sock: socket.socket) -> None:
        del self._outstanding[sock]
        self._loop.remove_writer(sock.fileno())
        sock.close()

    def close(self) -> None:
        for sock in list(self._outstanding):
            self._give_up(sock)
