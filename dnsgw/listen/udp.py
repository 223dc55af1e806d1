"""Questions over UDP: one raw socket per listening address, drained whenever it is readable, in batches if possible.

A socket on a wildcard address asks the kernel for the local address of each packet (RFC 3542 section 6.2, and IP_PKTINFO for
IPv4) and replies from it. Otherwise a host with several addresses would reply from the one that its routes prefer, and clients
drop such replies. A socket on one address does not pay for that.
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
from sniproxy.engine.socket_address import socket_address

MAX_DRAIN = 64  # packets per callback, so that the loop can do other work
MAX_SORTED = 8  # batches that are read and sorted by client per callback
_RECEIVE_BUFFER = 1 << 20  # requested; the kernel caps it at net.core.rmem_max

_IP_PKTINFO = 8  # linux/in.h; the socket module has it from Python 3.12 on
_PKTINFO4 = struct.Struct("=I4s4s")  # interface, local address, destination (ip(7))
_PKTINFO6 = struct.Struct("=16sI")  # destination, interface
_SPACE = socket.CMSG_SPACE(_PKTINFO6.size)


class UdpListener:
    """One UDP socket."""

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
            endpoint: address and port; port 0: any.
            resolver: answers the questions.
            metrics: counts dropped questions and unsent replies.
            reuse_port: other processes may bind the same address; the kernel distributes the clients among them.
            batches: read and write many packets in one system call, if the kernel can.
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
            self._sock.bind(socket_address(address, port))
        except OSError:
            self._sock.close()
            raise
        self._batch: Batch | None = None
        if batches and available(self._sock):
            self._batch = Batch(self._sock, v6=self._v6, wildcard=self._wildcard)
        self._queue = ClientQueue()
        self._again: asyncio.Handle | None = None
        self._flush_at: asyncio.Handle | None = None
        self._reading = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer questions."""
        self._loop = loop
        if self._batch is not None:
            loop.add_reader(self._sock, self._drain_batch, self._batch)
        else:
            loop.add_reader(self._sock, self._drain_wildcard if self._wildcard else self._drain)

    def close(self) -> None:
        """Close the socket; later replies are dropped."""
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
        if self._queue:
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
        """Read packets that come faster than they are answered, and queue them by client."""
        for _ in range(MAX_SORTED):
            if batch.receive(self._put_aside) < SLOTS:
                break
        if self._queue and self._again is None and self._loop is not None:
            self._again = self._loop.call_soon(self._handle_queued, batch)

    def _handle_queued(self, batch: Batch) -> None:
        """Handle some of the queued packets."""
        self._again = None
        self._reading = True
        queue = self._queue
        try:
            for _ in range(min(len(queue), MAX_DRAIN)):
                self._handle(*queue.take())
        finally:
            self._reading = False
            if batch.waiting:
                self._flush(batch)
        if queue and self._loop is not None:
            self._again = self._loop.call_soon(self._handle_queued, batch)

    def _put_aside(self, data: bytes, host: bytes, where: bytes) -> None:
        before = self._queue.dropped
        self._queue.put(client_of(host), (data, host, where))
        self._metrics.queries[Outcome.CROWDED] += self._queue.dropped - before

    def _handle(self, data: bytes, host: bytes, where: bytes) -> None:
        self._resolver.handle(data, host, self._put, where, False)

    def _put(self, reply: bytes, where: Any) -> None:
        batch = self._batch
        if not reply or batch is None or self._loop is None:
            return
        unsent = batch.put(reply, where)
        if unsent:
            self._metrics.queries[Outcome.UNSENT] += unsent
        if not self._reading and self._flush_at is None:  # a later answer; others may come in the same pass
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
            except OSError:  # usually there is no more; an error of the socket is reported once and then cleared
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
    """Turn the local address of a question into the source of its reply, through the interface that the routes choose."""
    if level == socket.IPPROTO_IP:
        _, local, _ = _PKTINFO4.unpack(data)
        return level, kind, _PKTINFO4.pack(0, local, b"")
    address, interface = _PKTINFO6.unpack(data)
    link_local = address[0] == 0xFE and address[1] & 0xC0 == 0x80
    return level, kind, _PKTINFO6.pack(address, interface if link_local else 0)
