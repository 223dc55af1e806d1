"""Whether an address is this host's own, whatever interface has it and since when."""

import ipaddress
import socket


def is_own_address(text: str) -> bool:
    """Ask the kernel's routes: to an address of its own it goes from that address, or from loopback.

    Nothing is sent. Unlike an attempt to bind to it, that is right with net.ipv4.ip_nonlocal_bind too.
    """
    family = socket.AF_INET if ipaddress.ip_address(text).version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect((text, 9))
            source = ipaddress.ip_address(probe.getsockname()[0])
        except OSError:
            return False  # no route: nothing of ours
    return source == ipaddress.ip_address(text) or source.is_loopback
