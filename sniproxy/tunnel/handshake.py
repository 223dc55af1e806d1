"""The relay's side of the handshake with a gateway, without I/O: it takes events and returns the next step.

    handshake = opening(candidate, signed, timing, data)
    step = handshake.start(now)
    while isinstance(step, Wait):           write step.send, if there is one; then wait, at most until step.until
        step = handshake.heard(message, now)        or handshake.cut(), silent(), broken(error)

It ends with Established, or with Failed and an error that says whether another gateway may be tried. No byte of a client may arrive
twice, except those of a ClientHello: PROTOCOL.md has the rules in section 6, "What may be sent twice".

    opening           preamble, DATA ──▶ READY ──▶ the rest ──▶ OPENED
    opening_on_warm   PING, OPEN, DATA ──▶ PONG ──▶ the rest ──▶ OPENED
    greeting          preamble ──▶ READY                                a warm connection, or the second one of a stream
"""

from enum import Enum
from typing import Final, NamedTuple

from sniproxy.streams.end_reason import RETRYABLE, Reason
from sniproxy.transport.base import Candidate
from sniproxy.transport.errors import DialError, ResetBeforeReady, StaleEpoch, WarmLost
from sniproxy.tunnel.capsules import HEADER_SIZE, CapsuleError
from sniproxy.tunnel.epoch import told_epoch
from sniproxy.tunnel.messages import Message, Open, Opened, Ping, Pong, Ready, Refused, Waiting
from sniproxy.tunnel.preamble import Preamble, WarmPreamble
from sniproxy.tunnel.state import LIMIT_OPENED_S, LIMIT_WAITING_S


class Timing(NamedTuple):
    """How long a gateway may take, in seconds."""

    ready_s: float
    """From our first byte to its first answer."""
    opened_s: float = LIMIT_OPENED_S
    """From that answer to OPENED or REFUSED."""
    waiting_s: float = LIMIT_WAITING_S
    """The most that WAITING can add to this."""


class Signed(NamedTuple):
    """A preamble, its signed header, and the key that signed it."""

    preamble: Preamble | WarmPreamble
    header: bytes
    key: bytes


class Send(NamedTuple):
    """One write: a preamble or control capsules, then a DATA capsule if there is data."""

    preamble: bytes = b""
    messages: tuple[Message, ...] = ()
    data: bytes = b""


class Wait(NamedTuple):
    """Send `send`, if any, and wait for an answer until `until`."""

    until: float
    send: Send | None = None


class Established(NamedTuple):
    """The gateway has accepted."""


class Failed(NamedTuple):
    """The handshake has failed. Reset the connection."""

    error: DialError | ResetBeforeReady | WarmLost


Step = Wait | Established | Failed


class Awaits(Enum):
    """The answer that is expected next."""

    READY = Ready
    PONG = Pong
    OPENED = Opened


