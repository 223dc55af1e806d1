"""Carries a plain byte stream over a capsule connection.

Relay and gateway are mirror images: each has one plain stream (to the client or the service) and one capsule connection to the
other, and moves bytes both ways by the same rules (sniproxy.tunnel.state). Only the relay's upload may move to a second connection.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from sniproxy.engine import DEFAULT_BUFFER_BYTES, ByteStream, CopyDirection, IdleTimer, Lost, drain, fill
from sniproxy.engine.copy import LIMIT_STALLED_S, MAX_UNREAD, TAIL_BYTES, has_left
from sniproxy.engine.idle_timer import CHECK_EVERY_S
from sniproxy.engine.pipes import PIPE_BYTES
from sniproxy.formats.close_notify import is_close_notify
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.capsules import HEADER_SIZE, CapsuleError, Control, Payload
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.heartbeat import HEARTBEAT_TIMING, Heartbeats, HeartbeatTiming
from sniproxy.tunnel.messages import Continued, Done, Finished, Heartbeat, Message, Received, parse_control
from sniproxy.tunnel.state import LIMIT_DONE_S, LIMIT_UNRECEIVED, RECEIVED_INTERVAL, Side

log = logging.getLogger(__name__)

LINGER_S = 1.0
"""Time for bytes in flight to get through a TURN server before a reset: it drops what it holds at a close."""

SECOND_RETRY_S = (2.0, 8.0, 30.0)
"""Pauses between attempts to get a second connection, which can fail on a saturated link."""

MIN_ROOM = 16 * 1024
"""An upload waits for this much room instead of sending ever smaller pieces."""

Second = Callable[[], Awaitable[CapsuleConnection]]
"""Gets the second connection: the relay dials it, the gateway waits for it. OSError, EOFError or TimeoutError if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeTiming:
    """How long a bridge waits, in seconds."""

    linger_s: float = LINGER_S
    """Before a reset, for bytes in flight to arrive."""
    stalled_s: float = LIMIT_STALLED_S
    """After one side was lost, for what it had sent before to make progress towards the other."""
    second_retry_s: tuple[float, ...] = SECOND_RETRY_S
    """Pauses between attempts to get a second connection. After the last one the upload stays on the first."""
    done_s: float = LIMIT_DONE_S
    """From the last FINISHED to the close, and from CONTINUED to the second connection."""
    check_every_s: float = CHECK_EVERY_S
    """Between two looks whether both ends still live."""
    heartbeat: HeartbeatTiming = HEARTBEAT_TIMING
    """How often to say HEARTBEAT, and how long to wait for one."""


DEFAULT_TIMING: Final = BridgeTiming()


