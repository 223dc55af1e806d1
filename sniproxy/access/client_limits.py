"""What one client, and all together, may take of a relay: streams, new streams a second, bytes of unfinished ClientHellos.

A client is an IPv4 address, or an IPv6 /64: that much one host has for itself. Behind an address can be a whole office (NAT), so
the defaults stop only what would keep others out. Who is over a limit is refused; nobody who is in suffers. Sans-IO.
"""

from collections import OrderedDict
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from discovery.model.addresses import Address
from discovery.pacing.token_bucket import TokenBucket

DEFAULT_MAX_STREAMS_PER_CLIENT = 8192
"""Half of all streams: one address never has everything."""

DEFAULT_NEW_STREAMS_PER_S = 2000
"""About what one core of a relay opens (2,300 measured): ten offices behind one address do not ask for that, a flood does."""

BURST_S = 2.0
"""A client that was quiet may bring what it did not use in that time at once: every connection of a pool, after a restart."""

DEFAULT_MAX_HELLO_HELD_BYTES = 64 * 1024 * 1024
"""A thousand ClientHellos of the largest size at once, or thirty thousand ordinary ones."""

MAX_CLIENTS = 65_536
"""Clients whose rate is remembered, about 200 bytes each. The one unheard of for longest is forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """For each client; 0 is no limit."""

    max_streams: int = DEFAULT_MAX_STREAMS_PER_CLIENT
    new_streams_per_s: int = DEFAULT_NEW_STREAMS_PER_S


def _client(address: Address) -> int:
    """One number for each client; those of IPv6 are above all of IPv4."""
    return int(address) if address.version == 4 else (1 << 64) + (int(address) >> 64)


class Admission:
    """Who has how many streams, and who may bring one more. `limits` may be replaced at any time."""

    def __init__(self, limits: Limits, *, max_clients: int = MAX_CLIENTS) -> None:
        self.limits = limits
        self._max_clients = max_clients
        self._streams: dict[int, int] = {}
        self._rates: OrderedDict[int, TokenBucket] = OrderedDict()
        """For each client what it may still bring; those heard of lately are last."""

    def admit(self, address: Address, now: float) -> str | None:
        """Take one stream in, or say why not. What was taken in is given back by `leave`.

        Args:
            now: seconds of any clock that does not go back.
        """
        client = _client(address)
        streams = self._streams.get(client, 0)
        if 0 < self.limits.max_streams <= streams:
            return f"{streams} streams of this client are open: relay.max_streams_per_client"
        if not self._take_one(client, now):
            return f"more than {self.limits.new_streams_per_s} new streams a second: relay.new_streams_per_second"
        self._streams[client] = streams + 1
        return None

    def leave(self, address: Address) -> None:
        """End one stream that was admitted."""
        client = _client(address)
        left = self._streams[client] - 1
        if left:
            self._streams[client] = left
        else:
            del self._streams[client]

    def _take_one(self, client: int, now: float) -> bool:
        rate = self.limits.new_streams_per_s
        if not rate:
            self._rates.clear()
            return True
        bucket = self._rates.get(client)
        if bucket is None:
            bucket = self._rates[client] = TokenBucket(rate, max(rate * BURST_S, 1.0), now)
            if len(self._rates) > self._max_clients:
                self._rates.popitem(last=False)
        else:
            self._rates.move_to_end(client)
            bucket.rate, bucket.burst = rate, max(rate * BURST_S, 1.0)
        return bucket.take(1, now)


class Budget:
    """Bytes that all streams together may hold. `limit` may be replaced at any time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def share(self) -> "Share":
        """Begin one stream's share; leave it by `with`."""
        return Share(self)


class Share:
    """What one stream holds."""

    __slots__ = ("_budget", "_held")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held = 0

    def take(self, size: int) -> bool:
        """Hold so many bytes more; False if all together then hold too many, and this stream is to be refused."""
        self._held += size
        self._budget.held += size
        return self._budget.held <= self._budget.limit

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._budget.held -= self._held
        self._held = 0
