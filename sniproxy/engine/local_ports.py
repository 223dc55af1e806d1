"""Local ports of the connections that we make: how many there are, and what it looks like when they run out.

The kernel gives each connection to one address and port a local port of its own, from `net.ipv4.ip_local_port_range`. The side that
closes first keeps its port for a minute more (TIME_WAIT, RFC 9293 section 3.6.1).
"""

import errno
import os
import socket
from pathlib import Path
from typing import Final

IP_BIND_ADDRESS_NO_PORT: Final = 24
"""Linux, in <linux/in.h>; the socket module has it from Python 3.12 on. bind(2) leaves the port to connect(2), which knows the
destination and so may use a port that another destination has."""

RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
SOCKETS: Final = Path("/proc/self/net/sockstat")


class NoLocalPort(OSError):
    """All local ports for connections to a destination are in use. The destination is not to blame."""


class _Shortages:
    """How often that has happened."""

    count = 0


shortages: Final = _Shortages()
"""Of this process."""


def connect_error(code: int, address: str, *, where: str = "") -> OSError:
    """Return the error of a connect(2) to this address that failed with `code`. `where` is added to its text."""
    if code == errno.EADDRNOTAVAIL and _has_source(address):
        shortages.count += 1
        return NoLocalPort(code, f"no local port is free (net.ipv4.ip_local_port_range){where}")
    return OSError(code, f"{os.strerror(code)}{where}")


def _has_source(address: str) -> bool:
    """Return whether this host has an address to connect from, the lack of which is the same error."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        return not probe.connect_ex((address, 9))  # sends nothing


def local_ports() -> int:
    """Return the number of local ports for connections to one destination. OSError, ValueError: the kernel does not tell."""
    first, last = RANGE.read_text().split()
    return int(last) - int(first) + 1


def time_wait() -> int:
    """Return the number of this host's TCP connections in TIME_WAIT, accepted ones included. Raises as `local_ports`."""
    for line in SOCKETS.read_text().splitlines():
        if line.startswith("TCP:"):
            words = line.split()
            return int(words[words.index("tw") + 1])
    raise ValueError(f"no TCP in {SOCKETS}")