class StreamBridge:
    """Carries a plain stream over a capsule connection until both directions have ended; counts may be read meanwhile."""

    def __init__(
        self,
        plain: ByteStream,
        connection: CapsuleConnection,
        side: Side,
        *,
        idle_timeout_s: float,
        half_close_timeout_s: float,
        first: bytes = b"",
        second: Second | None = None,
        heartbeats: bool = False,
        resets_when_done: bool = False,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        timing: BridgeTiming = DEFAULT_TIMING,
    ) -> None:
        """Prepare to carry `plain` over `connection`; `run` does it.

        Args:
            plain: to the client at a relay, to the service at a gateway.
            connection: to the other side.
            side: which side this is.
            idle_timeout_s: seconds without a byte in either direction.
            half_close_timeout_s: the same, once one direction has ended.
            first: payload that was already read from the connection, to be delivered first.
            second: gets a connection for the upload alone, where a TURN server is in between; None on a direct connection.
            heartbeats: the other side understands HEARTBEAT and sends it.
            resets_when_done: at a gateway that dialled the connection: after DONE reset it instead of closing it, because whoever
                closes first keeps the local port for a minute (TIME_WAIT). Without DONE something may be in flight.
            buffer_bytes: what the kernel may hold of one direction while its reader is slow.
            timing: how long to wait for the other side.
        """
        self._plain = plain
        self._connection = connection
        self._side = side
        self._resets_when_done = resets_when_done
        self._first = first
        self._timing = timing
        self._activity = IdleTimer(idle_timeout_s, check=self._check, check_every_s=timing.check_every_s)
        now = asyncio.get_running_loop().time()
        self._heartbeats = Heartbeats(now, timing.heartbeat) if heartbeats else None
        self._half_close_timeout_s = half_close_timeout_s
        self.outbound = CopyDirection(self._activity, plain, connection.stream, buffer_bytes=buffer_bytes)
        """From the plain stream to the connection."""
        self.inbound = CopyDirection(self._activity, connection.stream, plain, buffer_bytes=buffer_bytes)
        """From the connection to the plain stream."""
        if side is Side.RELAY:
            self.outbound.opposite = self.inbound
        self._cut: Reason | None = None
        self._left_as: Reason | None = None
        """The plain stream's peer has left by a reset, which is no cut if the other side confirms the end."""
        self._group: asyncio.TaskGroup | None = None
        self._get_second = second
        self._second: CapsuleConnection | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._delivered = False
        self._is_sent = False  # the plain stream's end
        self._ignored = 0
        self._received = 0  # at the relay: bytes that the gateway has confirmed
        self._reported = 0  # at the gateway: bytes that we have confirmed
        self._news = asyncio.Event()  # at the relay there may be room; at the gateway there is something to confirm

    async def run(self) -> Reason:
        """Move bytes until the stream is over, close everything, and return how it ended.

        Anything but a confirmed end resets the plain stream: its peer must not mistake a cut for an end.
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
            reason = self._cut or self._left_as or reason
        finally:
            self._group = None
            self._end(reason)
        return reason

    def _end(self, reason: Reason) -> None:
        """Close all streams, or reset them if this is a cut."""
        is_done = self._resets_when_done and self._connection.ends.done
        # Not a FIN with a RST behind it: on a busy machine 1 to 3 % of the peers' FINs come in between, and those ports are kept.
        # The relay closes when its first connection ends, so the second one goes before it.
        for stream in reversed(self._streams()):
            if reason is not Reason.OK or (is_done and stream is not self._plain):
                stream.reset()
            else:
                stream.close()

    async def _way(self, move: Callable[[], Awaitable[None]]) -> None:
        """Run one direction. If it is cut, note why and stop the other one."""
        try:
            await move()
        except Lost as lost:
            self._cut_by(lost)
            self._news.set()
            if lost.writing:
                # What the lost side sent before may be in flight: the other direction delivers it, unless it stalls.
                self._activity.shorten(self._timing.stalled_s)
                return
        except CapsuleError as error:
            log.debug("stream broken: %s", error)
            self._cut = self._cut or error.reason
        except EOFError:
            self._cut = self._cut or Reason.TRUNCATED
        if self._cut is not None:
            for stream in self._streams():  # wakes every task that waits on one of them
                stream.reset()
            self._news.set()

    def _check(self) -> None:
        """Cut the stream if one of its ends no longer answers, say HEARTBEAT if it is time, and look at what directions hold."""
        self.outbound.look()
        self.inbound.look()
        lost = self._lost_end()
        if lost is not None:
            self._cut = self._cut or lost
            for stream in self._streams():
                stream.reset()
            self._news.set()

    def _lost_end(self) -> Reason | None:
        if self._plain.lost_peer():
            return Reason.CLIENT_LOST if self._side is Side.RELAY else Reason.SERVER_LOST
        connections = [self._connection] if self._second is None else [self._connection, self._second]
        if any(connection.stream.lost_peer() for connection in connections):
            return Reason.PATH_LOST
        heartbeats, ends = self._heartbeats, self._connection.ends
        if heartbeats is None or ends.complete:
            return None
        now = asyncio.get_running_loop().time()
        if heartbeats.is_silent(
            now, sum(connection.received for connection in connections), reads=not self._plain.is_full
        ):
            return Reason.PATH_LOST
        if heartbeats.is_due(now, self._connection.sent):
            try:
                self._connection.try_send(Heartbeat())
            except OSError:
                return None  # the directions find out
        return None

    def _streams(self) -> list[ByteStream]:
        second = [] if self._second is None else [self._second.stream]
        return [self._plain, self._connection.stream, *second]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task beside the two directions, for no longer than they run."""
        assert self._group is not None, "only while running"
        self._tasks.append(self._group.create_task(work))

    def _cut_by(self, lost: Lost) -> None:
        if self._cut is None:
            self._cut = self._reset_by_plain() if lost.stream is self._plain else Reason.TRUNCATED

    def _reset_by_plain(self) -> Reason:
        return Reason.CLIENT_RESET if self._side is Side.RELAY else Reason.SERVER_RESET

    # Out: from the plain stream to the connection

    async def _send_out(self) -> None:
        """Send the plain stream's bytes up to its end, then FINAL_DATA."""
        plain, direction = self._plain, self.outbound
        out = self._connection
        try:
            while True:
                out, room = await self._room(out)
                try:
                    size, data = await direction.read(plain, room)
                except OSError as error:
                    if self._has_left():
                        self._left_as = self._reset_by_plain()
                        break
                    await self._linger(out)
                    raise Lost(plain, writing=False) from error
                if not size:
                    break
                tail = data[-TAIL_BYTES:]
                try:
                    if direction.pipe is None:
                        await out.send_data(data)
                        data = b""  # an idle stream keeps nothing of what it has moved
                    else:
                        await out.send_spliced(direction)
                except OSError as error:
                    raise Lost(out.stream, writing=True) from error
                direction.passed(size, tail)
        finally:
            direction.end()
        if self._cut is not None:
            await self._linger(out)  # after a failed write, a clean end comes from the kernel and not from the peer
            return
        try:
            await out.send_data(b"", final=True)
        except OSError as error:
            raise Lost(out.stream, writing=True) from error
        self._is_sent = True
        if out is not self._connection:
            self._connection.ends.end_elsewhere()
        if self._left_as is None:
            self._activity.limit(self._half_close_timeout_s)
        else:
            self._activity.shorten(self._timing.stalled_s)  # nobody waits for an answer

    async def _room(self, out: CapsuleConnection) -> tuple[CapsuleConnection, int]:
        """Return the connection that the next bytes go to, and how many may be sent."""
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
                self.outbound.joins(sink=self._second.stream)
                return self._second, PIPE_BYTES
            if not self._tasks:
                self._spawn(self._fetch_second())
            self._news.clear()
            await self._news.wait()

    async def _fetch_second(self) -> None:
        """Dial the second connection, at the relay. If that fails, the upload goes on at the pace of the gateway's reports."""
        assert self._get_second is not None
        for pause in (*self._timing.second_retry_s, None):
            try:
                self._second = await self._get_second()
            except (OSError, EOFError) as error:  # TimeoutError is an OSError
                if pause is None:
                    log.warning("no second connection, so an upload stays slow on its first: %s", error)
                    return
                await asyncio.sleep(pause)
            else:
                self._news.set()
                return

    async def _linger(self, out: CapsuleConnection) -> None:
        """Before a reset, let what was sent get through a TURN server, which drops what it holds at a close."""
        if self.outbound.moved and not out.stream.closed:
            linger_s = self._timing.linger_s
            await out.stream.flushed(linger_s)
            await asyncio.sleep(linger_s - self._activity.idle_s())

    # In: from the connection to the plain stream

    async def _bring_in(self) -> None:
        """Deliver the payload up to its end, confirm it, and finish the stream."""
        try:
            if self._first:
                await self._deliver(self._first)
                self.inbound.moved += len(self._first)
                self._first = b""  # for as long as the stream lives
            while not self._connection.ends.complete:
                await self._take(self._connection)
        finally:
            self.inbound.end()
        await self._finish()

    async def _bring_in_rest(self) -> None:
        """Deliver what comes over the second connection, at the gateway."""
        assert self._get_second is not None
        try:
            async with asyncio.timeout(self._timing.done_s):
                self._second = second = await self._get_second()
                self.inbound.joins(source=second.stream)
        except TimeoutError:
            raise EOFError from None
        while not self._delivered:
            await self._take(second)

    async def _take(self, source: CapsuleConnection) -> None:
        """Move what comes next, or confirm the end."""
        if source.exhausted and not self._delivered:
            self._delivered = True
            self._plain.shutdown_write()
            if source is not self._connection:
                self._connection.ends.end_elsewhere()
            try:
                await self._connection.send(Finished())
            except OSError as error:  # as if found by reading: perhaps no task reads there that would find out
                raise Lost(self._connection.stream, writing=False) from error
            self._activity.limit(self._half_close_timeout_s)
        elif self.inbound.pipe is not None and source.payload_left:
            await self._splice_in(source)
        else:
            await self._copy_in(source)
        if self._side is Side.GATEWAY and source is self._connection:
            self._report()

    async def _copy_in(self, source: CapsuleConnection) -> None:
        """Read once and deliver what was read."""
        size = 0
        tail = b""
        try:
            events = await source.read(exact=self.inbound.pipe is not None)
        except OSError as error:
            raise Lost(source.stream, writing=False) from error
        for event in events:
            if type(event) is Payload:
                size += len(event.data)
                tail = bytes(event.data[-TAIL_BYTES:])
                await self._deliver(event.data)
            elif type(event) is Control:
                self._handle(parse_control(event))
        if size:
            self.inbound.copied(size, tail)

    async def _splice_in(self, source: CapsuleConnection) -> None:
        """Splice at most the rest of the current capsule."""
        pipe = self.inbound.pipe
        assert pipe is not None
        try:
            size = await fill(source.stream, pipe, min(source.payload_left, self.inbound.most_in_pipe))
        except OSError as error:
            raise Lost(source.stream, writing=False) from error
        if not size:
            raise EOFError
        source.skip_payload(size)
        try:
            await drain(self.inbound, self._plain)
        except OSError as error:
            raise Lost(self._plain, writing=True) from error
        self.inbound.spliced(size)

    async def _deliver(self, data: bytes | memoryview) -> None:
        try:
            await self._plain.send(data)
        except OSError as error:
            if not self._ignores(len(data)):
                raise Lost(self._plain, writing=True) from error

    def _has_left(self) -> bool:
        """Return whether the plain stream's reset is how its peer has left. Clients do that which leave a close_notify unread."""
        if self._cut is not None:
            return False
        into = self.inbound if self._side is Side.RELAY else None
        return has_left(self._plain, self.outbound, into, is_close_notify, is_over=self._delivered)

    def _ignores(self, size: int) -> bool:
        """Return whether the plain stream's peer, which has sent its end and is gone, misses no more than a close_notify."""
        self._ignored += size
        return self._is_sent and self._cut is None and self._ignored <= MAX_UNREAD

    def _handle(self, message: Message) -> None:
        """Handle a control capsule that the state machines allow."""
        if isinstance(message, Received):
            if not self._received <= message.count <= self._connection.sent:
                raise CapsuleError("RECEIVED of bytes that were not sent")
            self._received = message.count
            self._news.set()
        elif isinstance(message, Continued):
            if self._get_second is None:
                raise CapsuleError("CONTINUED on a direct connection")
            self._spawn(self._way(self._bring_in_rest))

    def _report(self) -> None:
        """Report now and then how much has arrived, in a separate task, because the other direction may be full."""
        if self._get_second is None or self._connection.received - self._reported < RECEIVED_INTERVAL:
            return
        if not self._reported:
            self._spawn(self._keep_reporting())
        self._reported = self._connection.received
        self._news.set()

    async def _keep_reporting(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._connection.send(Received(self._reported))
            except OSError:
                return  # both directions find out by themselves

    async def _finish(self) -> None:
        """Close in order, once all is delivered and confirmed both ways: the relay sends DONE, the gateway closes first."""
        try:
            async with asyncio.timeout(self._timing.done_s):
                if self._side is Side.RELAY:
                    await self._connection.send(Done())
                    while await self._connection.stream.recv():
                        pass
                else:
                    while not self._connection.ends.done:
                        await self._connection.read()
        except (OSError, EOFError, CapsuleError, TimeoutError):
            pass  # both sides have confirmed, so nothing is lost without DONE