class RelayHandshake:
    """One handshake. Times are in seconds of one clock, such as the event loop's."""

    __slots__ = ("_awaits", "_began", "_candidate", "_first", "_opens", "_rest", "_signed", "_timing", "_warm", "told")

    def __init__(
        self,
        candidate: Candidate,
        signed: Signed,
        timing: Timing,
        first: Send,
        *,
        rest: bytes = b"",
        awaits: Awaits = Awaits.READY,
        opens: bool = True,
    ) -> None:
        """Use `opening`, `opening_on_warm` or `greeting` instead.

        Args:
            candidate: the way to the gateway, for error texts.
            signed: the preamble that is sent.
            timing: how long the gateway may take.
            first: the first write.
            rest: payload to send after the first answer.
            awaits: the first answer expected.
            opens: whether OPENED follows the first answer.
        """
        self._candidate = candidate
        self._signed = signed
        self._timing = timing
        self._first = first
        self._rest = rest
        self._awaits = awaits
        self._warm = awaits is Awaits.PONG
        self._opens = opens
        self._began = 0.0
        self.told: bytes | None = None
        """The gateway's epoch, if the error is StaleEpoch."""

    def start(self, now: float) -> Wait:
        """Return the first step."""
        self._began = now
        return Wait(now + self._timing.ready_s, self._first)

    def heard(self, message: Message, now: float) -> Step:
        """Handle a message from the gateway."""
        if isinstance(message, Waiting):
            longest = self._began + self._timing.waiting_s
            return Wait(min(now + message.seconds, longest) + self._limit_s)
        if isinstance(message, Refused):
            return Failed(self._refused(message))
        wanted = self._awaits.value
        if not isinstance(message, wanted):
            said = f"{type(message).__name__} instead of {wanted.__name__}"
            return Failed(DialError(Reason.PROTOCOL_ERROR, said, final=True))
        if self._awaits is Awaits.OPENED or not self._opens:
            return Established()
        # From here on the gateway may deliver what we send: after silence or a cut, it must not be sent to another one.
        self._awaits, self._began = Awaits.OPENED, now
        return Wait(now + self._timing.opened_s, Send(data=self._rest) if self._rest else None)

    def silent(self) -> Failed:
        """Fail because the time is over."""
        match self._awaits:
            case Awaits.READY:
                detail = f"{self._candidate}: no gateway answered in {self._timing.ready_s} s"
                return Failed(DialError(Reason.READY_TIMEOUT, detail))
            case Awaits.PONG:
                return Failed(WarmLost(self._candidate, silent=True))
            case Awaits.OPENED:
                detail = f"{self._candidate}: the gateway did not open in {self._timing.opened_s} s"
                return Failed(DialError(Reason.OPEN_TIMEOUT, detail, final=True))

    def cut(self) -> Failed:
        """Fail because the connection has ended."""
        match self._awaits:
            case Awaits.READY:
                return Failed(ResetBeforeReady(f"{self._candidate}: cut before a gateway answered"))
            case Awaits.PONG:
                return Failed(WarmLost(self._candidate, silent=False))
            case Awaits.OPENED:
                detail = f"{self._candidate}: cut while the gateway was opening"
                return Failed(DialError(Reason.TRUNCATED, detail, final=True))

    def broken(self, error: CapsuleError) -> Failed:
        """Fail because the gateway violated the protocol."""
        # READY may have come in the same read as the violation, and the gateway may have delivered our bytes.
        return Failed(DialError(error.reason, str(error), final=True))

    @property
    def _limit_s(self) -> float:
        return self._timing.opened_s if self._awaits is Awaits.OPENED else self._timing.ready_s

    def _refused(self, message: Refused) -> DialError:
        """Return what a refusal means. Before READY nothing was delivered; later, only some reasons guarantee that."""
        reason = Reason(message.reason) if message.reason in _REASONS else Reason.OTHER
        if reason is Reason.STALE_EPOCH and (self._warm or self._awaits is Awaits.READY):
            preamble = self._signed.preamble
            told = told_epoch(message.detail, self._signed.key, preamble.once)
            if told is not None and told != preamble.epoch:
                self.told = told
                return StaleEpoch(
                    reason, f"{self._candidate}: signed for another process of the gateway", answered=True
                )
        final = self._awaits is not Awaits.READY and reason not in RETRYABLE
        error = DialError(reason, f"the gateway refused: {message.detail}", final=final, answered=True)
        error.said = message.detail
        return error


_REASONS: Final = frozenset(Reason)


def opening(candidate: Candidate, signed: Signed, timing: Timing, data: bytes) -> RelayHandshake:
    """Open a stream on a new connection. What does not fit into the first write follows READY."""
    room = candidate.traits.first_write_limit - len(signed.header) - HEADER_SIZE
    first = Send(preamble=signed.header, data=data[:room])
    return RelayHandshake(candidate, signed, timing, first, rest=data[room:])


def opening_on_warm(
    candidate: Candidate, signed: Signed, timing: Timing, hello: bytes, rest: bytes, *, token: bytes
) -> RelayHandshake:
    """Open a stream on a warm connection. It may be dead, so only the ClientHello is sent before PONG."""
    first = Send(messages=(Ping(token), Open(signed.header)), data=hello)
    return RelayHandshake(candidate, signed, timing, first, rest=rest, awaits=Awaits.PONG)


def greeting(candidate: Candidate, signed: Signed, timing: Timing) -> RelayHandshake:
    """Send only the preamble: for a warm connection, or for the second connection of a stream."""
    return RelayHandshake(candidate, signed, timing, Send(preamble=signed.header), opens=False)
