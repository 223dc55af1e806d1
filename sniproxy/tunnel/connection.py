"""Capsules over a byte stream, in the order that the state machines allow (sniproxy.tunnel.state), and at a limited rate."""

import asyncio

from discovery.pacing.token_bucket import TokenBucket
from sniproxy.engine import ByteStream, CopyDirection, drain
from sniproxy.engine.byte_stream import DEFAULT_READ_BYTES
from sniproxy.engine.quantum import QUANTUM_MESSAGES
from sniproxy.tunnel.capsules import (
    CapsuleError,
    CapsuleFlood,
    CapsuleReader,
    CapsuleType,
    Control,
    Event,
    Header,
    Payload,
    header,
)
from sniproxy.tunnel.messages import Message, parse_control
from sniproxy.tunnel.state import LIMIT_REFUSED_S, Side, StreamState

CONTROL_PER_S = 4.0
CONTROL_BURST = 64
"""Capsules without payload that a peer may send: control capsules, empty DATA, and unknown types. A stream has eight in its whole
life, a warm connection a PING every 25 s. The rest is room for later versions."""

RECEIVED_BYTES = 16 * 1024
"""RECEIVED has its own limit: one for so many bytes sent. Gateways send it every 32 KiB (RECEIVED_INTERVAL)."""


