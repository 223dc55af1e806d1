"""The relay's side of a handshake with a gateway, without I/O: it is told what happens, and says what to do.

    handshake = opening(candidate, signed, timing, data)
    step = handshake.start(now)
    while isinstance(step, Wait):           write step.send, if there is one; then wait until step.until at most
        step = handshake.heard(message, now)        or handshake.cut(), silent(), broken(error)

It ends with Established, or with Failed and an error that says whether another gateway may be asked. No client's byte may arrive
twice but a ClientHello's: PROTOCOL.md has the rules in section 6, "What may be sent twice".

    opening           preamble, DATA ──▶ READY ──▶ the rest ──▶ OPENED
    opening_on_warm   PING, OPEN, DATA ──▶ PONG ──▶ the rest ──▶ OPENED
    greeting          preamble ──▶ READY                                a connection to be kept ready, or a stream's second one
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
    """How much longer at most, if it says WAITING."""


class Signed(NamedTuple):
    """A preamble, and its header signed with this key."""

    preamble: Preamble | WarmPreamble
    header: bytes
    key: bytes


class Send(NamedTuple):
    """One write: a preamble or control capsules, and then a DATA capsule if there is data."""

    preamble: bytes = b""
    messages: tuple[Message, ...] = ()
    data: bytes = b""


class Wait(NamedTuple):
    """Send this, if anything, and wait for an answer until then."""

    until: float
    send: Send | None = None


class Established(NamedTuple):
    """The gateway has answered as wanted."""


class Failed(NamedTuple):
    """It has not. Reset the connection."""

    error: DialError | ResetBeforeReady | WarmLost


Step = Wait | Established | Failed


class Awaits(Enum):
    """Which answer is due."""

    READY = Ready
    PONG = Pong
    OPENED = Opened


class RelayHandshake:
    """One handshake. Times are seconds of one clock, such as the event loop's."""

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
        """Use `opening`, `opening_on_warm` or `greeting`.

        Args:
            rest: payload that is sent once the gateway has answered.
            opens: OPENED follows the first answer.
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
        """The gateway's epoch, where the error is StaleEpoch."""

    def start(self, now: float) -> Wait:
        """Begin."""
        self._began = now
        return Wait(now + self._timing.ready_s, self._first)

    def heard(self, message: Message, now: float) -> Step:
        """Take in what the gateway says."""
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
        # From here on the gateway may deliver what we send: neither silence nor a cut may bring it to another one.
        self._awaits, self._began = Awaits.OPENED, now
        return Wait(now + self._timing.opened_s, Send(data=self._rest) if self._rest else None)

    def silent(self) -> Failed:
        """Give up: the time is over."""
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
        """Give up: the connection has ended."""
        match self._awaits:
            case Awaits.READY:
                return Failed(ResetBeforeReady(f"{self._candidate}: cut before a gateway answered"))
            case Awaits.PONG:
                return Failed(WarmLost(self._candidate, silent=False))
            case Awaits.OPENED:
                detail = f"{self._candidate}: cut while the gateway was opening"
                return Failed(DialError(Reason.TRUNCATED, detail, final=True))

    def broken(self, error: CapsuleError) -> Failed:
        """Give up: the gateway broke the protocol."""
        # READY may have come in the same read as what is wrong, and the gateway may have taken our bytes.
        return Failed(DialError(error.reason, str(error), final=True))

    @property
    def _limit_s(self) -> float:
        return self._timing.opened_s if self._awaits is Awaits.OPENED else self._timing.ready_s

    def _refused(self, message: Refused) -> DialError:
        """Say what a refusal means. Before READY nothing was delivered; later only some reasons say so."""
        reason = Reason(message.reason) if message.reason in _REASONS else Reason.OTHER
        if reason is Reason.STALE_EPOCH and (self._warm or self._awaits is Awaits.READY):
            preamble = self._signed.preamble
            told = told_epoch(message.detail, self._signed.key, preamble.once)
            if told is not None and told != preamble.epoch:
                self.told = told
                return StaleEpoch(
                    reason, f"{self._candidate}: another process of the gateway is there now", answered=True
                )
        final = self._awaits is not Awaits.READY and reason not in RETRYABLE
        error = DialError(reason, f"the gateway refused: {message.detail}", final=final, answered=True)
        error.said = message.detail
        return error


_REASONS: Final = frozenset(Reason)


def opening(candidate: Candidate, signed: Signed, timing: Timing, data: bytes) -> RelayHandshake:
    """Open a stream on a new connection: what does not fit the first write follows READY."""
    room = candidate.traits.first_write_limit - len(signed.header) - HEADER_SIZE
    first = Send(preamble=signed.header, data=data[:room])
    return RelayHandshake(candidate, signed, timing, first, rest=data[room:])


def opening_on_warm(
    candidate: Candidate, signed: Signed, timing: Timing, hello: bytes, rest: bytes, *, token: bytes
) -> RelayHandshake:
    """Open a stream on a connection that was kept ready. It may be dead: only the ClientHello goes before PONG."""
    first = Send(messages=(Ping(token), Open(signed.header)), data=hello)
    return RelayHandshake(candidate, signed, timing, first, rest=rest, awaits=Awaits.PONG)


def greeting(candidate: Candidate, signed: Signed, timing: Timing) -> RelayHandshake:
    """Greet with the preamble alone: a connection to be kept ready, or the second one of a stream."""
    return RelayHandshake(candidate, signed, timing, Send(preamble=signed.header), opens=False)
