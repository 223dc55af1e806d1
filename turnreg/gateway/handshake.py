"""The start of a stream at the gateway, up to the end of its ClientHello: its preamble must prove who sends it and where to."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from sniproxy.formats.client_hello import HelloError, HelloReader
from sniproxy.streams.end_reason import Reason
from sniproxy.streams.stream_log import StreamRecord
from sniproxy.transport.base import Accepted
from sniproxy.tunnel.capsules import Payload
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.preamble import (
    FirstBytes,
    Preamble,
    PreambleError,
    SigningKey,
    WarmPreamble,
    classify_first_bytes,
    read_length,
)
from sniproxy.tunnel.verify import PreambleVerifier, ReplayCache, check_hello

_PREAMBLE_START = 16
"""The first 16 bytes of a PROXY v2 header contain its length."""


class StreamRefused(Exception):
    """A stream is refused. `told` is the reason and detail that its relay is sent, or None if it is sent nothing.

    `tell` is false for peers that are not verified and do not speak our protocol. Pass `told` to send something other than what is
    logged.
    """

    def __init__(
        self, reason: Reason, detail: str, *, tell: bool = True, told: tuple[Reason, str] | None = None
    ) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.told = (told or (reason, detail)) if tell else None


@dataclass(slots=True)
class InboundStream:
    """State of a connection while it opens a stream."""

    connection: CapsuleConnection
    accepted: Accepted
    """The connection and its transport."""
    record: StreamRecord
    is_stream: bool = True
    """False for a second connection, and while a connection is only kept ready: these have no record."""
    preamble: Preamble | None = None
    counted: bool = False
    """It is counted as a stream of its network."""
    handed_over: bool = False
    """A second connection now belongs to its stream, which closes it."""
    evicted: bool = False
    """We closed it to make room before it had sent a complete preamble."""
    data: bytearray = field(default_factory=bytearray)

    def let_go(self) -> None:
        """End the connection if it is still open. Nobody was told anything on it that could be lost."""
        if self.accepted.traits.gateway_dials:
            self.connection.stream.reset()  # a close would keep our local port for a minute (TIME_WAIT)
        else:
            self.connection.stream.close()


class InboundHandshakes:
    """Verifies preambles, and bounds the connections that have not sent one yet."""

    def __init__(
        self, keys: Mapping[str, SigningKey], network: str, *, epoch: bytes, require_epoch: bool, max_unproven: int
    ) -> None:
        self._max_unproven = max_unproven
        self._verifier = PreambleVerifier(keys, network, epoch=epoch, require_epoch=require_epoch)
        self._unproven: dict[int, InboundStream] = {}  # by identity, the oldest first

    def __len__(self) -> int:
        return len(self._unproven)

    @property
    def keys(self) -> Mapping[str, SigningKey]:
        """Keys by id, those of other directions included."""
        return self._verifier.keys

    @property
    def networks(self) -> int:
        """Number of networks that have a key for us."""
        return self._verifier.networks

    @property
    def remembered(self) -> ReplayCache:
        """The preambles seen recently, which must not be accepted again."""
        return self._verifier.replays

    def reconfigure(self, keys: Mapping[str, SigningKey], *, require_epoch: bool) -> None:
        """Use these from now on."""
        self._verifier.keys, self._verifier.require_epoch = keys, require_epoch

    async def prove(self, arrival: InboundStream) -> Preamble | WarmPreamble:
        """Read and verify the preamble. If too many connections do this at once, the oldest one is closed.

        Raises:
            StreamRefused: not a preamble, or not a valid one.
            EOFError, OSError: the connection ended before.
        """
        self._unproven[id(arrival)] = arrival
        try:
            if len(self._unproven) > self._max_unproven:
                oldest = self._unproven.pop(next(iter(self._unproven)))
                oldest.evicted = True
                oldest.let_go()  # its task's read fails
            return await self._read_preamble(arrival)
        except OSError as error:
            if not arrival.evicted:
                raise
            detail = f"{self._max_unproven} connections have sent no complete preamble, and this was the oldest"
            raise StreamRefused(Reason.OVERLOADED, detail, tell=False) from error
        finally:
            self._unproven.pop(id(arrival), None)

    async def _read_preamble(self, arrival: InboundStream) -> Preamble | WarmPreamble:
        stream = arrival.connection.stream
        start = await self._first_bytes(arrival)
        start += await stream.recv_exactly(_PREAMBLE_START - len(start))
        if classify_first_bytes(start) is not FirstBytes.PROXY:
            raise StreamRefused(Reason.PROTOCOL_ERROR, "it does not begin with a preamble", tell=False)
        try:
            length = read_length(start)
        except PreambleError as error:
            raise StreamRefused(error.reason, error.detail) from error
        assert length is not None
        header = start + await stream.recv_exactly(length - len(start))
        arrival.connection.received += length
        return self.verify(arrival, header)

    async def _first_bytes(self, arrival: InboundStream) -> bytes:
        """Read what comes first. Raises StreamRefused (probe) if nothing does before the end."""
        try:
            data = await arrival.connection.stream.recv(_PREAMBLE_START)
        except OSError as error:
            if arrival.evicted:
                raise
            raise StreamRefused(Reason.PROBE, "reset without a byte", tell=False) from error
        if not data:
            raise StreamRefused(Reason.PROBE, "closed without a byte", tell=False)
        return data

    def verify(self, arrival: InboundStream, header: bytes) -> Preamble | WarmPreamble:
        """Verify a complete header and return its preamble. Raises StreamRefused if it is not valid."""
        try:
            preamble = self._verifier.verify(
                header, addressee=arrival.accepted.addressee, now_ms=time.time_ns() // 1_000_000
            )
        except PreambleError as error:
            raise StreamRefused(error.reason, error.detail, told=error.told) from error
        if isinstance(preamble, Preamble):
            arrival.preamble = preamble
            arrival.record.stream = preamble.stream_id
            arrival.record.fields |= {
                "client": preamble.client[0],
                "sni": preamble.authority,
                "from_network": preamble.from_network,
                "key_id": preamble.key_id,
                "target": preamble.target,
                "attempt": preamble.attempt,
            }
        return preamble


async def read_hello(arrival: InboundStream, preamble: Preamble, max_hello_bytes: int) -> None:
    """Read to the end of the ClientHello, and check that it is the one that was signed.

    Raises:
        StreamRefused: it is another one, or not a ClientHello.
        CapsuleError: the relay broke the protocol.
        EOFError, OSError: the connection ended before.
    """
    connection = arrival.connection
    reader = HelloReader(max_hello_bytes)
    hello = None
    try:
        while hello is None:
            events = await connection.read()
            for index, event in enumerate(events):
                if isinstance(event, Payload):
                    hello = reader.feed(event.data)
                    if hello is not None:
                        connection.put_back(events[index + 1 :])
                        break
            if hello is None and connection.exhausted:
                raise StreamRefused(Reason.BAD_HELLO, "the stream ends inside its ClientHello")
        check_hello(preamble, hello.server_name, hello.digest)
    except HelloError as error:
        raise StreamRefused(Reason(error.reason.value), error.detail) from error
    except PreambleError as error:
        raise StreamRefused(error.reason, error.detail) from error
    arrival.data += reader.raw
