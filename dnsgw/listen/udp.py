"""Questions over UDP: one raw socket per listening address, drained whenever it is readable, in batches where that goes.

A socket on a wildcard address asks the kernel for the address that each packet came to (RFC 3542 section 6.2 and its IPv4
likeness) and answers from that one: a host with several addresses would else answer from whichever its routes prefer, and
clients drop that. A socket on one address is spared the cost.
"""

import asyncio
import socket
import struct
from typing import Any

from dnsgw.client_limits import client_of, packed
from dnsgw.listen.batch import MAX_QUERY, SLOTS, Batch, available
from dnsgw.listen.client_queue import ClientQueue
from dnsgw.metrics import DnsMetrics, Outcome
from dnsgw.resolver import Resolver
from dnsgw.upstream.host_resolvers import Endpoint

MAX_DRAIN = 64  # packets before the loop sees to something else
MAX_SORTED = 8  # batches that are taken out and sorted by client meanwhile
_RECEIVE_BUFFER = 1 << 20  # asked for; the kernel gives what net.core.rmem_max allows

_IP_PKTINFO = 8  # linux/in.h; the socket module has it from Python 3.12 on
_PKTINFO4 = struct.Struct("=I4s4s")  # interface, local address, destination (ip(7))
_PKTINFO6 = struct.Struct("=16sI")  # destination, interface
_SPACE = socket.CMSG_SPACE(_PKTINFO6.size)


class UdpListener:
    """One UDP socket and the way its replies go."""

    def __init__(
        self,
        endpoint: Endpoint,
        resolver: Resolver,
        metrics: DnsMetrics,
        *,
        reuse_port: bool = False,
        batches: bool = True,
    ) -> None:
        """Bind. Raises OSError.

        Args:
            reuse_port: other processes may bind the same address, and the kernel shares the clients out among them.
            batches: read and write many packets in one system call, where the kernel can; else one at a time.
        """
        address, port = endpoint
        self._resolver = resolver
        self._metrics = metrics
        self._wildcard = address.is_unspecified
        self._v6 = address.version == 6
        self._sock = socket.socket(
            socket.AF_INET6 if self._v6 else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        )
        try:
            if self._v6:
                self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if self._wildcard and self._v6:
                self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            elif self._wildcard:
                self._sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            if reuse_port:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._sock.bind((str(address), port))
        except OSError:
            self._sock.close()
            raise
        self._batch: Batch | None = None
        if batches and available(self._sock):
            self._batch = Batch(self._sock, v6=self._v6, wildcard=self._wildcard)
        self._crowd = ClientQueue()
        self._again: asyncio.Handle | None = None
        self._flush_at: asyncio.Handle | None = None
        self._reading = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to answer."""
        self._loop = loop
        if self._batch is not None:
            loop.add_reader(self._sock, self._drain_batch, self._batch)
        else:
            loop.add_reader(self._sock, self._drain_wildcard if self._wildcard else self._drain)

    def close(self) -> None:
        """Close the socket; replies that come later are dropped."""
        if self._batch is not None and self._loop is not None:
            self._flush(self._batch)
        for handle in (self._flush_at, self._again):
            if handle is not None:
                handle.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._sock)
            self._loop = None
        self._sock.close()

    def _drain_batch(self, batch: Batch) -> None:
        if self._crowd:
            self._sort(batch)
            return
        self._reading = True
        try:
            full = batch.receive(self._handle) == SLOTS
        finally:
            self._reading = False
            if batch.waiting:
                self._flush(batch)
        if full:
            self._sort(batch)

    def _sort(self, batch: Batch) -> None:
        """Take out what comes faster than it is answered, and see to it that each client has its turn."""
        for _ in range(MAX_SORTED):
            if batch.receive(self._put_aside) < SLOTS:
                break
        if self._crowd and self._again is None and self._loop is not None:
            self._again = self._loop.call_soon(self._go_on, batch)

    def _go_on(self, batch: Batch) -> None:
        """Handle some of what was put aside."""
        self._again = None
        self._reading = True
        crowd = self._crowd
        try:
            for _ in range(min(len(crowd), MAX_DRAIN)):
                self._handle(*crowd.take())
        finally:
            self._reading = False
            if batch.waiting:
                self._flush(batch)
        if crowd and self._loop is not None:
            self._again = self._loop.call_soon(self._go_on, batch)

    def _put_aside(self, data: bytes, host: bytes, where: bytes) -> None:
        before = self._crowd.dropped
        self._crowd.put(client_of(host), (data, host, where))
        self._metrics.queries[Outcome.CROWDED] += self._crowd.dropped - before

    def _handle(self, data: bytes, host: bytes, where: bytes) -> None:
        self._resolver.handle(data, host, self._put, where, False)

    def _put(self, reply: bytes, where: Any) -> None:
        batch = self._batch
        if not reply or batch is None or self._loop is None:
            return
        unsent = batch.put(reply, where)
        if unsent:
            self._metrics.queries[Outcome.UNSENT] += unsent
        if not self._reading and self._flush_at is None:  # an answer that came later; others may come with it
            self._flush_at = self._loop.call_soon(self._flush, batch)

    def _flush(self, batch: Batch) -> None:
        self._flush_at = None
        unsent = batch.flush()
        if unsent:
            self._metrics.queries[Outcome.UNSENT] += unsent

    def _drain(self) -> None:
        receive, handle, send = self._sock.recvfrom, self._resolver.handle, self._send
        for _ in range(MAX_DRAIN):
            try:
                data, peer = receive(MAX_QUERY)
            except OSError:  # nothing left, most of the time; an error of the socket is told once and then over
                return
            handle(data, packed(peer[0]), send, peer, False)

    def _send(self, reply: bytes, peer: Any) -> None:
        if reply:
            try:
                self._sock.sendto(reply, peer)
            except OSError:
                self._metrics.queries[Outcome.UNSENT] += 1

    def _drain_wildcard(self) -> None:
        receive, handle, send = self._sock.recvmsg, self._resolver.handle, self._send_from
        for _ in range(MAX_DRAIN):
            try:
                data, ancillary, _, peer = receive(MAX_QUERY, _SPACE)
            except OSError:
                return
            handle(data, packed(peer[0]), send, (ancillary, peer), False)

    def _send_from(self, reply: bytes, where: Any) -> None:
        if reply:
            ancillary, peer = where
            try:
                self._sock.sendmsg((reply,), [_source(*item) for item in ancillary], 0, peer)
            except OSError:
                self._metrics.queries[Outcome.UNSENT] += 1


def _source(level: int, kind: int, data: bytes) -> tuple[int, int, bytes]:
    """Turn where a packet came to into where its reply comes from, by whichever interface the routes say."""
    if level == socket.IPPROTO_IP:
        _, local, _ = _PKTINFO4.unpack(data)
        return level, kind, _PKTINFO4.pack(0, local, b"")
    address, interface = _PKTINFO6.unpack(data)
    link_local = address[0] == 0xFE and address[1] & 0xC0 == 0x80
    return level, kind, _PKTINFO6.pack(address, interface if link_local else 0)
