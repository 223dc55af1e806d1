"""The relayed port of one UDP allocation: datagrams from peers are framed for the client, and the client's are sent to peers."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence

from turnreg.server.allocation import Allocation, Drop
from turnreg.server.datagrams import PAYLOAD_MESSAGES, DatagramSocket
from turnreg.server.framing import pack_channel_data
from turnreg.server.live_allocation import ServerState
from turnreg.server.outcome import Relay
from turnreg.stun.message import TRANSACTION_ID_BYTES, StunError, data_indication

Deliver = Callable[[Sequence[bytes]], Awaitable[None]]
"""Sends whole framed datagrams to the client. Raises OSError if the client is lost."""


class RelayedDatagrams:
    """Relays the datagrams of one allocation. Cancelling `serve` closes the port.

    While a client on a stream does not read, nothing is read from peers either: datagrams that do not fit into the kernel's buffer
    are dropped.
    """

    def __init__(self, allocation: Allocation, sock: DatagramSocket, state: ServerState, *, padded: bool) -> None:
        """`padded`: the client uses a stream, where ChannelData is padded to a multiple of four bytes."""
        self._allocation = allocation
        self._sock = sock
        self._state = state
        self._padded = padded
        self._clock = asyncio.get_running_loop().time

    async def serve(self, deliver: Deliver) -> None:
        """Relay datagrams from peers to the client, until cancelled or the client is lost."""
        try:
            while True:
                await self._sock.readable()
                frames = self._take()
                if frames:
                    await deliver(frames)
        except OSError:
            pass  # the session notices it too
        finally:
            self._sock.close()

    def _take(self) -> list[bytes]:
        allocation, metrics, now = self._allocation, self._state.metrics, self._clock()
        frames = []
        while not self._sock.quantum.used_up:
            arrived = self._sock.receive()
            if arrived is None:
                break
            self._sock.quantum.spend(len(arrived.data), PAYLOAD_MESSAGES)
            peer, data = arrived.source, arrived.data
            if not allocation.permits(peer[0], now):
                metrics.dropped(Drop.NO_PERMISSION)
                continue
            if allocation.pace is not None and not allocation.pace.admit(len(data), now):
                metrics.dropped(Drop.PACE)
                continue
            channel = allocation.channel_to(peer, now)
            if channel is not None:
                frames.append(pack_channel_data(channel, data, padded=self._padded))
            else:
                try:
                    transaction_id = secrets.token_bytes(TRANSACTION_ID_BYTES)
                    frames.append(data_indication(peer, data, transaction_id, fingerprint=allocation.fingerprint))
                except StunError:
                    metrics.dropped(Drop.UNSENDABLE)
                    continue
            allocation.to_client += len(data)
            metrics.datagram_to_client(len(data))
        return frames

    def send(self, datagram: Relay) -> None:
        """Send a datagram from the client to its peer, or drop it."""
        allocation, metrics = self._allocation, self._state.metrics
        size = len(datagram.data)
        if allocation.pace is not None and not allocation.pace.admit(size, self._clock()):
            metrics.dropped(Drop.PACE)
            return
        drop = self._sock.send(datagram.data, datagram.peer, dont_fragment=datagram.dont_fragment)
        if drop is not None:
            metrics.dropped(drop)
            return
        allocation.to_peer += size
        metrics.datagram_to_peer(size)
