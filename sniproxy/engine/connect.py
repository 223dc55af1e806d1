"""Opens TCP connections to IP literals."""

import asyncio
import errno
import ipaddress
import socket

from sniproxy.engine.local_ports import IP_BIND_ADDRESS_NO_PORT, connect_error
from sniproxy.engine.socket_address import socket_address
from sniproxy.engine.socket_stream import SocketStream, tune


async def connect(
    address: str, port: int, *, timeout_s: float, local_address: str | None = None, sock: socket.socket | None = None
) -> SocketStream:
    """Connect to an IP literal and port.

    Args:
        sock: a non-blocking socket to use, for callers that set options before the handshake, or have already begun it.

    Raises:
        OSError: refused, unreachable or reset, or `port` is out of range.
        TimeoutError: no answer within `timeout_s` seconds.
        ValueError: `address` is not an IP literal. Names are resolved elsewhere, on purpose.
    """
    own = await connect_socket(address, port, timeout_s=timeout_s, local_address=local_address, sock=sock)
    try:
        return SocketStream(own, (address, port))
    except BaseException:
        own.close()
        raise


async def connect_socket(
    address: str, port: int, *, timeout_s: float, local_address: str | None = None, sock: socket.socket | None = None
) -> socket.socket:
    """Connect as `connect` does, and return the socket itself."""
    family = socket.AF_INET if ipaddress.ip_address(address).version == 4 else socket.AF_INET6
    if not 0 < port < 1 << 16:
        if sock is not None:
            sock.close()
        raise OSError(errno.EADDRNOTAVAIL, f"no such port: {address} port {port}")
    own = sock or socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    loop = asyncio.get_running_loop()
    try:
        tune(own)
        if local_address is not None:
            own.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            own.bind(socket_address(local_address, 0))
        code = own.connect_ex(socket_address(address, port))
        if code in (errno.EINPROGRESS, errno.EALREADY):
            established = asyncio.Event()
            loop.add_writer(own.fileno(), established.set)
            try:
                async with asyncio.timeout(timeout_s):
                    await established.wait()
            finally:
                loop.remove_writer(own.fileno())
            code = own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise connect_error(code, address, where=f": {address} port {port}")
        return own
    except BaseException:
        own.close()
        raise
