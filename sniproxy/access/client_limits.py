"""Limits for each client, and for all together: streams, new streams per second, bytes of unfinished ClientHellos.

A client is an IPv4 address or an IPv6 /64, because one host can have a whole /64. A whole office can be behind one address (NAT),
so the defaults only stop what would keep others out. New streams over a limit are refused; open streams are not affected.
Sans-IO.
"""

from collections import OrderedDict
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from discovery.model.addresses import Address
from discovery.pacing.token_bucket import TokenBucket

DEFAULT_MAX_STREAMS_PER_CLIENT = 8192
"""Half of all streams, so that one address never has all of them."""

DEFAULT_NEW_STREAMS_PER_S = 2000
"""About as many as one core of a relay can open (2,300 measured). A flood needs that, ten offices behind one address do not."""

BURST_S = 2.0
"""A client that was idle may open as many at once as the rate allows in this time, such as a connection pool after a restart."""

DEFAULT_MAX_HELLO_HELD_BYTES = 64 * 1024 * 1024
"""A thousand ClientHellos of the largest size, or thirty thousand ordinary ones."""

MAX_CLIENTS = 65_536
"""Clients whose rate is remembered, about 200 bytes each. The one that has been idle longest is forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits for each client. 0: no limit."""

    max_streams: int = DEFAULT_MAX_STREAMS_PER_CLIENT
    new_streams_per_s: int = DEFAULT_NEW_STREAMS_PER_S


def client_of(address: Address) -> int:
    """Return a number for each client. Those of IPv6 clients are above those of IPv4 clients."""
    return int(address) if address.version == 4 else (1 << 64) + (int(address) >> 64)


class Admission:
    """Counts the streams of each client, and decides about new ones. `limits` may be replaced at any time."""

    def __init__(self, limits: Limits, *, max_clients: int = MAX_CLIENTS) -> None:
        self.limits = limits
        self._max_clients = max_clients
        self._streams: dict[int, int] = {}
        self._rates: OrderedDict[int, TokenBucket] = OrderedDict()
        """A token bucket for each client; the most recent clients are last."""

    def admit(self, address: Address, now: float) -> str | None:
        """Admit a stream and return None, or return why it is refused. Call `leave` for each admitted stream.

        Args:
            address: of the client.
            now: seconds of a clock that never goes back.
        """
        client = client_of(address)
        streams = self._streams.get(client, 0)
        if 0 < self.limits.max_streams <= streams:
            return f"{streams} streams of this client are open: relay.max_streams_per_client"
        if not self._take_one(client, now):
            return f"more than {self.limits.new_streams_per_s} new streams a second: relay.new_streams_per_second"
        self._streams[client] = streams + 1
        return None

    def leave(self, address: Address) -> None:
        """Note the end of an admitted stream."""
        client = client_of(address)
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
    """A limit of bytes for all streams together. `limit` may be replaced at any time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def share(self) -> "Share":
        """Return the share of one stream, to be used as a context manager that releases it."""
        return Share(self)


class Share:
    """The bytes that one stream holds."""

    __slots__ = ("_budget", "_held")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held = 0

    def take(self, size: int) -> bool:
        """Add `size` bytes. Returns False if all streams together are over the limit, and this one has to be refused."""
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
