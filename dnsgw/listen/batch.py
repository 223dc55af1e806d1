"""Many datagrams in one system call: recvmmsg(2) and sendmmsg(2) through ctypes, with buffers that are allocated once.

The kernel accounts for half the cost of an answer; one system call for many packets saves a third of it (measured: from 10 µs
per question down to 6.8). The structures are those of 64-bit Linux, the same with glibc and musl. Elsewhere, and where the kernel
lacks the calls, as some sandboxes do, `available` returns False.
"""

import ctypes
import errno
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

SLOTS = 64  # packets per system call
MAX_QUERY = 4096  # a question needs at most 512 bytes; the rest is for options
MAX_REPLY = 1232
_NAME, _CONTROL = 32, 48  # bytes for the peer's address, and for control data with the local address
_MSGHDR = struct.Struct("=QI4xQQQQi4xI4x")  # mmsghdr: name, its size, iovec, 1, control, its size, flags, length
_IOVEC = struct.Struct("=QQ")
_WORDS = _MSGHDR.size // 4
_LONGS = _MSGHDR.size // 8
_NAME4, _NAME6 = 16, 28  # sockaddr_in, sockaddr_in6
_CONTROL4, _CONTROL6 = socket.CMSG_SPACE(12), socket.CMSG_SPACE(20)  # in_pktinfo, in6_pktinfo
_CMSG = 16  # a cmsghdr


def _library() -> Any:
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return None
    library = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the calls never block, so they need not release the GIL
    if not hasattr(library, "recvmmsg") or not hasattr(library, "sendmmsg"):
        return None
    address = ctypes.c_void_p
    library.recvmmsg.argtypes = (ctypes.c_int, address, ctypes.c_uint, ctypes.c_int, address)
    library.sendmmsg.argtypes = (ctypes.c_int, address, ctypes.c_uint, ctypes.c_int)
    return library


_LIBRARY = _library()


class _Slots:
    """Buffers for packets, with all structures that the system calls point to."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = memoryview(bytearray(SLOTS * size))
        self.names = memoryview(bytearray(SLOTS * _NAME))
        self.controls = memoryview(bytearray(SLOTS * _CONTROL))
        iovecs = memoryview(bytearray(SLOTS * _IOVEC.size))
        headers = memoryview(bytearray(SLOTS * _MSGHDR.size))
        data, names, controls, vectors, self.address = map(
            _address_of, (self.data, self.names, self.controls, iovecs, headers)
        )
        for n in range(SLOTS):
            _IOVEC.pack_into(iovecs, n * _IOVEC.size, data + n * size, size)
            _MSGHDR.pack_into(
                headers,
                n * _MSGHDR.size,
                *(names + n * _NAME, _NAME, vectors + n * _IOVEC.size, 1, controls + n * _CONTROL, 0, 0, 0),
            )
        self.words = headers.cast("I")
        self.longs = headers.cast("Q")
        self.lengths = iovecs.cast("Q")


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def available(sock: socket.socket) -> bool:
    """Whether this socket can be read in batches on this system."""
    if _LIBRARY is None:
        return False
    return not (
        _LIBRARY.recvmmsg(sock.fileno(), None, 0, socket.MSG_DONTWAIT, None) < 0 and ctypes.get_errno() == errno.ENOSYS
    )


class Batch:
    """One UDP socket that is read and written many packets at a time.

    The addresses of a packet are one bytes object, `where`: the sender's sockaddr and, on a wildcard address, the control data
    with the local address. It is handed out with the packet and handed back with the reply.
    """

    def __init__(self, sock: socket.socket, *, v6: bool, wildcard: bool) -> None:
        """Allocate the buffers, some 350 kB. `wildcard`: the socket reports local addresses, and replies are sent from them."""
        self._sock = sock
        self._fd = sock.fileno()
        self._v6 = v6
        self._name = _NAME6 if v6 else _NAME4
        self._control = (_CONTROL6 if v6 else _CONTROL4) if wildcard else 0
        self._host = slice(8, 24) if v6 else slice(4, 8)
        self._in = _Slots(MAX_QUERY)
        self._out = _Slots(MAX_REPLY)
        for n in range(SLOTS):
            self._out.words[n * _WORDS + 2] = self._name
        self.waiting = 0
        """Replies that wait for `flush`."""

    def receive(self, handle: Callable[[bytes, bytes, bytes], None]) -> int:
        """Hand each waiting packet, up to 64, to `handle`, with its sender's packed address and its `where`.

        Returns their number; below 0 if there was none.
        """
        slots = self._in
        control = self._control
        if control:
            for n in range(SLOTS):  # the kernel has overwritten them
                slots.longs[n * _LONGS + 5] = _CONTROL
        count = _LIBRARY.recvmmsg(self._fd, slots.address, SLOTS, socket.MSG_DONTWAIT, None)
        words, data, names, host, name = slots.words, slots.data, slots.names, self._host, self._name
        begin, name_at, word = 0, 0, 14
        for n in range(count):  # below 0: usually there was none
            where = names[name_at : name_at + name].tobytes()
            packet = data[begin : begin + words[word]].tobytes()
            if control:
                where += slots.controls[n * _CONTROL : n * _CONTROL + slots.longs[n * _LONGS + 5]].tobytes()
            handle(packet, where[host], where)
            begin += MAX_QUERY
            name_at += _NAME
            word += _WORDS
        return int(count)

    def put(self, reply: bytes, where: bytes) -> int:
        """Add a reply to the batch, and flush it if it is full. Returns how many replies could not be sent."""
        n = self.waiting
        size = len(reply)
        if size > MAX_REPLY:
            return 1
        slots = self._out
        begin, name_at = n * MAX_REPLY, n * _NAME
        slots.data[begin : begin + size] = reply
        slots.lengths[2 * n + 1] = size
        slots.names[name_at : name_at + self._name] = where[: self._name]
        if self._control:
            self._say_source(n, where[self._name :])
        self.waiting = n + 1
        return self.flush() if self.waiting == SLOTS else 0

    def _say_source(self, n: int, control: bytes) -> None:
        """Send from the local address of the question, through the interface that the routes choose."""
        slots = self._out
        at = n * _CONTROL
        if len(control) < self._control:
            slots.longs[n * _LONGS + 5] = 0
            return
        if self._v6:
            link_local = control[_CMSG] == 0xFE and control[_CMSG + 1] & 0xC0 == 0x80
            interface = control[_CMSG + 16 : _CMSG + 20] if link_local else bytes(4)
            control = control[: _CMSG + 16] + interface + control[_CMSG + 20 :]
        else:
            # in_pktinfo: interface, local address, destination; the last is ignored when sending
            control = control[:_CMSG] + bytes(4) + control[_CMSG + 4 : _CMSG + 8] + bytes(8)
        slots.controls[at : at + self._control] = control[: self._control]
        slots.longs[n * _LONGS + 5] = self._control

    def flush(self) -> int:
        """Send the batch. Returns how many replies could not be sent."""
        failed = done = 0
        count, self.waiting = self.waiting, 0
        address = self._out.address
        while done < count:
            sent = _LIBRARY.sendmmsg(self._fd, address + done * _MSGHDR.size, count - done, socket.MSG_DONTWAIT)
            if sent <= 0:
                # The error concerns the first packet: its destination is invalid, or the send buffer is full.
                failed += 1
                sent = 1
            done += sent
        return failed
