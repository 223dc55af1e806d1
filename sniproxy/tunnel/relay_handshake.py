"""What a relay says to a gateway until a service is there: on a new connection, or on one that was kept ready.

No client's byte may arrive twice but a ClientHello's: each way in which it can fail says whether another gateway may be asked.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sniproxy.engine import ByteStream
from sniproxy.formats.client_hello import Hello
from sniproxy.streams.end_reason import RETRYABLE, Reason
from sniproxy.transport.base import Candidate, CandidateKey
from sniproxy.transport.errors import DialError, ResetBeforeReady, StaleEpoch, WarmLost
from sniproxy.tunnel.capsules import HEADER_SIZE, CapsuleError
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.epoch import UNKNOWN_EPOCH, epoch_in, told_epoch
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.messages import TOKEN_SIZE, Message, Opened, Pong, Ready, Refused, Waiting
from sniproxy.tunnel.preamble import STREAM_ID_SIZE, Preamble, PreambleError, SigningKey, WarmPreamble, sign
from sniproxy.tunnel.state import LIMIT_OPENED_S, LIMIT_WAITING_S, Side

MAX_TOLD = 1024
"""Ways whose epoch was told by a gateway and not by a record: a static file has few."""

_RECORD_HEADER = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """What a client brought: everything that each attempt carries."""

    stream: bytes
    client: tuple[str, int]
    local: tuple[str, int]
    hello: Hello
    data: bytes
    """All bytes read from the client so far, to be delivered unchanged."""

    @property
    def hello_end(self) -> int:
        """Where in `data` the ClientHello's last record ends: early data, which may come behind it, must not run twice."""
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
    ) -> None:
        """Sign for relays of this network, with the time that `now_ms` gives (unix, milliseconds).

        `ready_timeout_s` is for every transport, in place of its own.
        """
        self._network = network
        self._keys = keys
        self._now_ms = now_ms
        self._told: OrderedDict[CandidateKey, tuple[bytes | None, bytes]] = OrderedDict()
        """By way the epoch that its record had when a gateway told us a newer one, and that one."""
        self._ready_timeout_s = ready_timeout_s
        self._open_timeout_s = open_timeout_s

    async def open(
        self, call: StreamRequest, candidate: Candidate, attempt: int, wire: ByteStream
    ) -> CapsuleConnection:
        """Open a stream on a new connection, which is reset where that fails; all of `call.data` has been sent then.

        Raises:
            ResetBeforeReady: it was cut before a gateway said anything.
            DialError: otherwise.
        """
        framed = CapsuleConnection(wire, Side.RELAY)
        try:
            preamble, header = self._preamble(call, candidate, attempt)
            room = candidate.traits.first_write_limit - len(header) - HEADER_SIZE
            first, rest = call.data[:room], call.data[room:]
            await self._greet(framed, header, first, candidate, preamble)
            # From here on the gateway may deliver what we send: neither silence nor a cut may bring it to another one.
            await self._await_opened(framed, candidate, partial(framed.send_data, rest) if rest else None)
        except BaseException:
            wire.reset()
            raise
        return framed

    async def open_warm(
        self, call: StreamRequest, candidate: Candidate, attempt: int, framed: CapsuleConnection
    ) -> None:
        """Open a stream on a connection that was kept ready (`warm_up`), which is reset where that fails.

        Raises:
            DialError: as for a new connection behind READY.
            WarmLost: it was dead. A ClientHello may arrive twice; what is behind it is sent when the gateway has answered.
        """
        token, end = os.urandom(TOKEN_SIZE), call.hello_end
        hello, rest = call.data[:end], call.data[end:]
        preamble, header = self._preamble(call, candidate, attempt)
        try:
            await self._until(
                Pong,
                framed,
                partial(framed.open, token, header, hello),
                limit_s=candidate.traits.ready_timeout_s if self._ready_timeout_s is None else self._ready_timeout_s,
                late=lambda: WarmLost(candidate, silent=True),
                cut=lambda: WarmLost(candidate, silent=False),
                final=True,
            )
            await self._await_opened(framed, candidate, partial(framed.send_data, rest) if rest else None)
        except DialError as error:
            framed.wire.reset()
            self._learn(candidate, preamble, error)
            raise
        except BaseException:
            framed.wire.reset()
            raise

    async def warm_up(self, candidate: Candidate, wire: ByteStream) -> CapsuleConnection:
        """Have a gateway be ready for a stream on a new connection, which is reset where that fails.

        Raises:
            ResetBeforeReady: it was cut before the gateway said anything.
            DialError: the gateway does not want it.
        """
        framed = CapsuleConnection(wire, Side.RELAY)
        framed.ends.warm = True
        try:
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
            header = sign(preamble, key.secret)
            await self._greet(framed, header, b"", candidate, preamble)
        except PreambleError as error:
            wire.reset()
            raise DialError(Reason.OTHER, f"{candidate}: {error.detail}") from error
        except BaseException:
            wire.reset()
            raise
        return framed

    async def join(
        self, call: StreamRequest, candidate: Candidate, attempt: int, wire: ByteStream
    ) -> CapsuleConnection:
        """Join a new connection to a stream that is open at this candidate, for its upload. Errors as for `open`."""
        framed = CapsuleConnection(wire, Side.RELAY)
        try:
            preamble, header = self._preamble(call, candidate, attempt, continues=True)
            await self._greet(framed, header, b"", candidate, preamble)
        except BaseException:
            wire.reset()
            raise
        return framed

    async def _greet(
        self,
        framed: CapsuleConnection,
        header: bytes,
        first: bytes,
        candidate: Candidate,
        preamble: Preamble | WarmPreamble,
    ) -> None:
        """Send the preamble and what goes with it, and wait for READY."""
        limit_s = candidate.traits.ready_timeout_s if self._ready_timeout_s is None else self._ready_timeout_s
        try:
            await self._until(
                Ready,
                framed,
                partial(framed.begin, header, first),
                limit_s=limit_s,
                late=lambda: DialError(Reason.READY_TIMEOUT, f"{candidate}: no gateway answered in {limit_s} s"),
                cut=lambda: ResetBeforeReady(f"{candidate}: cut before a gateway answered"),
                final=False,
            )
        except DialError as error:
            self._learn(candidate, preamble, error)
            raise

    def _epoch(self, candidate: Candidate) -> bytes:
        """Return the epoch to sign: what its record tells, unless a gateway has told a newer one since."""
        record = epoch_in(candidate.proto)
        before, told = self._told.get(candidate.key, (record, record))
        return (told if before == record else record) or UNKNOWN_EPOCH

    def _learn(self, candidate: Candidate, preamble: Preamble | WarmPreamble, error: DialError) -> None:
        """Take the gateway's epoch from its refusal, if that is what it says and it proves to have our key. Raises StaleEpoch."""
        if error.reason is not Reason.STALE_EPOCH:
            return
        epoch = told_epoch(error.said, self._key(candidate).secret, preamble.once)
        if epoch is None or epoch == preamble.epoch:
            return
        self._told[candidate.key] = epoch_in(candidate.proto), epoch
        self._told.move_to_end(candidate.key)
        if len(self._told) > MAX_TOLD:
            self._told.popitem(last=False)
        raise StaleEpoch(error.reason, f"{candidate}: another process of the gateway is there now", answered=True)

    async def _until(
        self,
        wanted: type[Message],
        framed: CapsuleConnection,
        send: Callable[[], Awaitable[None]] | None,
        *,
        limit_s: float,
        late: Callable[[], Exception],
        cut: Callable[[], Exception],
        final: bool,
    ) -> None:
        """Send, then wait for `wanted`. A refusal, a broken protocol, silence and a cut each have their exception.

        Args:
            final: a refusal that does not say that nothing was delivered forbids to ask another gateway.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout_at(began + limit_s) as deadline:
                if send is not None and not framed.ends.refused:  # which may have come along with READY
                    # What the gateway said before it closed is still there to be read; if nothing is, reading says so.
                    with suppress(OSError):
                        await send()
                message = await framed.next_message()
                while isinstance(message, Waiting):
                    deadline.reschedule(min(loop.time() + message.seconds, began + LIMIT_WAITING_S) + limit_s)
                    message = await framed.next_message()
        except TimeoutError:
            raise late() from None
        except (OSError, EOFError) as error:
            raise cut() from error
        except CapsuleError as error:
            # READY may have come in the same read as what is wrong, or whoever speaks there takes our bytes for its own.
            raise DialError(error.reason, str(error), final=True) from error
        if isinstance(message, Refused):
            reason = Reason(message.reason) if message.reason in set(Reason) else Reason.OTHER
            detail = f"the gateway refused: {message.detail}"
            refused = DialError(reason, detail, final=final and reason not in RETRYABLE, answered=True)
            refused.said = message.detail
            raise refused
        if not isinstance(message, wanted):
            said = f"{type(message).__name__} instead of {wanted.__name__}"
            raise DialError(Reason.PROTOCOL_ERROR, said, final=True)

    async def _await_opened(
        self, framed: CapsuleConnection, candidate: Candidate, send: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        await self._until(
            Opened,
            framed,
            send,
            limit_s=self._open_timeout_s,
            late=lambda: DialError(
                Reason.OPEN_TIMEOUT, f"{candidate}: the gateway did not open in {self._open_timeout_s} s", final=True
            ),
            cut=lambda: DialError(Reason.TRUNCATED, f"{candidate}: cut while the gateway was opening", final=True),
            final=True,
        )

    def _preamble(
        self, call: StreamRequest, candidate: Candidate, attempt: int, *, continues: bool = False
    ) -> tuple[Preamble, bytes]:
        """Return the preamble of an attempt and its signed header."""
        key = self._key(candidate)
        preamble = Preamble(
            client=call.client,
            local=call.local,
            authority=call.hello.server_name,
            stream_id=call.stream,
            from_network=self._network,
            to_network=candidate.network,
            addressee=candidate.addressee,
            key_id=key.id,
            time_ms=self._now_ms(),
            target=candidate.target,
            hello_digest=call.hello.digest,
            attempt=attempt,
            continues=continues,
            epoch=self._epoch(candidate),
            imports=candidate.imports,
        )
        try:
            return preamble, sign(preamble, key.secret)
        except PreambleError as error:
            raise DialError(Reason.OTHER, f"{candidate}: {error.detail}", final=True) from error

    def _key(self, candidate: Candidate) -> SigningKey:
        key = self._keys.get(self._network, candidate.network)
        if key is None:
            raise DialError(Reason.NO_KEY, f"no key signs streams to {candidate.network!r}", final=True)
        return key
