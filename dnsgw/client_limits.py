"""Who may ask, and how much: an access list, and for each client a number of questions in a second.

A client is an IPv4 address, or an IPv6 /64, as at the relay: that much one host has for itself. The access list is about addresses.

What a client has left is one number in a dict, so that an ordinary question costs one look into it and one write. All of
it is forgotten every second. Sans-IO: its user says when a second is over.
"""

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TypeAlias

Host: TypeAlias = bytes
"""A client's address, packed."""

Client: TypeAlias = bytes
"""Whose share something counts in: an IPv4 address or the first half of an IPv6 one."""

MAX_KNOWN = 65536
"""Clients remembered at once; with more, all are forgotten and counted afresh."""

DENIED = -1
_UNLIMITED = 1 << 60


@lru_cache(4096)
def packed(text: str) -> Host:
    """The address that a socket gives as text, which may end in an interface."""
    return ip_address(text).packed


def client_of(host: Host) -> Client:
    """Whose share the questions from this address count in."""
    return host[:8] if len(host) == 16 else host


class Clients:
    """What each client has left. `left` is for the hot path: no entry, ask `admit`; 0, too many; below, not allowed.

    Its keys are addresses, but for IPv6 with a limit: then every question goes through `admit`, which knows both the address and
    whose share it counts in.
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
        """Whether there is a limit at all, and `renew` is to be called."""
        return self._limit != _UNLIMITED

    def admit(self, host: Host) -> tuple[Host | Client, int]:
        """Say for an address without an entry in `left` under which key it counts, and how many questions that has left."""
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
        """Start the count of the next second."""
        self.left.clear()
