"""Finds out which addresses belong to this host, from the kernel's routing table."""

import socket
import struct
from ipaddress import IPv4Address, IPv6Address

from sniproxy.engine.socket_address import scope_of, socket_address

_HEADER = struct.Struct("=IHHII")  # rtnetlink(7): length, type, flags, sequence number, port id
_ROUTE = struct.Struct("=8BI")  # family, destination and source length, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")
_INDEX = struct.Struct("=I")
_RTA_OIF = 4
_RTM_NEWROUTE, _RTM_GETROUTE, _NLM_F_REQUEST, _RTA_DST, _RTN_LOCAL = 24, 26, 1, 1, 2
_ANSWER_BYTES = 8192
_ANSWER_LIMIT_S = 1.0
"""The kernel answers within the call; the limit is for sandboxes that emulate it."""


def is_own_address(address: IPv4Address | IPv6Address) -> bool:
    """Return whether a connection to this address ends on this host, whichever interface has the address.

    The unspecified address leads to loopback, and an IPv4-mapped address to its IPv4 address. An address with a scope is ours if
    that interface has it.
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_unspecified:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        scope = scope_of(address.scope_id) if isinstance(address, IPv6Address) and address.scope_id else 0
        return _route_type(family, address.packed, scope) == _RTN_LOCAL
    except OSError:  # a sandbox without netlink
        return address.is_loopback or _source_towards(family, str(address)) == str(address)


def _route_type(family: int, packed: bytes, scope: int = 0) -> int | None:
    """Return the type of the route to an address, through the interface with this index if not 0; None if there is no route."""
    route = _ROUTE.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0)
    attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
    if scope:
        attribute += _ATTRIBUTE.pack(_ATTRIBUTE.size + _INDEX.size, _RTA_OIF) + _INDEX.pack(scope)
    body = route + attribute
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(_ANSWER_LIMIT_S)
        kernel.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + body)
        answer = kernel.recv(_ANSWER_BYTES)
    if len(answer) < _HEADER.size + _ROUTE.size or _HEADER.unpack_from(answer)[1] != _RTM_NEWROUTE:
        return None
    return int(_ROUTE.unpack_from(answer, _HEADER.size)[7])


def _source_towards(family: int, address: str) -> str | None:
    """Return the source address towards an address; if that is our own, both are the same."""
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(socket_address(address, 9))  # sends nothing
        except OSError:
            return None
        return str(probe.getsockname()[0])
