"""Opens streams at gateways, for a relay: on a new connection or on a warm one.

The messages and the meaning of the answers are in `sniproxy.tunnel.handshake`. This module does the I/O.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from sniproxy.engine import ByteStream
from sniproxy.formats.client_hello import Hello
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate, CandidateKey
from sniproxy.transport.errors import DialError
from sniproxy.tunnel import heartbeat
from sniproxy.tunnel.capsules import CapsuleError
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.epoch import UNKNOWN_EPOCH, epoch_in
from sniproxy.tunnel.handshake import (
    Failed,
    RelayHandshake,
    Send,
    Signed,
    Step,
    Timing,
    Wait,
    greeting,
    opening,
    opening_on_warm,
)
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.messages import TOKEN_SIZE
from sniproxy.tunnel.preamble import STREAM_ID_SIZE, Preamble, PreambleError, SigningKey, WarmPreamble, sign
from sniproxy.tunnel.state import LIMIT_OPENED_S, LIMIT_WAITING_S, Side

MAX_TOLD = 1024
"""Candidates whose epoch came from a gateway's refusal and not from its record. A static mesh file has few."""

_RECORD_HEADER = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """A client's request for a stream: everything that each attempt to open it needs."""

    stream: bytes
    client: tuple[str, int]
    local: tuple[str, int]
    hello: Hello
    data: bytes
    """All bytes read from the client so far, to be delivered unchanged."""

    @property
    def hello_end(self) -> int:
        """The offset in `data` where the ClientHello's last record ends. Early data may follow, and must not be sent twice."""
        at, left = 0, self.hello.size
        while left > 0:
            length = int.from_bytes(self.data[at + 3 : at + _RECORD_HEADER], "big")
            at += _RECORD_HEADER + length
            left -= length
        return at


