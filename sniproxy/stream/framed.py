"""A wire that speaks capsules, and the carrying of a plain wire's stream over it.

Relay and gateway are mirror images: each has one plain wire (client or service) and one framed wire, and moves bytes both ways
by the same rules (sniproxy.stream.ends).
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from sniproxy.engine import Activity, Direction, Lost, Wire, drain, fill
from sniproxy.engine.pipes import PIPE_BYTES
from sniproxy.engine.wire import DEFAULT_READ_BYTES
from sniproxy.stream.capsule import CapsuleError, CapsuleReader, CapsuleType, Control, Event, Payload, header
from sniproxy.stream.control import Done, Finished, Message, parse_control
from sniproxy.stream.ends import LIMIT_DONE_S, LIMIT_REFUSED_S, Ends, Side
from sniproxy.stream.reason import Reason

LINGER_S = 1.0
"""Before a cut, how long bytes that are on their way may take through a TURN server that drops them at a close."""


class Framed:
    """Capsules over a wire, in the order that the end rules allow."""

    __slots__ = ("_pending", "_reader", "_writing", "ends", "wire")

    def __init__(self, wire: Wire, side: Side) -> None:
        self.wire = wire
        self.ends = Ends(side)
        self._reader = CapsuleReader()
        self._pending: list[Event] = []
        self._writing = asyncio.Lock()

    async def send(self, message: Message) -> None:
        """Send a control capsule, never inside another capsule. OSError where the wire is gone."""
        async with self._writing:
            self.ends.sent(CapsuleType[type(message).__name__.upper()])
            await self.wire.send(message.pack())

    async def begin(self, preamble: bytes, data: bytes) -> None:
        """Send the preamble and a first DATA capsule in one write, so that a TURN server keeps both before the bind."""
        async with self._writing:
            self.ends.sent(CapsuleType.DATA)
            await self.wire.send(preamble, header(CapsuleType.DATA, len(data)), data)

    async def send_data(self, data: bytes, *, final: bool = False) -> None:
        """Send one DATA or FINAL_DATA capsule."""
        kind = CapsuleType.FINAL_DATA if final else CapsuleType.DATA
        async with self._writing:
            self.ends.sent(kind)
            await self.wire.send(header(kind, len(data)), data)

    async def send_spliced(self, direction: Direction) -> None:
        """Send what the direction's pipe holds as one DATA capsule."""
        pipe = direction.pipe
        assert pipe is not None
        async with self._writing:
            self.ends.sent(CapsuleType.DATA)
            await self.wire.send(header(CapsuleType.DATA, pipe.held), more=True)
            await drain(pipe, self.wire)

    async def read(self, *, exact: bool = False) -> list[Event]:
        """Wait for bytes and return the events they complete, perhaps none; checked against the end rules.

        Args:
            exact: read no payload along with a header, so that it can be spliced.

        Raises:
            EOFError: the connection ended.
            OSError: it was reset.
            CapsuleError: the peer broke the protocol.
        """
        if self._pending:
            events, self._pending = self._pending, []
            return events
        data = await self.wire.recv((exact and self._reader.header_bytes_wanted) or DEFAULT_READ_BYTES)
        if not data:
            raise EOFError
        events = self._reader.feed(data)
        for event in events:
            if not isinstance(event, Payload):
                self.ends.received(event.type)
        return events

    def put_back(self, events: list[Event]) -> None:
        """Give events back in front of what the next `read` returns."""
        self._pending = events + self._pending

    async def next_message(self) -> Message:
        """Wait for the next capsule, which must be a control capsule. Errors as for `read`."""
        while True:
            events = await self.read()
            if events:
                self.put_back(events[1:])
                if not isinstance(events[0], Control):
                    raise CapsuleError("DATA where a control capsule is due")
                return parse_control(events[0])

    @property
    def exhausted(self) -> bool:
        """Everything up to the end of FINAL_DATA has been handed out."""
        return self.ends.final_received and not self._pending and not self._reader.payload_left

    @property
    def payload_left(self) -> int:
        """Bytes of the current capsule that are still in the wire and may be moved past `read`."""
        return 0 if self._pending else self._reader.payload_left

    def skip_payload(self, count: int) -> None:
        """Note that `count` bytes of payload were spliced past `read`."""
        self._reader.skip_payload(count)

    async def discard(self, limit_s: float = LIMIT_REFUSED_S) -> None:
        """Read and discard for a bounded while, then close: what we said last arrives."""
        try:
            async with asyncio.timeout(limit_s):
                while await self.wire.recv():
                    pass
        except (OSError, TimeoutError):
            pass
        finally:
            self.wire.close()


