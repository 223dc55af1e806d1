"""Packets that came faster than they are answered, by client: each client's turn comes once before anybody's comes again.

One socket has one queue in the kernel, and whoever sends the most has most of it. Taking packets out is far cheaper than
answering them, so that under a flood all are taken out, sorted by who sent them, and what one client has too much of is
dropped before it crowds out the others. Sans-IO.
"""

from collections import deque
from typing import TypeAlias

from dnsgw.client_limits import Client

MAX_EACH = 2048  # packets of one client that wait: more than the kernel keeps for all, so that no burst is lost here
MAX_ALL = 8192

Packet: TypeAlias = tuple[bytes, bytes, bytes]
"""What came, the address it came from, and where its reply goes."""


class ClientQueue:
    """What waits."""

    __slots__ = ("_queues", "_size", "dropped")

    def __init__(self) -> None:
        """Start with an empty queue."""
        self._queues: dict[Client, deque[Packet]] = {}
        self._size = 0
        self.dropped = 0

    def __len__(self) -> int:
        return self._size

    def put(self, client: Client, packet: Packet) -> None:
        """Have this wait, or drop it if this client has too much here, or all have."""
        queue = self._queues.get(client)
        if self._size >= MAX_ALL or (queue is not None and len(queue) >= MAX_EACH):
            self.dropped += 1
            return
        if queue is None:
            queue = self._queues[client] = deque()
        queue.append(packet)
        self._size += 1

    def take(self) -> Packet:
        """The next one. Raises StopIteration when there is none."""
        client = next(iter(self._queues))
        queue = self._queues.pop(client)
        packet = queue.popleft()
        if queue:
            self._queues[client] = queue  # behind the others
        self._size -= 1
        return packet
