"""Which clients may ask, and how much: an access list, and a rate limit in questions per second for each client.

A client is an IPv4 address or an IPv6 /64, as at the relay: one host usually has a whole /64. The access list matches addresses.

A client's remaining questions are one number in a dict, so an ordinary question costs one lookup and one write. The dict is
cleared every second. Sans-IO: the caller says when a second is over.
"""

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TypeAlias

Host: TypeAlias = bytes
"""A client's address, packed."""

Client: TypeAlias = bytes
"""What a limit is counted for: an IPv4 address, or the first 64 bits of an IPv6 address."""

MAX_KNOWN = 65536
"""Clients remembered at once. With more, all are forgotten and counted from zero."""

DENIED = -1
"""Stands in place of the number of remaining questions for an address that may not ask."""

_UNLIMITED = 1 << 60


@lru_cache(4096)
def packed(text: str) -> Host:
    """Pack an address as a socket gives it: as text, which may end in a scope (`%eth0`)."""
    return ip_address(text).packed


def client_of(host: Host) -> Client:
    """Return the client that questions from this address are counted for."""
    return host[:8] if len(host) == 16 else host


class Clients:
    """The questions that each client has left in this second.

    `left` is for the hot path. No entry: call `admit`. 0: too many questions. Below 0: not allowed. Its keys are addresses,
    except for IPv6 with a limit: then every question goes through `admit`, which maps the address to its client.
    """

    __slots__ = ("_allow", "_allowed", "_limit", "_max_known", "left")

    def __init__(
        self, allow: Iterable[IPv4Network | IPv6Network], limit_per_s: int, *, max_known: int = MAX_KNOWN
    ) -> None:
        """Allow these networks, and each client in them `limit_per_s` questions a second; 0: any number."""
        self._allow = tuple(allow)
        self._limit = limit_per_s or _UNLIMITED
        self._max_known = max_known
        self._allowed: dict[Host, bool] = {}
        self.left: dict[Host | Client, int] = {}

    @property
    def limited(self) -> bool:
        """Whether there is a rate limit, so that `renew` must be called every second."""
        return self._limit != _UNLIMITED

    def admit(self, host: Host) -> tuple[Host | Client, int]:
        """Return the key in `left` for an address that has no entry there, and how many questions it has left."""
        allowed = self._allowed.get(host)
        if allowed is None:
            address = ip_address(host)
            allowed = any(address in network for network in self._allow)
            if len(self._allowed) >= self._max_known:
                self._allowed.clear()
            self._allowed[host] = allowed
        key = client_of(host) if allowed and self.limited else host
        left = self.left.get(key)
        if left is None:
            if len(self.left) >= self._max_known:
                self.left.clear()
            left = self.left[key] = self._limit if allowed else DENIED
        return key, left

    def renew(self) -> None:
        """Start the next second."""
        self.left.clear()
