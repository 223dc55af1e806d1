"""Addresses as the socket calls take them, with the scope of a link-local IPv6 address (RFC 4007 section 11).

Python's `connect` and `bind` ignore the `%eth0` of an address in a pair (host, port), and the kernel refuses a link-local address
without a scope (EINVAL).
"""

import errno
import socket
from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int]


def socket_address(address: IPv4Address | IPv6Address | str, port: int) -> SocketAddress:
    """Return what `connect`, `bind` and `sendto` take for an IP literal and a port.

    The interface is looked up each time, since one that is created anew has another index. Raises OSError (ENODEV) if there is none
    of this name.
    """
    host, _, zone = str(address).partition("%")
    if not zone:
        return host, port
    return host, port, 0, scope_of(zone)


def scope_of(zone: str) -> int:
    """Return the index of an interface, given by name or index. Raises OSError (ENODEV)."""
    if zone.isascii() and zone.isdigit():
        return int(zone) & 0xFFFFFFFF
    try:
        return socket.if_nametoindex(zone)
    except (OSError, ValueError) as error:
        raise OSError(errno.ENODEV, f"no such interface: {zone}") from error
