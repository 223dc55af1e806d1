"""Carry the stream of a plain wire over a framed one.

Relay and gateway are mirror images: each has one plain wire (client or service) and one framed wire to the other, and moves bytes
both ways by the same rules (sniproxy.tunnel.state). Only the relay's upload may move on to a second connection.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from sniproxy.engine import ByteStream, CopyDirection, IdleTimer, Lost, drain, fill
from sniproxy.engine.copy import LIMIT_STALLED_S
from sniproxy.engine.pipes import PIPE_BYTES
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.capsules import HEADER_SIZE, CapsuleError, Control, Payload
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Continued, Done, Finished, Message, Received, parse_control
from sniproxy.tunnel.state import LIMIT_DONE_S, LIMIT_UNRECEIVED, RECEIVED_INTERVAL, Side

log = logging.getLogger(__name__)

LINGER_S = 1.0
"""Before a cut, how long bytes that are on their way may take through a TURN server that drops them at a close."""

SECOND_AGAIN_S = (2.0, 8.0, 30.0)
"""Pauses after a second connection was not to be had, as on a link that is full; then the upload stays where it is."""

MIN_ROOM = 16 * 1024
"""An upload waits for this much room rather than send in ever smaller pieces."""

Second = Callable[[], Awaitable[CapsuleConnection]]
"""Gives the second connection: the relay dials it, the gateway waits for it. OSError, EOFError or TimeoutError if there is none."""


class StreamBridge:
    """A plain wire's stream carried over a framed wire until both directions have ended; counts may be read meanwhile."""

    def __init__(
        self,
        plain: ByteStream,
        framed: CapsuleConnection,
        side: Side,
        *,
        idle_timeout_s: float,
        half_close_timeout_s: float,
        first: bytes = b"",
        second: Second | None = None,
    ) -> None:
        """Carry between these two.

        Args:
            idle_timeout_s: seconds without a byte in either direction.
            half_close_timeout_s: the same, once one direction has ended.
            first: payload that was read from the framed wire already, to be delivered first.
            second: through a TURN server, how an upload gets a connection of its own; None where nothing is between us.
        """
        self._plain = plain
        self._framed = framed
        self._side = side
        self._first = first
        self._activity = IdleTimer(idle_timeout_s)
        self._half_close_timeout_s = half_close_timeout_s
        self.outbound = CopyDirection(self._activity, plain, framed.stream)
        """From the plain wire to the framed one."""
        self.inbound = CopyDirection(self._activity, plain, framed.stream)
        self._cut: Reason | None = None
        self._group: asyncio.TaskGroup | None = None
        self._get_second = second
        self._second: CapsuleConnection | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._delivered = False
        self._received = 0  # bytes of ours that the gateway has, as far as it has said
        self._reported = 0  # bytes of the relay that we have said we have
        self._news = asyncio.Event()  # there is room, or there may be

    async def run(self) -> Reason:
        """Move bytes until the stream is over, close all wires, say how it ended.

        Anything but a confirmed end resets the plain wire: its peer must not take a cut for an end.
        """
        reason = Reason.IDLE_TIMEOUT
        try:
            async with self._activity.watched(), asyncio.TaskGroup() as self._group:
                sending = self._group.create_task(self._way(self._send_out))
                await self._way(self._bring_in)
                await sending
                for task in self._tasks:
                    task.cancel()
            reason = self._cut or Reason.OK
        except TimeoutError:
            reason = self._cut or reason
        finally:
            self._group = None
            for wire in self._wires():
                if reason is Reason.OK:
                    wire.close()
                else:
                    wire.reset()
        return reason

    async def _way(self, move: Callable[[], Awaitable[None]]) -> None:
        """Run one direction; where it is cut, note why and stop the other one."""
        try:
            await move()
        except Lost as lost:
            self._cut_by(lost)
            self._news.set()
            if lost.writing:
                # What the lost side sent before may be on its way; the other direction finds its end, if it moves at all.
                self._activity.shorten(LIMIT_STALLED_S)
                return
        except CapsuleError as error:
            log.debug("stream broken: %s", error)
            self._cut = self._cut or error.reason
        except EOFError:
            self._cut = self._cut or Reason.TRUNCATED
        if self._cut is not None:
            for wire in self._wires():  # wakes whoever waits on one of them
                wire.reset()
            self._news.set()

    def _wires(self) -> list[ByteStream]:
        second = [] if self._second is None else [self._second.stream]
        return [self._plain, self._framed.stream, *second]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the two directions, not longer than they."""
        assert self._group is not None, "only while running"
        self._tasks.append(self._group.create_task(work))

    def _cut_by(self, lost: Lost) -> None:
        if self._cut is None:
            plain = Reason.CLIENT_RESET if self._side is Side.RELAY else Reason.SERVER_RESET
            self._cut = plain if lost.wire is self._plain else Reason.TRUNCATED

    # Out: from the plain wire to the framed one

    async def _send_out(self) -> None:
        """Carry the plain wire's bytes to its end, then say FINAL_DATA."""
        plain, direction = self._plain, self.outbound
        out = self._framed
        try:
            while True:
                out, room = await self._room(out)
                try:
                    size, data = await direction.read(plain, room)
                except OSError as error:
                    await self._linger(out)
                    raise Lost(plain, writing=False) from error
                if not size:
                    break
                try:
                    if direction.pipe is None:
                        await out.send_data(data)
                        data = b""  # an idle stream holds nothing of what it has moved
                    else:
                        await out.send_spliced(direction)
                except OSError as error:
                    raise Lost(out.stream, writing=True) from error
                direction.passed(size)
        finally:
            direction.release()
        if self._cut is not None:
            await self._linger(out)  # a clean end after a failed write is the kernel's, not the peer's
            return
        try:
            await out.send_data(b"", final=True)
        except OSError as error:
            raise Lost(out.stream, writing=True) from error
        if out is not self._framed:
            self._framed.ends.end_elsewhere()
        self._activity.limit(self._half_close_timeout_s)

    async def _room(self, out: CapsuleConnection) -> tuple[CapsuleConnection, int]:
        """Say where the next bytes go, and how many at most."""
        if self._side is Side.GATEWAY or self._get_second is None or out is self._second:
            return out, PIPE_BYTES
        while True:
            if self._cut is not None:
                raise EOFError
            room = LIMIT_UNRECEIVED - (out.sent - self._received) - HEADER_SIZE
            if room >= MIN_ROOM:
                return out, room
            if self._second is not None:
                try:
                    await out.send(Continued())
                except OSError as error:
                    raise Lost(out.stream, writing=True) from error
                self.outbound.joins(self._second.stream)
                return self._second, PIPE_BYTES
            if not self._tasks:
                self._spawn(self._fetch_second())
            self._news.clear()
            await self._news.wait()

    async def _fetch_second(self) -> None:
        """The relay's: dial. Without one the upload goes on as the gateway takes it."""
        assert self._get_second is not None
        for pause in (*SECOND_AGAIN_S, None):
            try:
                self._second = await self._get_second()
            except (OSError, EOFError) as error:  # TimeoutError is an OSError
                if pause is None:
                    log.warning("an upload stays on its first connection, and slow: %s", error)
                    return
                await asyncio.sleep(pause)
            else:
                self._news.set()
                return

    async def _linger(self, out: CapsuleConnection) -> None:
        """Before a cut, let what was sent get through a TURN server, which drops what it holds at a close."""
        if self.outbound.moved and not out.stream.closed:
            await out.stream.flushed(LINGER_S)
            await asyncio.sleep(LINGER_S - self._activity.idle_s())

    # In: from the framed wire to the plain one

    async def _bring_in(self) -> None:
        """Deliver the payload to its end, confirm it, and see the stream off."""
        try:
            if self._first:
                await self._deliver(self._first)
                self.inbound.moved += len(self._first)
                self._first = b""  # for as long as the stream lives
            while not self._framed.ends.complete:
                await self._take(self._framed)
        finally:
            self.inbound.release()
        await self._see_off()

    async def _bring_in_rest(self) -> None:
        """The gateway's: deliver what comes over the second connection."""
        assert self._get_second is not None
        try:
            async with asyncio.timeout(LIMIT_DONE_S):
                self._second = second = await self._get_second()
                self.inbound.joins(second.stream)
        except TimeoutError:
            raise EOFError from None
        while not self._delivered:
            await self._take(second)

    async def _take(self, source: CapsuleConnection) -> None:
        """Move what comes next, or confirm that nothing more does."""
        if source.exhausted and not self._delivered:
            self._delivered = True
            self._plain.shutdown_write()
            if source is not self._framed:
                self._framed.ends.end_elsewhere()
            try:
                await self._framed.send(Finished())
            except OSError as error:  # and nobody else may be reading there
                raise Lost(self._framed.stream, writing=False) from error
            self._activity.limit(self._half_close_timeout_s)
        elif self.inbound.pipe is not None and source.payload_left:
            await self._splice_in(source)
        else:
            await self._copy_in(source)
        if self._side is Side.GATEWAY and source is self._framed:
            self._report()

    async def _copy_in(self, source: CapsuleConnection) -> None:
        """Read once and deliver what came."""
        size = 0
        try:
            events = await source.read(exact=self.inbound.pipe is not None)
        except OSError as error:
            raise Lost(source.stream, writing=False) from error
        for event in events:
            if type(event) is Payload:
                size += len(event.data)
                await self._deliver(event.data)
            elif type(event) is Control:
                self._heed(parse_control(event))
        if size:
            self.inbound.copied(size)

    async def _splice_in(self, source: CapsuleConnection) -> None:
        """Splice at most the rest of the current capsule."""
        pipe = self.inbound.pipe
        assert pipe is not None
        try:
            size = await fill(source.stream, pipe, min(source.payload_left, PIPE_BYTES))
        except OSError as error:
            raise Lost(source.stream, writing=False) from error
        if not size:
            raise EOFError
        source.skip_payload(size)
        try:
            await drain(pipe, self._plain)
        except OSError as error:
            raise Lost(self._plain, writing=True) from error
        self.inbound.spliced(size)

    async def _deliver(self, data: bytes | memoryview) -> None:
        try:
            await self._plain.send(data)
        except OSError as error:
            raise Lost(self._plain, writing=True) from error

    def _heed(self, message: Message) -> None:
        """Take in a control capsule that the end rules have let through."""
        if isinstance(message, Received):
            if not self._received <= message.count <= self._framed.sent:
                raise CapsuleError("RECEIVED of bytes that were not sent")
            self._received = message.count
            self._news.set()
        elif isinstance(message, Continued):
            if self._get_second is None:
                raise CapsuleError("CONTINUED where nothing is between us")
            self._spawn(self._way(self._bring_in_rest))

    def _report(self) -> None:
        """Say now and then how much has arrived; in a task of its own, for the other direction may be full."""
        if self._get_second is None or self._framed.received - self._reported < RECEIVED_INTERVAL:
            return
        if not self._reported:
            self._spawn(self._keep_reporting())
        self._reported = self._framed.received
        self._news.set()

    async def _keep_reporting(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._framed.send(Received(self._reported))
            except OSError:
                return  # the directions notice by themselves

    async def _see_off(self) -> None:
        """Everything is delivered and confirmed both ways: relay says DONE, gateway closes first, nothing can be lost."""
        try:
            async with asyncio.timeout(LIMIT_DONE_S):
                if self._side is Side.RELAY:
                    await self._framed.send(Done())
                    while await self._framed.stream.recv():
                        pass
                else:
                    while not self._framed.ends.done:
                        await self._framed.read()
        except (OSError, EOFError, CapsuleError, TimeoutError):
            pass  # both have confirmed: a lost DONE costs nobody anything