class GatewayConnector:
    """Opens streams at gateways, for one relay."""

    def __init__(
        self,
        network: str,
        keys: SigningKeys,
        *,
        now_ms: Callable[[], int],
        ready_timeout_s: float | None = None,
        open_timeout_s: float = LIMIT_OPENED_S,
        waiting_limit_s: float = LIMIT_WAITING_S,
    ) -> None:
        """Open streams for a relay of this network.

        Args:
            network: the relay's own network.
            keys: the signing keys by direction.
            now_ms: returns the time (unix, milliseconds).
            ready_timeout_s: for every transport, instead of the transport's own.
            open_timeout_s: from READY to OPENED.
            waiting_limit_s: the most that a gateway can add to this while a service is being started.
        """
        self._network = network
        self._keys = keys
        self._now_ms = now_ms
        self._told: OrderedDict[CandidateKey, tuple[bytes | None, bytes]] = OrderedDict()
        """By candidate: the epoch in its record when a gateway told us a newer one, and the newer one."""
        self._ready_timeout_s = ready_timeout_s
        self._open_timeout_s = open_timeout_s
        self._waiting_limit_s = waiting_limit_s

    async def open(
        self, request: StreamRequest, candidate: Candidate, attempt: int, stream: ByteStream
    ) -> CapsuleConnection:
        """Open a stream on a new connection, and send all of `request.data`. The connection is reset if that fails.

        Raises:
            ResetBeforeReady: the connection was cut before a gateway answered.
            DialError: any other failure.
        """
        with _ResetOnError(stream):
            signed = self._sign_stream(request, candidate, attempt)
            connection = CapsuleConnection(stream, Side.RELAY)
            await self._run(opening(candidate, signed, self._timing(candidate), request.data), connection, candidate)
            return connection

    async def open_warm(
        self, request: StreamRequest, candidate: Candidate, attempt: int, connection: CapsuleConnection
    ) -> None:
        """Open a stream on a warm connection (`warm_up`). The connection is reset if that fails.

        Raises:
            DialError: as for a new connection after READY.
            WarmLost: the connection was dead. The ClientHello may arrive twice; the data behind it is sent only after PONG.
        """
        with _ResetOnError(connection.stream):
            signed = self._sign_stream(request, candidate, attempt)
            end = request.hello_end
            handshake = opening_on_warm(
                candidate,
                signed,
                self._timing(candidate),
                request.data[:end],
                request.data[end:],
                token=os.urandom(TOKEN_SIZE),
            )
            await self._run(handshake, connection, candidate)

    async def warm_up(self, candidate: Candidate, stream: ByteStream) -> CapsuleConnection:
        """Make a new connection warm: the gateway is ready for a stream on it. The connection is reset if that fails.

        Raises:
            ResetBeforeReady: the connection was cut before the gateway answered.
            DialError: the gateway refused it.
        """
        with _ResetOnError(stream):
            key = self._key(candidate)
            preamble = WarmPreamble(
                nonce=os.urandom(STREAM_ID_SIZE),
                from_network=self._network,
                to_network=candidate.network,
                addressee=candidate.addressee,
                key_id=key.id,
                time_ms=self._now_ms(),
                epoch=self._epoch(candidate),
            )
            signed = _signed(preamble, key, candidate, final=False)
            connection = CapsuleConnection(stream, Side.RELAY)
            connection.ends.warm = True
            await self._run(greeting(candidate, signed, self._timing(candidate)), connection, candidate)
            return connection

    async def join(
        self, request: StreamRequest, candidate: Candidate, attempt: int, stream: ByteStream
    ) -> CapsuleConnection:
        """Make a new connection the second one of a stream that is open at this candidate, for its upload. Raises as `open`."""
        with _ResetOnError(stream):
            signed = self._sign_stream(request, candidate, attempt, continues=True)
            connection = CapsuleConnection(stream, Side.RELAY)
            await self._run(greeting(candidate, signed, self._timing(candidate)), connection, candidate)
            return connection

    async def _run(self, handshake: RelayHandshake, connection: CapsuleConnection, candidate: Candidate) -> None:
        """Run a handshake. Raises its error."""
        step = await _drive(handshake, connection)
        if not isinstance(step, Failed):
            return
        if handshake.told is not None:
            self._told[candidate.key] = epoch_in(candidate.proto), handshake.told
            self._told.move_to_end(candidate.key)
            if len(self._told) > MAX_TOLD:
                self._told.popitem(last=False)
        try:
            raise step.error
        finally:
            del step  # the error's traceback holds this frame: a reference cycle for each stream that fails

    def _timing(self, candidate: Candidate) -> Timing:
        ready_s = candidate.traits.ready_timeout_s if self._ready_timeout_s is None else self._ready_timeout_s
        return Timing(ready_s, self._open_timeout_s, self._waiting_limit_s)

    def _epoch(self, candidate: Candidate) -> bytes:
        """Return the epoch to sign: that of the record, unless the gateway has told a newer one since."""
        record = epoch_in(candidate.proto)
        before, told = self._told.get(candidate.key, (record, record))
        return (told if before == record else record) or UNKNOWN_EPOCH

    def _sign_stream(
        self, request: StreamRequest, candidate: Candidate, attempt: int, *, continues: bool = False
    ) -> Signed:
        """Sign the preamble of an attempt. Raises DialError."""
        key = self._key(candidate)
        preamble = Preamble(
            client=request.client,
            local=request.local,
            authority=request.hello.server_name,
            stream_id=request.stream,
            from_network=self._network,
            to_network=candidate.network,
            addressee=candidate.addressee,
            key_id=key.id,
            time_ms=self._now_ms(),
            target=candidate.target,
            hello_digest=request.hello.digest,
            attempt=attempt,
            continues=continues,
            epoch=self._epoch(candidate),
            imports=candidate.imports,
            heartbeats=heartbeat.PROTO in candidate.proto,
        )
        return _signed(preamble, key, candidate, final=True)

    def _key(self, candidate: Candidate) -> SigningKey:
        key = self._keys.get(self._network, candidate.network)
        if key is None:
            raise DialError(Reason.NO_KEY, f"no key signs streams to {candidate.network!r}", final=True)
        return key


class _ResetOnError:
    """Resets a stream if the block fails, because nothing owns it then."""

    __slots__ = ("_stream",)

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stream.reset()


def _signed(preamble: Preamble | WarmPreamble, key: SigningKey, candidate: Candidate, *, final: bool) -> Signed:
    try:
        return Signed(preamble, sign(preamble, key.secret), key.secret)
    except PreambleError as error:
        raise DialError(Reason.OTHER, f"{candidate}: {error.detail}", final=final) from error


async def _drive(handshake: RelayHandshake, connection: CapsuleConnection) -> Step:
    """Follow the steps of a handshake until it has ended."""
    loop = asyncio.get_running_loop()
    step: Step
    step = begun = handshake.start(loop.time())
    # The result is returned and not raised here: a traceback would tie it to this frame.
    try:
        async with asyncio.timeout_at(begun.until) as deadline:
            while isinstance(step, Wait):
                if step is not begun:
                    deadline.reschedule(step.until)
                if step.send is not None and not connection.ends.refused:  # REFUSED may have come together with READY
                    # If sending fails, what the gateway sent before it closed can still be read; otherwise reading fails too.
                    with suppress(OSError):
                        await _send(connection, step.send)
                step = handshake.heard(await connection.next_message(), loop.time())
        return step
    except TimeoutError:
        return handshake.silent()
    except (OSError, EOFError):
        return handshake.cut()
    except CapsuleError as error:
        return handshake.broken(error)


async def _send(connection: CapsuleConnection, send: Send) -> None:
    if send.preamble:
        await connection.begin(send.preamble, send.data)
    elif send.messages:
        await connection.send(*send.messages, data=send.data)
    else:
        await connection.send_data(send.data)