class Carry:
    """A plain wire's stream carried over a framed wire until both directions have ended; counts may be read meanwhile."""

    def __init__(
        self,
        plain: Wire,
        framed: Framed,
        side: Side,
        *,
        idle_timeout_s: float,
        half_close_timeout_s: float,
        first: bytes = b"",
    ) -> None:
        """Carry between these two.

        Args:
            idle_timeout_s: seconds without a byte in either direction.
            half_close_timeout_s: the same, once one direction has ended.
            first: payload that was read from the framed wire already, to be delivered first.
        """
        self._first = first
        self._plain = plain
        self._framed = framed
        self._side = side
        self._activity = Activity(idle_timeout_s)
        self._half_close_timeout_s = half_close_timeout_s
        self.outbound = Direction(self._activity)
        """From the plain wire to the framed one."""
        self.inbound = Direction(self._activity)
        self._cut: Reason | None = None

    async def run(self) -> Reason:
        """Move bytes until the stream is over, close both wires, say how it ended.

        Anything but a confirmed end resets the plain wire: its peer must not take a cut for an end.
        """
        reason = Reason.IDLE_TIMEOUT
        try:
            async with self._activity.watched(), asyncio.TaskGroup() as group:
                group.create_task(self._way(self._send_out()))
                await self._way(self._bring_in())
            reason = self._cut or Reason.OK
        except TimeoutError:
            pass
        finally:
            if reason is Reason.OK:
                self._plain.close()
                self._framed.wire.close()
            else:
                self._plain.reset()
                self._framed.wire.reset()
        return reason

    async def _way(self, move: Coroutine[Any, Any, None]) -> None:
        """Run one direction; where it is cut, note why and stop the other one."""
        try:
            await move
        except Lost as lost:
            self._cut_by(lost)
            if lost.writing:
                return  # what the lost side sent before may be on its way; the other direction finds its end
        except CapsuleError:
            self._cut = self._cut or Reason.PROTOCOL_ERROR
        except EOFError:
            self._cut = self._cut or Reason.TRUNCATED
        if self._cut is not None:
            self._plain.reset()
            self._framed.wire.reset()

    def _cut_by(self, lost: Lost) -> None:
        if self._cut is None:
            plain = Reason.CLIENT_RESET if self._side is Side.RELAY else Reason.SERVER_RESET
            self._cut = plain if lost.wire is self._plain else Reason.TRUNCATED

    async def _send_out(self) -> None:
        """Carry the plain wire's bytes to its end, then say FINAL_DATA."""
        plain, framed, direction = self._plain, self._framed, self.outbound
        try:
            while True:
                try:
                    if direction.pipe is None:
                        data = await plain.recv()
                        size = len(data)
                    else:
                        size = await fill(plain, direction.pipe)
                except OSError as error:
                    await self._linger()
                    raise Lost(plain, writing=False) from error
                if not size:
                    break
                try:
                    if direction.pipe is None:
                        await framed.send_data(data)
                    else:
                        await framed.send_spliced(direction)
                except OSError as error:
                    raise Lost(framed.wire, writing=True) from error
                if direction.pipe is None:
                    direction.copied(size)
                else:
                    direction.spliced(size)
                await direction.give_turn()
        finally:
            direction.release()
        if self._cut is not None:
            await self._linger()  # a clean end after a failed write is the kernel's, not the peer's
            return
        try:
            await framed.send_data(b"", final=True)
        except OSError as error:
            raise Lost(framed.wire, writing=True) from error
        self._activity.limit(self._half_close_timeout_s)

    async def _linger(self) -> None:
        """Before a cut, let what was sent get through a TURN server, which drops what it holds at a close."""
        if self.outbound.moved and not self._framed.wire.closed:
            await self._framed.wire.flushed(LINGER_S)
            await asyncio.sleep(LINGER_S - self._activity.quiet_s())

    async def _bring_in(self) -> None:
        """Deliver the framed wire's payload to its end, confirm it, and see the stream off."""
        framed, ends = self._framed, self._framed.ends
        try:
            if self._first:
                await self._deliver(self._first)
                self.inbound.moved += len(self._first)
            while not ends.complete:
                if framed.exhausted and not ends.finished_sent:
                    self._plain.shutdown_write()
                    await self._tell(Finished())
                    self._activity.limit(self._half_close_timeout_s)
                elif self.inbound.pipe is not None and framed.payload_left:
                    await self._splice_in()
                else:
                    await self._copy_in()
                await self.inbound.give_turn()
        finally:
            self.inbound.release()
        await self._see_off()

    async def _copy_in(self) -> None:
        """Read once and deliver what came."""
        size = 0
        try:
            events = await self._framed.read(exact=self.inbound.pipe is not None)
        except OSError as error:
            raise Lost(self._framed.wire, writing=False) from error
        for event in events:
            if type(event) is Payload:
                size += len(event.data)
                await self._deliver(event.data)
            elif type(event) is Control:
                parse_control(event)
        if size:
            self.inbound.copied(size)

    async def _deliver(self, data: bytes | memoryview) -> None:
        try:
            await self._plain.send(data)
        except OSError as error:
            raise Lost(self._plain, writing=True) from error

    async def _splice_in(self) -> None:
        """Splice at most the rest of the current capsule."""
        pipe = self.inbound.pipe
        assert pipe is not None
        try:
            size = await fill(self._framed.wire, pipe, min(self._framed.payload_left, PIPE_BYTES))
        except OSError as error:
            raise Lost(self._framed.wire, writing=False) from error
        if not size:
            raise EOFError
        self._framed.skip_payload(size)
        try:
            await drain(pipe, self._plain)
        except OSError as error:
            raise Lost(self._plain, writing=True) from error
        self.inbound.spliced(size)

    async def _tell(self, message: Message) -> None:
        try:
            await self._framed.send(message)
        except OSError as error:
            raise Lost(self._framed.wire, writing=True) from error

    async def _see_off(self) -> None:
        """Everything is delivered and confirmed both ways: relay says DONE, gateway closes first, nothing can be lost."""
        try:
            async with asyncio.timeout(LIMIT_DONE_S):
                if self._side is Side.RELAY:
                    await self._framed.send(Done())
                    while await self._framed.wire.recv():
                        pass
                else:
                    while not self._framed.ends.done:
                        await self._framed.read()
        except (OSError, EOFError, CapsuleError, TimeoutError):
            pass  # both have confirmed: a lost DONE costs nobody anything
