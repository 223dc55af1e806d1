"""The name servers that the host itself asks, and which addresses are our own."""

from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import TypeAlias

from discovery.model.addresses import Address
from sniproxy.engine.host_addresses import is_own_address

Endpoint: TypeAlias = tuple[Address, int]

DNS_PORT = 53
MAX_RESOLV_CONF = 3  # MAXNS of glibc and musl


def read_resolv_conf(path: Path, port: int = DNS_PORT) -> tuple[Endpoint, ...]:
    """Read the name servers of a resolv.conf, three at most as libc does. A file that is not there has none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append((ip_address(words[1]), port))
            except ValueError:
                continue
    return tuple(found[:MAX_RESOLV_CONF])


def leads_here(upstream: Endpoint, listening: Iterable[Endpoint]) -> bool:
    """Tell whether asking this upstream would be asking ourselves."""
    address, port = upstream
    for own, own_port in listening:
        if port == own_port and address.version == own.version:
            if address == own or address.is_unspecified:
                return True
            if own.is_unspecified and is_own_address(address):
                return True
    return False
