"""The name servers that the host itself uses, and which upstreams are this server."""

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
    """Return the name servers of a resolv.conf, at most three, as libc does; none if it cannot be read."""
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
    """Whether this upstream is one of our own listening addresses."""
    address, port = upstream
    for own, own_port in listening:
        if port == own_port and address.version == own.version:
            if address == own or address.is_unspecified:
                return True
            if own.is_unspecified and is_own_address(address):
                return True
    return False
