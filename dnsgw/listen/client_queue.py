"""Packets that come faster than they are answered, queued by client and served round-robin.

A socket has one queue in the kernel, and the client that sends most fills most of it. Reading packets is far cheaper than
answering them. So under a flood all are read and sorted by client, and a client's excess is dropped before it crowds out the
others. Sans-IO.
"""

from collections import deque
from typing import TypeAlias

from dnsgw.client_limits import Client

MAX_EACH = 2048  # waiting packets of one client: more than the kernel queues for all, so no burst is lost here
MAX_ALL = 8192

Packet: TypeAlias = tuple[bytes, bytes, bytes]
"""The packet, the client's address, and where the reply goes."""


class ClientQueue:
    """Waiting packets."""

    __slots__ = ("_queues", "_size", "dropped")

    def __init__(self) -> None:
        """Start with an empty queue."""
        self._queues: dict[Client, deque[Packet]] = {}
        self._size = 0
        self.dropped = 0
        """Packets dropped so far."""

    def __len__(self) -> int:
        return self._size

    def put(self, client: Client, packet: Packet) -> None:
        """Add a packet, or drop it if its client has too many here, or all clients together have."""
        queue = self._queues.get(client)
        if self._size >= MAX_ALL or (queue is not None and len(queue) >= MAX_EACH):
            self.dropped += 1
            return
        if queue is None:
            queue = self._queues[client] = deque()
        queue.append(packet)
        self._size += 1

    def take(self) -> Packet:
        """Remove and return the next packet. Raises StopIteration when there is none."""
        client = next(iter(self._queues))
        queue = self._queues.pop(client)
        packet = queue.popleft()
        if queue:
            self._queues[client] = queue  # behind the others
        self._size -= 1
        return packet
