"""One client connection of the TURN server: a control connection, or a data connection once it is bound."""

import asyncio
import errno
import itertools
import logging
import time

from sniproxy.engine import Listener, Wire
from turnreg.server.admission import Strangers
from turnreg.server.allocation import Allocation, Attempt, FiveTuple, Refusal
from turnreg.server.config import MAX_REFUSALS, SEND_TIMEOUT_S, TurnServerConfig
from turnreg.server.framing import READ_BYTES, MessageReader
from turnreg.server.ports import PortRange
from turnreg.server.relayed import Meeting, RelayedAddress, text_of
from turnreg.server.transaction import Opening, Step
from turnreg.stun import FAMILY_IPV4, FAMILY_IPV6, StunError

log = logging.getLogger(__name__)

MAX_PORT_TRIES = 1000
"""Busy ports that one Allocate tries at most (some 10 ms): the range is somebody else's then."""

_PORT_ERRNOS = frozenset({errno.EADDRINUSE, errno.EACCES})


class RelayPorts:
    """The relay address of one family and its ports."""

    def __init__(self, address: str, ports: PortRange) -> None:
        self.address = address
        self.ports = ports
        self.family = FAMILY_IPV6 if ":" in address else FAMILY_IPV4

    async def open(self, now: float) -> Listener | None:
        """Listen on a random free port; None if there is none."""
        for port in itertools.islice(self.ports.candidates(now), MAX_PORT_TRIES):
            try:
                listener = await Listener.open(self.address, port)
            except OSError as exc:
                if exc.errno in _PORT_ERRNOS:
                    continue
                log.error("turn: %s", exc)  # no such address, out of descriptors: the next port would fail alike
                return None
            self.ports.take(port)
            return listener
        return None


class ClientSession:
    """Reads a client's requests and answers them, and owns the allocation that comes of them."""

    def __init__(
        self,
        wire: Wire,
        *,
        config: TurnServerConfig,
        meeting: Meeting,
        relays: dict[int, RelayPorts],
        strangers: "Strangers[Wire]",
    ) -> None:
        self._wire = wire
        self._config = config
        self._meeting = meeting
        self._relays = relays
        self._strangers = strangers
        self._clock = asyncio.get_running_loop().time
        self._five_tuple = FiveTuple(wire.peer, wire.local)
        self._stranger_until = self._clock() + config.unauthenticated_timeout_s
        self._reader = MessageReader()
        self._sending = asyncio.Lock()
        self._refusals = 0
        self._allocation: Allocation | None = None
        self._listener: Listener | None = None
        self._serving: asyncio.Task[None] | None = None
        self._began = 0.0
        self._end = "server_stopped"

    async def run(self) -> None:
        """Serve the connection to its end. Ending it, by whatever way, ends its allocation and cuts the streams."""
        crowded_out = self._strangers.admit(self._wire)
        if crowded_out is not None:
            self._meeting.metrics.refused(Refusal.CROWDED_OUT)
            crowded_out.reset()
        try:
            async with asyncio.TaskGroup() as peers:
                self._end = await self._converse(peers)
                raise _Over
        except* _Over:
            pass
        finally:
            self._strangers.dismiss(self._wire)
            self._end_allocation()

    async def _converse(self, peers: asyncio.TaskGroup) -> str:
        """Answer requests until something ends the connection; returns what."""
        while True:
            allocation = self._allocation
            try:
                async with asyncio.timeout_at(allocation.expires_at if allocation else self._stranger_until):
                    data = await self._wire.recv(READ_BYTES)
            except TimeoutError:
                if allocation is not None:
                    return "expired"
                self._meeting.metrics.refused(Refusal.TOO_SLOW)
                return "too_slow"
            except OSError:
                return "client_reset"
            if not data:
                return "client_closed"
            self._reader.feed(data)
            try:
                while (message := self._reader.take()) is not None:
                    step = self._meeting.transactions.respond(
                        self._five_tuple, message, now=self._clock(), unix_now=time.time()
                    )
                    end = await self._take(step, peers)
                    if end is not None:
                        return end
            except StunError:
                self._meeting.metrics.refused(Refusal.NOT_STUN)
                return "not_stun"
            except OSError:
                return "client_reset"

    async def _take(self, step: Step, peers: asyncio.TaskGroup) -> str | None:
        """Do what a step says; returns what ended the connection, None if it goes on."""
        if step.bound is not None:
            await self._join(step.bound, step.answer or b"")
            return "bound"
        if step.opening is not None:
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
        if step.close or (self._allocation is None and self._refusals >= MAX_REFUSALS):
            await self._wire.drain_and_close()
            return "refused"
        return None

    async def _open(self, opening: Opening, peers: asyncio.TaskGroup) -> Step:
        """Open the relayed address of an Allocate that was granted."""
        transactions = self._meeting.transactions
        relay = self._relays[opening.family]
        listener = await relay.open(self._clock())
        if listener is None:
            return transactions.not_opened(opening)
        allocation, answer = transactions.opened(opening, listener.address, self._clock())
        self._allocation, self._listener = allocation, listener
        self._began = self._clock()
        self._strangers.dismiss(self._wire)
        self._meeting.metrics.allocated()
        event = {
            "client": text_of(self._five_tuple.client),
            "account": allocation.account,
            "relayed": text_of(allocation.relayed),
            "lifetime_s": int(allocation.lifetime_s),
        }
        log.info("turn_allocation", extra={"event": event})
        relayed = RelayedAddress(allocation, listener, self._meeting, self._send)
        self._serving = peers.create_task(relayed.serve())
        return Step(answer=answer)

    async def _join(self, attempt: Attempt, answer: bytes) -> None:
        """Answer the bind, then leave the connection to the peer's task until their stream has ended."""
        waiting = self._meeting.peers[attempt.connection_id]
        self._strangers.dismiss(self._wire)
        joined: Wire | None = None
        try:
            await self._send(answer)
            self._wire.unread(self._reader.take_rest())
            joined = self._wire
        finally:
            waiting.join(joined)
        try:
            await waiting.done.wait()
        finally:
            if not waiting.done.is_set():
                self._wire.reset()  # the server is stopped in the middle of a stream: a cut, not an end

    async def _send(self, data: bytes) -> None:
        """Send one whole message; peers' indications and answers take turns. OSError if the client is gone."""
        async with self._sending:
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._wire.send(data)
            except TimeoutError:
                self._wire.reset()  # half a message may have gone: nothing can follow it
                raise ConnectionAbortedError(errno.ECONNABORTED, "the client does not read") from None

    def _refuse(self, why: Refusal) -> None:
        self._refusals += 1
        self._meeting.metrics.refused(why)
        if why not in (Refusal.NO_CREDENTIALS, Refusal.STALE_NONCE):  # those two belong to every client's life
            event = {"client": text_of(self._five_tuple.client), "reason": why.value}
            log.info("turn_refused", extra={"event": event})

    def _end_allocation(self) -> None:
        allocation, listener = self._allocation, self._listener
        if allocation is None or listener is None:
            return
        listener.close()  # its task does that too, unless it was cancelled before it began
        self._meeting.table.remove(allocation)
        self._relays[allocation.family].ports.give_back(allocation.relayed[1], self._clock())
        event = {
            "client": text_of(self._five_tuple.client),
            "account": allocation.account,
            "relayed": text_of(allocation.relayed),
            "ms_total": round((self._clock() - self._began) * 1000),
            "reason": self._end,
        }
        log.info("turn_allocation_ended", extra={"event": event})


class _Over(Exception):
    """The connection is over: cancels the tasks of its peers."""
