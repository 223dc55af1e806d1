"""Clients that talk to the TURN server over UDP: a socket they all share, and an allocation for those that have one.

Whoever has no allocation leaves nothing behind here: every answer comes from the request and the nonce in it alone.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from turnreg.server.allocation import Drop, FiveTuple, Refusal
from turnreg.server.datagrams import PAYLOAD_MESSAGES, Ancillary, Arrived, DatagramSocket
from turnreg.server.framing import parse_channel_data
from turnreg.server.live_allocation import LiveAllocation, ServerState, text_of
from turnreg.server.pace import AnswerRate
from turnreg.server.relayed_datagrams import RelayedDatagrams
from turnreg.server.transaction import Step
from turnreg.stun.auth import client_key
from turnreg.stun.message import MAX_INDICATION_BYTES, TRANSPORT_UDP, Message, StunError

log = logging.getLogger(__name__)

REFUSED_LOG_INTERVAL_S = 1.0
"""Refused requests are logged once a second, with their number: a source address can be forged, a log fills up."""


class DatagramClients:
    """Serves the clients of one UDP listener. Cancelling `serve` ends their allocations."""

    def __init__(self, sock: DatagramSocket, meeting: ServerState, rate: AnswerRate) -> None:
        self._sock = sock
        self._meeting = meeting
        self._rate = rate
        self._clock = asyncio.get_running_loop().time
        self._clients: dict[FiveTuple, _Client] = {}
        self._refused = 0
        self._refused_logged = -REFUSED_LOG_INTERVAL_S

    async def serve(self) -> None:
        """Answer and relay until cancelled or closed."""
        try:
            async with asyncio.TaskGroup() as group:
                while not self._sock.closed:
                    await self._sock.readable()
                    while not self._sock.quantum.used_up:
                        arrived = self._sock.receive()
                        if arrived is None:
                            break
                        is_payload = arrived.data[:1] >= b"\x40"  # ChannelData: STUN begins with two zero bits
                        self._sock.quantum.spend(len(arrived.data), PAYLOAD_MESSAGES if is_payload else 1)
                        try:
                            self._take(arrived, group)
                        except Exception:  # one datagram must not end what serves all the others
                            log.exception("turn_datagram_error", extra={"event": {"client": text_of(arrived.source)}})
        except* OSError:
            pass  # closed
        finally:
            self._sock.close()

    def close(self) -> None:
        """Stop taking datagrams."""
        self._sock.close()

    def _take(self, arrived: Arrived, group: asyncio.TaskGroup) -> None:
        data, meeting, now = arrived.data, self._meeting, self._clock()
        five_tuple = FiveTuple(arrived.source, arrived.local, TRANSPORT_UDP)
        client = self._clients.get(five_tuple)
        try:
            if data and data[0] & 0xC0 == 0x40:
                where = meeting.transactions.channel_data(five_tuple, *parse_channel_data(data), now)
                if isinstance(where, Drop) or client is None:
                    meeting.metrics.dropped(where if isinstance(where, Drop) else Drop.NO_ALLOCATION)
                else:
                    client.datagrams.send(where)
                return
            message = Message.parse(data, MAX_INDICATION_BYTES)
        except StunError:
            meeting.metrics.dropped(Drop.NOT_STUN)
            return
        step = meeting.transactions.respond(five_tuple, message, now=now, unix_now=time.time())
        if step.datagram is not None and client is not None:
            client.datagrams.send(step.datagram)
        elif step.dropped is not None:
            meeting.metrics.dropped(step.dropped)
        else:
            self._answer(step, arrived, five_tuple, group)

    def _answer(self, step: Step, arrived: Arrived, five_tuple: FiveTuple, group: asyncio.TaskGroup) -> None:
        if step.opening is not None:
            made = self._meeting.open_datagrams(step.opening)
            if isinstance(made, Step):
                step = made
            else:
                holding, sock, answer = made
                datagrams = RelayedDatagrams(holding.allocation, sock, self._meeting, padded=False)
                self._clients[five_tuple] = client = _Client(holding, datagrams, arrived.reply)
                task = group.create_task(self._hold(five_tuple, client))
                task.add_done_callback(lambda _: client.end(self._clients, five_tuple))
                step = Step(answer=answer)
        if step.refusal is not None:
            self._refuse(five_tuple, step.refusal)
        if step.answer is not None:
            if step.unproven and not self._rate.allow(five_tuple.client[0], self._clock(), client_key):
                self._meeting.metrics.dropped(Drop.ANSWER_RATE)
            else:
                drop = self._sock.answer(step.answer, arrived.reply)
                if drop is not None:
                    self._meeting.metrics.dropped(drop)
        if step.ended is not None and five_tuple in self._clients:
            client = self._clients[five_tuple]
            client.reason = "given_back"
            client.end(self._clients, five_tuple)

    async def _hold(self, five_tuple: FiveTuple, client: "_Client") -> None:
        """Keep an allocation until it is given back or its time is over."""
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(client.datagrams.serve(lambda frames: self._deliver(frames, client.reply)))
            while not client.ended.is_set():
                try:
                    async with asyncio.timeout_at(client.holding.allocation.expires_at):
                        await client.ended.wait()
                except TimeoutError:
                    if client.holding.allocation.expires_at <= self._clock():
                        client.reason = "expired"
                        client.end(self._clients, five_tuple)
            serving.cancel()

    async def _deliver(self, frames: Sequence[bytes], reply: tuple[Any, Ancillary]) -> None:
        for frame in frames:
            drop = self._sock.answer(frame, reply)
            if drop is not None:
                self._meeting.metrics.dropped(drop)

    def _refuse(self, five_tuple: FiveTuple, why: Refusal) -> None:
        self._meeting.metrics.refused(why)
        if why in (Refusal.NO_CREDENTIALS, Refusal.STALE_NONCE):
            return  # those two belong to every client's life
        self._refused += 1
        if self._clock() >= self._refused_logged + REFUSED_LOG_INTERVAL_S:
            event = {"client": text_of(five_tuple.client), "reason": why.value, "refused": self._refused}
            log.info("turn_refused", extra={"event": event})
            self._refused, self._refused_logged = 0, self._clock()


class _Client:
    """A client with an allocation."""

    def __init__(self, holding: LiveAllocation, datagrams: RelayedDatagrams, reply: tuple[Any, Ancillary]) -> None:
        self.holding = holding
        self.datagrams = datagrams
        self.reply = reply
        self.reason = "server_stopped"
        self.ended = asyncio.Event()

    def end(self, clients: dict[FiveTuple, "_Client"], five_tuple: FiveTuple) -> None:
        """End the allocation, once."""
        if not self.ended.is_set():
            self.ended.set()
            del clients[five_tuple]
            self.holding.end(self.reason)
