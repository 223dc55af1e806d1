"""One client connection of the TURN server: a control connection, or a data connection after its bind."""

import asyncio
import errno
import logging
import time
from collections.abc import Sequence
from typing import assert_never

from discovery.pacing.token_bucket import TokenBucket
from sniproxy.engine import SocketStream
from turnreg.server.allocation import Attempt, Drop, FiveTuple, Refusal
from turnreg.server.config import (
    CLIENT_REQUESTS,
    MAX_REFUSALS,
    UNAUTHENTICATED_REQUESTS,
    TurnServerConfig,
)
from turnreg.server.datagrams import PAYLOAD_MESSAGES
from turnreg.server.framing import DATAGRAM_READ_BYTES, READ_BYTES, ChannelData, MessageReader
from turnreg.server.live_allocation import LiveAllocation, Opened, ServerState, text_of
from turnreg.server.outcome import Close, Connect, GiveBack, Ignore, Join, Open, Outcome, Relay, Reply
from turnreg.server.relayed import RelayedAddress
from turnreg.server.relayed_datagrams import RelayedDatagrams
from turnreg.server.unauthenticated import UnauthenticatedConnections
from turnreg.stun.message import TRANSPORT_UDP, Method, StunError

log = logging.getLogger(__name__)


class ClientSession:
    """Answers the requests of one client and owns its allocation."""

    def __init__(
        self,
        stream: SocketStream,
        *,
        config: TurnServerConfig,
        state: ServerState,
        unauthenticated: "UnauthenticatedConnections[SocketStream]",
    ) -> None:
        self._stream = stream
        self._config = config
        self._state = state
        self._unauthenticated = unauthenticated
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._five_tuple = FiveTuple(stream.peer, stream.local)
        self._unauthenticated_until = self._clock() + config.unauthenticated_timeout_s
        self._reader = MessageReader()
        self._sending = asyncio.Lock()
        self._requests = TokenBucket(*UNAUTHENTICATED_REQUESTS, self._clock())
        self._refusals = 0
        self._live: LiveAllocation | None = None
        self._relayed: RelayedAddress | None = None
        self._datagrams: RelayedDatagrams | None = None
        self._serving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timed_out = ""
        self._end = "server_stopped"

    async def run(self) -> None:
        """Serve the connection to its end. Its allocation then ends too, and the streams are reset."""
        self._watch(self._unauthenticated_until)
        try:
            async with asyncio.TaskGroup() as peers:
                self._end = await self._converse(peers)
                if self._live is not None:
                    raise _Over
        except* _Over:
            pass
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._unauthenticated.dismiss(self._stream)
            if self._live is not None:
                self._live.end(self._end)

    def _watch(self, deadline: float) -> None:
        """End the connection at the deadline, unless its allocation is refreshed. The timer is set again only when it fires."""
        self._timer = self._loop.call_at(deadline, self._look)

    def _look(self) -> None:
        allocation = self._live.allocation if self._live is not None else None
        deadline = allocation.expires_at if allocation is not None else self._unauthenticated_until
        if deadline > self._clock():
            self._watch(deadline)
            return
        self._timed_out = "too_slow" if allocation is None else "expired"
        if allocation is None:
            self._state.metrics.refused(Refusal.TOO_SLOW)
        self._stream.close()  # a pending read raises OSError

    async def _converse(self, peers: asyncio.TaskGroup) -> str:
        """Answer requests until the connection ends. Returns the reason for the log."""
        while True:
            try:
                data = await self._stream.recv(READ_BYTES if self._datagrams is None else DATAGRAM_READ_BYTES)
            except OSError:
                return self._timed_out or "client_reset"
            if not data:
                return "client_closed"
            self._reader.feed(data)
            end = await self._answer(peers)
            if end is not None:
                return end

    async def _answer(self, peers: asyncio.TaskGroup) -> str | None:
        """Answer the messages that have been read. Returns why the connection has ended, None if it has not."""
        try:
            while (message := self._reader.take()) is not None:
                await self._stream.take_turn()
                if isinstance(message, ChannelData):
                    self._stream.quantum.spend(0, PAYLOAD_MESSAGES)
                    self._channel_data(message)
                    continue
                self._stream.quantum.spend(0)
                is_payload = self._datagrams is not None and message.method == Method.SEND
                if not is_payload and not self._requests.take(1, self._clock()):
                    self._refuse(Refusal.FLOOD)
                    return "flood"
                outcome = self._state.transactions.respond(
                    self._five_tuple, message, now=self._clock(), unix_now=time.time()
                )
                end = await self._do(outcome, peers)
                if end is not None:
                    return end
        except StunError:
            self._state.metrics.refused(Refusal.NOT_STUN)
            return "not_stun"
        except OSError:
            return self._timed_out or "client_reset"
        return None

    async def _do(self, outcome: Outcome, peers: asyncio.TaskGroup) -> str | None:
        """Carry out the decision about a message. Returns why the connection has ended, None if it has not."""
        match outcome:
            case Relay():
                if self._datagrams is not None:
                    self._datagrams.send(outcome)
            case Drop():
                self._state.metrics.dropped(outcome)
            case Reply():
                return await self._reply(outcome)
            case Join(answer=answer, attempt=attempt):
                await self._join(attempt, answer)
                return "bound"
            case Open():
                return await self._reply(await self._open(outcome, peers))
            case Connect():
                if self._relayed is not None:
                    peers.create_task(self._relayed.connect(outcome))
            case GiveBack(answer=answer):
                await self._send(answer)
                # The connection is closed too, as in coturn: an indication may be half written when its peer's task is cancelled.
                self._end = "given_back"
                if self._serving is not None:
                    self._serving.cancel()
                await self._stream.drain_and_close()
                return self._end
            case Close(reply=reply):
                return await self._reply(reply, last=True)
            case Ignore():
                pass
            case _:
                assert_never(outcome)
        return None

    async def _reply(self, reply: Reply, *, last: bool = False) -> str | None:
        """Send an answer. A client without an allocation is disconnected after MAX_REFUSALS refusals."""
        if reply.refusal is not None:
            self._refuse(reply.refusal)
        await self._send(reply.answer)
        if last or (self._live is None and self._refusals >= MAX_REFUSALS):
            await self._stream.drain_and_close()
            return "refused"
        return None

    async def _open(self, opening: Open, peers: asyncio.TaskGroup) -> Reply:
        """Open the relayed port for an Allocate that was granted."""
        state = self._state
        if opening.transport == TRANSPORT_UDP:
            match state.open_datagrams(opening):
                case Reply() as refused:
                    return refused
                case Opened(live=live, port=sock, answer=answer):
                    self._datagrams = RelayedDatagrams(live.allocation, sock, state, padded=True)
                    self._reader.datagrams = True
                    serving = self._datagrams.serve(self._deliver)
        else:
            match await state.open_streams(opening):
                case Reply() as refused:
                    return refused
                case Opened(live=live, port=listener, answer=answer):
                    self._relayed = RelayedAddress(live.allocation, listener, state, self._send)
                    serving = self._relayed.serve()
        self._live = live
        self._serving = peers.create_task(serving)
        self._unauthenticated.dismiss(self._stream)
        self._requests = TokenBucket(*CLIENT_REQUESTS, self._clock())
        if self._timer is not None:
            self._timer.cancel()
        self._watch(live.allocation.expires_at)
        return Reply(answer=answer)

    def _channel_data(self, message: ChannelData) -> None:
        match self._state.transactions.channel_data(self._five_tuple, *message, self._clock()):
            case Relay() as datagram:
                if self._datagrams is not None:
                    self._datagrams.send(datagram)
            case drop:
                self._state.metrics.dropped(drop)

    async def _deliver(self, frames: Sequence[bytes]) -> None:
        await self._send(b"".join(frames))

    async def _join(self, attempt: Attempt, answer: bytes) -> None:
        """Answer the bind, then leave the connection to the peer's task until the stream has ended."""
        waiting = self._state.peers[attempt.connection_id]
        self._unauthenticated.dismiss(self._stream)
        if self._timer is not None:
            self._timer.cancel()
        joined: SocketStream | None = None
        try:
            await self._send(answer)
            self._stream.unread(self._reader.take_rest())
            joined = self._stream
        finally:
            waiting.join(joined)
        try:
            await waiting.done
        finally:
            if not waiting.done.done() or waiting.done.cancelled():
                self._stream.reset()  # the server stops in the middle of a stream: not a clean end

    async def _send(self, data: bytes) -> None:
        """Send one whole message. Indications and answers do not interleave. Raises OSError if the client is gone."""
        rest = memoryview(data)
        if not self._sending.locked():
            rest = rest[self._stream.try_send((data,)) :]  # nearly always sends all of it
            if not rest:
                return
        async with self._sending:
            try:
                async with asyncio.timeout(self._config.send_timeout_s):
                    await self._stream.send(rest)
            except TimeoutError:
                self._stream.reset()  # half a message may have been sent: nothing can follow it
                raise ConnectionAbortedError(errno.ECONNABORTED, "the client does not read") from None

    def _refuse(self, why: Refusal) -> None:
        self._refusals += 1
        self._state.metrics.refused(why)
        if why not in (Refusal.NO_CREDENTIALS, Refusal.STALE_NONCE):  # part of every client's normal requests
            event = {"client": text_of(self._five_tuple.client), "reason": why.value}
            log.info("turn_refused", extra={"event": event})


class _Over(Exception):
    """Raised at the end of the connection to cancel the tasks of its peers."""
