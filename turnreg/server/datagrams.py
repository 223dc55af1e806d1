"""UDP sockets of the listener and of allocations. Nothing is queued in memory: what the kernel does not accept is dropped."""

import asyncio
import errno
import ipaddress
import socket
import struct
from typing import Any, NamedTuple

from sniproxy.engine.quantum import Quantum
from sniproxy.engine.socket_stream import plain_address
from turnreg.server.allocation import Drop, Endpoint

PAYLOAD_MESSAGES = 0.125
"""Cost of relaying one datagram relative to handling a STUN request: a socket relays 64 of them in one quantum."""

_LARGEST = 65_536
_DONT_FRAGMENT = {socket.AF_INET: (socket.IPPROTO_IP, 10), socket.AF_INET6: (socket.IPPROTO_IPV6, 23)}
"""IP_MTU_DISCOVER and IPV6_MTU_DISCOVER of Linux, which Python's socket module does not define."""
_PMTUDISC_DONT, _PMTUDISC_PROBE = 0, 3
_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50

Ancillary = list[tuple[int, int, bytes]]


class Arrived(NamedTuple):
    """A received datagram."""

    data: bytes
    source: Endpoint
    local: Endpoint
    """The address and port that it was sent to."""
    reply: tuple[Any, Ancillary]
    """Argument for `answer`, so that the answer is sent from there."""


class DatagramSocket:
    """A bound UDP socket on the running loop. An IPv6 socket receives only IPv6.

    A reader must spend from `quantum` for each datagram, and await `readable` again when the quantum is used up.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._fd = sock.fileno()
        self._waiter: asyncio.Future[None] | None = None
        self._watched = False
        self._buffer = memoryview(bytearray(_LARGEST))
        self._fragments = True
        self.quantum = Quantum()
        self.closed = False
        name = sock.getsockname()
        self.address: Endpoint = (plain_address(name[0]), name[1])
        self._anywhere = ipaddress.ip_address(self.address[0]).is_unspecified
        level, option = _DONT_FRAGMENT[socket.AddressFamily(sock.family)]
        sock.setsockopt(level, option, _PMTUDISC_DONT)
        if self._anywhere:  # an answer must be sent from the address that the request was sent to
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)

    @classmethod
    def open(cls, address: str, port: int) -> "DatagramSocket":
        """Make a socket bound to an IP literal. Raises OSError, which names address and port."""
        family = socket.AF_INET if ipaddress.ip_address(address).version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port))
            return cls(sock)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot use {address} UDP port {port}: {error.strerror}") from error

    async def readable(self) -> None:
        """Wait until there may be a datagram and it is our turn. Raises OSError if the socket is closed."""
        if self.quantum.used_up:
            await self.quantum.renew()
        if self.closed:
            raise OSError(errno.EBADF, "closed on our side")
        self._waiter = waiter = self._loop.create_future()
        if not self._watched:
            self._loop.add_reader(self._fd, self._on_readable)
            self._watched = True
        try:
            await waiter
        finally:
            self._waiter = None
        self.quantum.waited()

    def _on_readable(self) -> None:
        if self._waiter is None:
            self._loop.remove_reader(self._fd)
            self._watched = False
        elif not self._waiter.done():
            self._waiter.set_result(None)

    def receive(self) -> Arrived | None:
        """Receive one datagram; None if there is none."""
        while not self.closed:
            try:
                if self._anywhere:
                    return self._receive_anywhere()
                size, name = self._sock.recvfrom_into(self._buffer)
            except BlockingIOError:
                return None
            except OSError:
                continue  # an ICMP error for an earlier datagram
            return Arrived(bytes(self._buffer[:size]), (plain_address(name[0]), name[1]), self.address, (name, []))
        return None

    def _receive_anywhere(self) -> Arrived:
        size, ancillary, _, name = self._sock.recvmsg_into([self._buffer], 64)
        local, reply = self.address[0], Ancillary()
        for level, kind, value in ancillary:
            if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO) and len(value) == 12:
                _, chosen, _ = struct.unpack("=I4s4s", value)
                local = socket.inet_ntop(socket.AF_INET, chosen)
                reply.append((level, kind, struct.pack("=I4s4s", 0, chosen, bytes(4))))
            elif (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO) and len(value) == 20:
                local = socket.inet_ntop(socket.AF_INET6, value[:16])
                reply.append((level, kind, value))
        endpoint = (plain_address(name[0]), name[1])
        return Arrived(bytes(self._buffer[:size]), endpoint, (plain_address(local), self.address[1]), (name, reply))

    def answer(self, data: bytes, reply: tuple[Any, Ancillary]) -> Drop | None:
        """Answer a datagram, with its source and destination swapped. Returns why the answer was dropped, or None."""
        try:
            if reply[1]:
                self._sock.sendmsg((data,), reply[1], 0, reply[0])
            else:
                self._sock.sendto(data, reply[0])
        except BlockingIOError:
            return Drop.FULL
        except OSError:
            return Drop.UNSENDABLE
        return None

    def send(self, data: bytes, peer: Endpoint, *, dont_fragment: bool = False) -> Drop | None:
        """Send to a peer. Returns why the datagram was dropped, or None."""
        try:
            if dont_fragment == self._fragments:
                level, option = _DONT_FRAGMENT[socket.AddressFamily(self._sock.family)]
                self._sock.setsockopt(level, option, _PMTUDISC_PROBE if dont_fragment else _PMTUDISC_DONT)
                self._fragments = not dont_fragment
            self._sock.sendto(data, peer)
        except BlockingIOError:
            return Drop.FULL
        except OSError:
            return Drop.UNSENDABLE
        return None

    def close(self) -> None:
        """Close the socket. A pending `readable` raises OSError."""
        if self.closed:
            return
        self.closed = True
        if self._watched:
            self._loop.remove_reader(self._fd)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(OSError(errno.EBADF, "closed on our side"))
        self._sock.close()
