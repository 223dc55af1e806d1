"""One client connection of the TURN server: a control connection, or a data connection once it is bound."""

import asyncio
import errno
import logging
import time
from collections.abc import Sequence

from discovery.pacing.token_bucket import TokenBucket
from sniproxy.engine import SocketStream
from turnreg.server.allocation import Attempt, Drop, FiveTuple, Refusal
from turnreg.server.config import CLIENT_REQUESTS, MAX_REFUSALS, SEND_TIMEOUT_S, STRANGER_REQUESTS, TurnServerConfig
from turnreg.server.datagrams import PAYLOAD_MESSAGES
from turnreg.server.framing import DATAGRAM_READ_BYTES, READ_BYTES, ChannelData, MessageReader
from turnreg.server.live_allocation import LiveAllocation, ServerState, text_of
from turnreg.server.relayed import RelayedAddress
from turnreg.server.relayed_datagrams import RelayedDatagrams
from turnreg.server.transaction import AllocateGranted, Step
from turnreg.server.unauthenticated import UnauthenticatedConnections
from turnreg.stun.message import TRANSPORT_UDP, Method, StunError

log = logging.getLogger(__name__)


class ClientSession:
    """Reads a client's requests and answers them, and owns the allocation that comes of them."""

    def __init__(
        self,
        wire: SocketStream,
        *,
        config: TurnServerConfig,
        meeting: ServerState,
        strangers: "UnauthenticatedConnections[SocketStream]",
    ) -> None:
        self._wire = wire
        self._config = config
        self._meeting = meeting
        self._strangers = strangers
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._five_tuple = FiveTuple(wire.peer, wire.local)
        self._stranger_until = self._clock() + config.unauthenticated_timeout_s
        self._reader = MessageReader()
        self._sending = asyncio.Lock()
        self._requests = TokenBucket(*STRANGER_REQUESTS, self._clock())
        self._refusals = 0
        self._holding: LiveAllocation | None = None
        self._relayed: RelayedAddress | None = None
        self._datagrams: RelayedDatagrams | None = None
        self._serving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timed_out = ""
        self._end = "server_stopped"

    async def run(self) -> None:
        """Serve the connection to its end. Ending it, by whatever way, ends its allocation and cuts the streams."""
        self._watch(self._stranger_until)
        try:
            end = await self._converse(None)
            if isinstance(end, str):  # a data connection, or somebody who wanted little
                self._end = end
                return
            async with asyncio.TaskGroup() as peers:
                self._end = await self._allocate(end, peers)
                raise _Over
        except* _Over:
            pass
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._strangers.dismiss(self._wire)
            if self._holding is not None:
                self._holding.end(self._end)

    def _watch(self, deadline: float) -> None:
        """End the connection then, unless its allocation has been prolonged by then: one timer, set anew only when it fires."""
        self._timer = self._loop.call_at(deadline, self._look)

    def _look(self) -> None:
        allocation = self._holding.allocation if self._holding is not None else None
        deadline = allocation.expires_at if allocation is not None else self._stranger_until
        if deadline > self._clock():
            self._watch(deadline)
            return
        self._timed_out = "too_slow" if allocation is None else "expired"
        if allocation is None:
            self._meeting.metrics.refused(Refusal.TOO_SLOW)
        self._wire.close()  # whoever reads it is told

    async def _converse(self, peers: asyncio.TaskGroup | None) -> str | AllocateGranted:
        """Answer requests until something ends the connection; returns what.

        Without a group for peers it returns as soon as there is an allocation to open, too.
        """
        while True:
            try:
                data = await self._wire.recv(READ_BYTES if self._datagrams is None else DATAGRAM_READ_BYTES)
            except OSError:
                return self._timed_out or "client_reset"
            if not data:
                return "client_closed"
            self._reader.feed(data)
            end = await self._answer(peers)
            if end is not None:
                return end

    async def _answer(self, peers: asyncio.TaskGroup | None) -> str | AllocateGranted | None:
        """Answer what has been read. Returns what ended the connection, None if it goes on."""
        try:
            while (message := self._reader.take()) is not None:
                await self._wire.take_turn()
                if isinstance(message, ChannelData):
                    self._wire.quantum.spend(0, PAYLOAD_MESSAGES)
                    self._channel_data(message)
                    continue
                self._wire.quantum.spend(0)
                is_payload = self._datagrams is not None and message.method == Method.SEND
                if not is_payload and not self._requests.take(1, self._clock()):
                    self._refuse(Refusal.FLOOD)
                    return "flood"
                step = self._meeting.transactions.respond(
                    self._five_tuple, message, now=self._clock(), unix_now=time.time()
                )
                if step.opening is not None and peers is None:
                    return step.opening
                end = await self._take(step, peers)
                if end is not None:
                    return end
        except StunError:
            self._meeting.metrics.refused(Refusal.NOT_STUN)
            return "not_stun"
        except OSError:
            return self._timed_out or "client_reset"
        return None

    async def _allocate(self, opening: AllocateGranted, peers: asyncio.TaskGroup) -> str:
        """Open an allocation and go on with what follows; returns what ended the connection."""
        try:
            end: str | AllocateGranted | None = await self._take(Step(opening=opening), peers)
        except OSError:
            end = self._timed_out or "client_reset"
        end = end or await self._answer(peers) or await self._converse(peers)
        assert isinstance(end, str)  # there is a group
        return end

    async def _take(self, step: Step, peers: asyncio.TaskGroup | None) -> str | None:
        """Do what a step says; returns what ended the connection, None if it goes on."""
        if step.datagram is not None and self._datagrams is not None:
            self._datagrams.send(step.datagram)
            return None
        if step.dropped is not None:
            self._meeting.metrics.dropped(step.dropped)
            return None
        if step.connecting is not None and self._relayed is not None and peers is not None:
            peers.create_task(self._relayed.connect(step.connecting))
            return None
        if step.bound is not None:
            await self._join(step.bound, step.answer or b"")
            return "bound"
        if step.opening is not None and peers is not None:
            step = await self._open(step.opening, peers)
        if step.refusal is not None:
            self._refuse(step.refusal)
        if step.answer is not None:
            await self._send(step.answer)
        if step.ended is not None:
            # The connection goes with it, as in coturn: an indication may be half written when its peer is cut.
            self._end = "given_back"
            if self._serving is not None:
                self._serving.cancel()
            await self._wire.drain_and_close()
            return self._end
        if step.close or (self._holding is None and self._refusals >= MAX_REFUSALS):
            await self._wire.drain_and_close()
            return "refused"
        return None

    async def _open(self, opening: AllocateGranted, peers: asyncio.TaskGroup) -> Step:
        """Open the relayed address of an Allocate that was granted."""
        meeting = self._meeting
        if opening.transport == TRANSPORT_UDP:
            made = meeting.open_datagrams(opening)
            if isinstance(made, Step):
                return made
            self._holding, sock, answer = made
            self._datagrams = RelayedDatagrams(self._holding.allocation, sock, meeting, padded=True)
            self._reader.datagrams = True
            self._serving = peers.create_task(self._datagrams.serve(self._deliver))
        else:
            opened = await meeting.open_streams(opening)
            if isinstance(opened, Step):
                return opened
            self._holding, listener, answer = opened
            self._relayed = RelayedAddress(self._holding.allocation, listener, meeting, self._send)
            self._serving = peers.create_task(self._relayed.serve())
        self._strangers.dismiss(self._wire)
        self._requests = TokenBucket(*CLIENT_REQUESTS, self._clock())
        if self._timer is not None:
            self._timer.cancel()
        self._watch(self._holding.allocation.expires_at)
        return Step(answer=answer)

    def _channel_data(self, message: ChannelData) -> None:
        where = self._meeting.transactions.channel_data(self._five_tuple, *message, self._clock())
        if isinstance(where, Drop):
            self._meeting.metrics.dropped(where)
        elif self._datagrams is not None:
            self._datagrams.send(where)

    async def _deliver(self, frames: Sequence[bytes]) -> None:
        await self._send(b"".join(frames))

    async def _join(self, attempt: Attempt, answer: bytes) -> None:
        """Answer the bind, then leave the connection to the peer's task until their stream has ended."""
        waiting = self._meeting.peers[attempt.connection_id]
        self._strangers.dismiss(self._wire)
        if self._timer is not None:
            self._timer.cancel()
        joined: SocketStream | None = None
        try:
            await self._send(answer)
            self._wire.unread(self._reader.take_rest())
            joined = self._wire
        finally:
            waiting.join(joined)
        try:
            await waiting.done
        finally:
            if not waiting.done.done() or waiting.done.cancelled():
                self._wire.reset()  # the server is stopped in the middle of a stream: a cut, not an end

    async def _send(self, data: bytes) -> None:
        """Send one whole message; peers' indications and answers take turns. OSError if the client is gone."""
        rest = memoryview(data)
        if not self._sending.locked():
            rest = rest[self._wire.try_send((data,)) :]  # nearly always all of it
            if not rest:
                return
        async with self._sending:
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._wire.send(rest)
            except TimeoutError:
                self._wire.reset()  # half a message may have gone: nothing can follow it
                raise ConnectionAbortedError(errno.ECONNABORTED, "the client does not read") from None

    def _refuse(self, why: Refusal) -> None:
        self._refusals += 1
        self._meeting.metrics.refused(why)
        if why not in (Refusal.NO_CREDENTIALS, Refusal.STALE_NONCE):  # those two belong to every client's life
            event = {"client": text_of(self._five_tuple.client), "reason": why.value}
            log.info("turn_refused", extra={"event": event})


class _Over(Exception):
    """The connection is over: cancels the tasks of its peers."""