class CapsuleConnection:
    """One side of a connection that carries capsules. Checks their order and rate."""

    __slots__ = (
        "_control",
        "_pending",
        "_reader",
        "_receipts",
        "_rest",
        "_tail",
        "_writing",
        "ends",
        "received",
        "sent",
        "stream",
    )

    def __init__(self, stream: ByteStream, side: Side) -> None:
        self.stream = stream
        self.ends = StreamState(side)
        self._reader = CapsuleReader()
        self._pending: list[Event] = []
        self._rest = memoryview(b"")  # bytes of the last read that are not parsed yet
        self._control: TokenBucket | None = None  # made when the first control capsule comes
        self._receipts = 0
        self._writing = asyncio.Lock()
        self._tail = b""  # of a capsule that the stream took in part
        self.sent = 0
        """Bytes written to the stream from its first one on, including preamble and headers."""
        self.received = 0
        """Bytes read from the stream, counted in the same way."""

    async def send(self, *messages: Message, data: bytes = b"") -> None:
        """Send control capsules, then DATA if there is any, in one write and never inside another capsule.

        Raises OSError if the connection is gone.
        """
        async with self._writing:
            for message in messages:
                self.ends.sent(message.type)
            buffers = [message.pack() for message in messages]
            if data:
                self.ends.sent(CapsuleType.DATA)
                buffers += (header(CapsuleType.DATA, len(data)), data)
            await self._write(*buffers)

    def try_send(self, message: Message) -> None:
        """Send a control capsule if the stream takes it at once, and drop it if something else is being written.

        OSError if the connection is gone.
        """
        if self._writing.locked() or self._tail:
            return
        data = message.pack()
        taken = self.stream.try_send((data,))
        if taken:
            self.ends.sent(message.type)
            self.sent += len(data)
            self._tail = data[taken:]  # goes out with the next write

    async def begin(self, preamble: bytes, data: bytes) -> None:
        """Send the preamble and the first DATA capsule in one write, so that a TURN server buffers both until the bind.

        Without data, the preamble is sent alone.
        """
        async with self._writing:
            if not data:
                await self._write(preamble)
                return
            self.ends.sent(CapsuleType.DATA)
            await self._write(preamble, header(CapsuleType.DATA, len(data)), data)

    async def send_data(self, data: bytes, *, final: bool = False) -> None:
        """Send one DATA or FINAL_DATA capsule."""
        kind = CapsuleType.FINAL_DATA if final else CapsuleType.DATA
        async with self._writing:
            self.ends.sent(kind)
            await self._write(header(kind, len(data)), data)

    async def send_spliced(self, direction: CopyDirection) -> None:
        """Send the content of the direction's pipe as one DATA capsule."""
        pipe = direction.pipe
        assert pipe is not None
        async with self._writing:
            self.ends.sent(CapsuleType.DATA)
            self.sent += pipe.held
            await self._write(header(CapsuleType.DATA, pipe.held), more=True)
            await drain(direction, self.stream)

    async def _write(self, *buffers: bytes, more: bool = False) -> None:
        self.sent += sum(map(len, buffers))
        if self._tail:
            buffers, self._tail = (self._tail, *buffers), b""
        await self.stream.send(*buffers, more=more)

    async def read(self, *, exact: bool = False) -> list[Event]:
        """Wait for bytes and return the events that they complete, perhaps none, checked against the state machines.

        Args:
            exact: read no payload together with a header, so that it can be spliced.

        Raises:
            EOFError: the connection ended.
            OSError: it was reset.
            CapsuleError: the peer broke the protocol.
        """
        if self._pending:
            events, self._pending = self._pending, []
            return events
        stream = self.stream
        if self._rest:
            await stream.take_turn()
            stream.quantum.spend(0)
        else:
            data = await stream.recv((exact and self._reader.header_bytes_wanted) or DEFAULT_READ_BYTES)
            if not data:
                raise EOFError
            self.received += len(data)
            self._rest = memoryview(data)
        unknown = self._reader.unknown
        events, used = self._reader.take(self._rest, QUANTUM_MESSAGES)
        # An empty view of the last read would keep its bytes in memory while the stream is idle.
        self._rest = self._rest[used:] if used < len(self._rest) else memoryview(b"")
        capsules = control = self._reader.unknown - unknown
        for event in events:
            if isinstance(event, Payload):
                continue
            capsules += 1
            self.ends.received(event.type)
            if event.type is CapsuleType.RECEIVED:
                self._count_receipt()
            elif not (isinstance(event, Header) and event.length):
                control += 1
        if capsules > 1:
            stream.quantum.spend(0, capsules - 1)
        if control:
            self._count_control(control)
        return events

    def _count_control(self, count: int) -> None:
        now = asyncio.get_running_loop().time()
        if self._control is None:
            self._control = TokenBucket(CONTROL_PER_S, CONTROL_BURST, now)
        if not self._control.take(count, now):
            raise CapsuleFlood(
                f"more than {CONTROL_BURST} capsules without payload at once and {CONTROL_PER_S:g} per second after that"
            )

    def _count_receipt(self) -> None:
        self._receipts += 1
        if self._receipts > 1 + self.sent // RECEIVED_BYTES:
            raise CapsuleFlood(f"{self._receipts} RECEIVED capsules for {self.sent} bytes")

    def put_back(self, events: list[Event]) -> None:
        """Give events back: the next `read` returns them first."""
        self._pending = events + self._pending

    async def next_message(self) -> Message:
        """Wait for the next capsule, which must be a control capsule. Raises as `read`."""
        while True:
            events = await self.read()
            if events:
                self.put_back(events[1:])
                if not isinstance(events[0], Control):
                    raise CapsuleError("DATA where a control capsule is due")
                return parse_control(events[0])

    @property
    def exhausted(self) -> bool:
        """Whether everything up to the end of FINAL_DATA has been returned by `read` or skipped."""
        return self.ends.final_received and not self._holds_input and not self._reader.payload_left

    @property
    def payload_left(self) -> int:
        """Bytes of the current capsule that are still in the stream and may be spliced instead of read."""
        return 0 if self._holds_input else self._reader.payload_left

    @property
    def _holds_input(self) -> bool:
        """Whether something was read from the stream that `read` has not returned yet."""
        return bool(self._pending or self._rest)

    def skip_payload(self, count: int) -> None:
        """Note that `count` bytes of payload were spliced instead of read."""
        self.received += count
        self._reader.skip_payload(count)

    async def discard(self, limit_s: float = LIMIT_REFUSED_S) -> None:
        """Read and discard for at most `limit_s` seconds, then close, so that the last capsule arrives."""
        try:
            async with asyncio.timeout(limit_s):
                while await self.stream.recv():
                    pass
        except (OSError, TimeoutError):
            pass
        finally:
            self.stream.close()
