"""Clients of the TURN server over UDP: one socket for all of them, and state for those with an allocation.

A client without an allocation leaves no state here: its answers depend only on the request and the nonce in it.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, assert_never

from turnreg.server.allocation import Drop, Endpoint, FiveTuple, Refusal
from turnreg.server.datagrams import PAYLOAD_MESSAGES, Ancillary, Arrived, DatagramSocket
from turnreg.server.framing import parse_channel_data
from turnreg.server.live_allocation import LiveAllocation, Opened, ServerState, text_of
from turnreg.server.outcome import Close, Connect, GiveBack, Ignore, Join, Open, Outcome, Relay, Reply
from turnreg.server.pace import AnswerRate
from turnreg.server.relayed_datagrams import RelayedDatagrams
from turnreg.stun.auth import client_key
from turnreg.stun.message import MAX_INDICATION_BYTES, TRANSPORT_UDP, Message, StunError

log = logging.getLogger(__name__)

REFUSED_LOG_INTERVAL_S = 1.0
"""Refused requests are logged once in this time, with their number: source addresses can be forged, and would fill the log."""


class DatagramClients:
    """Serves the clients of one UDP listener. Cancelling `serve` ends their allocations."""

    def __init__(self, sock: DatagramSocket, state: ServerState, rate: AnswerRate) -> None:
        self._sock = sock
        self._state = state
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
                        except Exception:  # an error with one datagram must not end the service for all clients
                            log.exception("turn_datagram_error", extra={"event": {"client": text_of(arrived.source)}})
        except* OSError:
            pass  # closed
        finally:
            self._sock.close()

    def close(self) -> None:
        """Stop receiving datagrams."""
        self._sock.close()

    def _take(self, arrived: Arrived, group: asyncio.TaskGroup) -> None:
        data, transactions, now = arrived.data, self._state.transactions, self._clock()
        five_tuple = FiveTuple(arrived.source, arrived.local, TRANSPORT_UDP)
        outcome: Outcome
        try:
            if data and data[0] & 0xC0 == 0x40:
                outcome = transactions.channel_data(five_tuple, *parse_channel_data(data), now)
            else:
                message = Message.parse(data, MAX_INDICATION_BYTES)
                outcome = transactions.respond(five_tuple, message, now=now, unix_now=time.time())
        except StunError:
            outcome = Drop.NOT_STUN
        match outcome:
            case Relay():
                client = self._clients.get(five_tuple)
                if client is None:  # its allocation is just ending
                    self._state.metrics.dropped(Drop.NO_ALLOCATION)
                else:
                    client.datagrams.send(outcome)
            case Drop():
                self._state.metrics.dropped(outcome)
            case Reply():
                self._reply(outcome, arrived)
            case Close(reply=reply):
                self._reply(reply, arrived)  # UDP has no connection to close
            case Open():
                self._reply(self._open(outcome, arrived, group), arrived)
            case GiveBack(answer=answer):
                self._reply(Reply(answer=answer), arrived)
                client = self._clients.get(five_tuple)
                if client is not None:
                    client.reason = "given_back"
                    client.end(self._clients, five_tuple)
            case Ignore() | Join() | Connect():
                pass  # `respond` never returns the last two for UDP
            case _:
                assert_never(outcome)

    def _open(self, opening: Open, arrived: Arrived, group: asyncio.TaskGroup) -> Reply:
        match self._state.open_datagrams(opening):
            case Reply() as refused:
                return refused
            case Opened(live=live, port=sock, answer=answer):
                datagrams = RelayedDatagrams(live.allocation, sock, self._state, padded=False)
                five_tuple = opening.five_tuple
                self._clients[five_tuple] = client = _Client(live, datagrams, arrived.reply)
                task = group.create_task(self._hold(five_tuple, client))
                task.add_done_callback(lambda _: client.end(self._clients, five_tuple))
                return Reply(answer=answer)

    def _reply(self, reply: Reply, arrived: Arrived) -> None:
        if reply.refusal is not None:
            self._refuse(arrived.source, reply.refusal)
        if reply.unproven and not self._rate.allow(arrived.source[0], self._clock(), client_key):
            self._state.metrics.dropped(Drop.ANSWER_RATE)
            return
        drop = self._sock.answer(reply.answer, arrived.reply)
        if drop is not None:
            self._state.metrics.dropped(drop)

    async def _hold(self, five_tuple: FiveTuple, client: "_Client") -> None:
        """Serve an allocation until it is deleted or expires."""
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(client.datagrams.serve(lambda frames: self._deliver(frames, client.reply)))
            while not client.ended.is_set():
                try:
                    async with asyncio.timeout_at(client.live.allocation.expires_at):
                        await client.ended.wait()
                except TimeoutError:
                    if client.live.allocation.expires_at <= self._clock():
                        client.reason = "expired"
                        client.end(self._clients, five_tuple)
            serving.cancel()

    async def _deliver(self, frames: Sequence[bytes], reply: tuple[Any, Ancillary]) -> None:
        for frame in frames:
            drop = self._sock.answer(frame, reply)
            if drop is not None:
                self._state.metrics.dropped(drop)

    def _refuse(self, client: Endpoint, why: Refusal) -> None:
        self._state.metrics.refused(why)
        if why in (Refusal.NO_CREDENTIALS, Refusal.STALE_NONCE):
            return  # part of every client's normal requests
        self._refused += 1
        if self._clock() >= self._refused_logged + REFUSED_LOG_INTERVAL_S:
            event = {"client": text_of(client), "reason": why.value, "refused": self._refused}
            log.info("turn_refused", extra={"event": event})
            self._refused, self._refused_logged = 0, self._clock()


class _Client:
    """A client with an allocation."""

    def __init__(self, live: LiveAllocation, datagrams: RelayedDatagrams, reply: tuple[Any, Ancillary]) -> None:
        self.live = live
        self.datagrams = datagrams
        self.reply = reply
        self.reason = "server_stopped"
        self.ended = asyncio.Event()

    def end(self, clients: dict[FiveTuple, "_Client"], five_tuple: FiveTuple) -> None:
        """End the allocation, once."""
        if not self.ended.is_set():
            self.ended.set()
            del clients[five_tuple]
            self.live.end(self.reason)
