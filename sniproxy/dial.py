"""Open a stream: try candidates one after the other until one has a service at its far end.

What may be tried again is bounded by what may have run: client bytes go to the next candidate only while no gateway can have
delivered them (before READY, or after a refusal that says so), never after silence behind READY.
"""

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sniproxy.engine import Wire, connect
from sniproxy.hello import Hello
from sniproxy.route import Candidate, RouteKind, SigningKeys
from sniproxy.stream.capsule import HEADER_SIZE, CapsuleError
from sniproxy.stream.control import TOKEN_SIZE, Message, Opened, Pong, Ready, Refused
from sniproxy.stream.ends import LIMIT_OPENED_S, LIMIT_READY_S, Side
from sniproxy.stream.framed import Framed
from sniproxy.stream.preamble import STREAM_ID_SIZE, Preamble, PreambleError, WarmPreamble, sign
from sniproxy.stream.proxyproto import ProxyError, ProxyHeader
from sniproxy.stream.reason import RETRYABLE, Reason

MAX_CANDIDATES = 3
"""Candidates asked for one stream: a client waits at most three times for silence."""

MAX_FIRST_WRITE = 8 * 1024
"""Bytes before READY, in one write: coturn keeps 16 reads before the bind, which hold this much at the smallest usual MSS."""

RESET_RETRY_S = (0.1, 0.3, 0.9)
"""A reset before READY may be a permission that is still on its way to the TURN server."""

DEFAULT_DIAL_TIMEOUT_S = 3.0
"""For the TCP handshake: one lost SYN is sent again after 1 s, a second after 3 s."""


RECORD_HEADER_SIZE = 5

RESET = "reset"
WARM_LOST = "warm_lost"
"""The results of attempts that may be made again with the same candidate."""


class DialError(Exception):
    """No candidate took the stream. `final`: another one must not be asked with the same bytes."""

    def __init__(self, reason: Reason, detail: str, *, final: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.final = final
        self.answered = False
        """Whether a gateway said so itself: the way to it works."""
        self.attempts = 0
        """How many times candidates were asked in all, the same one again included."""


class _ResetBeforeReady(Exception):
    """The connection was cut before the gateway said READY."""


class _Silent(Exception):
    """No answer on a connection that was kept ready."""


class WarmLost(Exception):
    """A connection that was kept ready has died unnoticed. The stream may go by another one."""


async def _none_is_warm(_candidate: Candidate) -> Framed | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a client brought: everything that each attempt carries."""

    stream: bytes
    client: tuple[str, int]
    local: tuple[str, int]
    hello: Hello
    data: bytes
    """All bytes read from the client so far, to be delivered unchanged."""

    @property
    def goes_on(self) -> bool:
        """Whether `data` has something behind the ClientHello: early data, which must not run twice."""
        at, left = 0, self.hello.size
        while left > 0:
            length = int.from_bytes(self.data[at + 3 : at + RECORD_HEADER_SIZE], "big")
            at += RECORD_HEADER_SIZE + length
            left -= length
        return at < len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """A stream that has a service at its far end."""

    candidate: Candidate
    attempts: int
    wire: Wire | None = None
    """The service's own connection, on a local route; nothing has been sent yet but a PROXY header that it wants."""
    framed: Framed | None = None
    """The connection to the gateway otherwise; all of `Call.data` has been sent."""
    was_warm: bool = False
    """Whether it had been kept ready."""


class Dialer:
    """Dials for one relay."""

    def __init__(
        self,
        network: str,
        keys: SigningKeys,
        *,
        now_ms: Callable[[], int],
        dial_timeout_s: float = DEFAULT_DIAL_TIMEOUT_S,
        ready_timeout_s: float = LIMIT_READY_S,
        open_timeout_s: float = LIMIT_OPENED_S,
        warm: Callable[[Candidate], Awaitable[Framed | None]] = _none_is_warm,
        count: Callable[[RouteKind, str], None] = lambda _kind, _result: None,
        settled: Callable[[Candidate, DialError | None], None] = lambda _candidate, _failure: None,
        distrust: Callable[[Candidate], None] = lambda _candidate: None,
    ) -> None:
        """Dial for this network.

        Args:
            warm: gives a connection to this allocation that is ready (`warm_up`), None if there is none.
            distrust: told that such a connection turned out to be dead.
            count: told of each attempt and its result: "ok", "reset" before a gateway answered, "warm_lost", or a reason.
            settled: told of each candidate, once it has been reached or given up.
        """
        self._network = network
        self._keys = keys
        self._now_ms = now_ms
        self._dial_timeout_s = dial_timeout_s
        self._ready_timeout_s = ready_timeout_s
        self._open_timeout_s = open_timeout_s
        self._warm = warm
        self._distrust = distrust
        self._count = count
        self._settled = settled

    async def open(self, call: Call, candidates: list[Candidate]) -> Connected:
        """Try up to three candidates in their order.

        Raises:
            DialError: with the last failure's reason, once none is left or none may be asked.
        """
        attempts = itertools.count(1)
        failure = DialError(Reason.NO_ROUTE, "no candidate")
        for candidate in _choice(candidates):
            try:
                connected = await self._reach(call, candidate, attempts)
            except DialError as error:
                failure = error
                self._settled(candidate, error)
                if error.final:
                    break
            else:
                self._settled(candidate, None)
                return connected
        failure.attempts = next(attempts) - 1
        raise failure

    async def _reach(self, call: Call, candidate: Candidate, attempts: Iterator[int]) -> Connected:
        """Reach a service by this candidate: on a connection that is warm, else on a new one."""
        # Only a TURN server makes a stream wait for the gateway, or resets it because a permission is still on its way.
        if candidate.kind is RouteKind.TURN:
            framed = await self._warm(candidate)
            if framed is not None:
                attempt = next(attempts)
                try:
                    return await self._counted(candidate, self._open_warm(call, candidate, attempt, framed))
                except WarmLost:
                    self._distrust(candidate)
            for pause in RESET_RETRY_S:
                try:
                    return await self._counted(candidate, self._attempt(call, candidate, next(attempts)))
                except _ResetBeforeReady:
                    await asyncio.sleep(pause)
        try:
            return await self._counted(candidate, self._attempt(call, candidate, next(attempts)))
        except _ResetBeforeReady as error:
            raise _given_up(candidate, error) from error

    async def _counted(self, candidate: Candidate, attempt: Awaitable[Connected]) -> Connected:
        """Make an attempt and tell how it went."""
        try:
            connected = await attempt
        except _ResetBeforeReady:
            self._count(candidate.kind, RESET)
            raise
        except WarmLost:
            self._count(candidate.kind, WARM_LOST)
            raise
        except DialError as error:
            self._count(candidate.kind, error.reason.value)
            raise
        self._count(candidate.kind, Reason.OK.value)
        return connected

    async def _attempt(self, call: Call, candidate: Candidate, attempt: int) -> Connected:
        try:
            wire = await connect(candidate.address, candidate.port, timeout_s=self._dial_timeout_s)
        except TimeoutError:
            raise DialError(Reason.DIAL_FAILED, f"{candidate}: no answer in {self._dial_timeout_s} s") from None
        except ConnectionResetError as error:
            if candidate.kind is RouteKind.TURN:
                raise _ResetBeforeReady(str(error)) from error
            raise DialError(Reason.DIAL_FAILED, f"{candidate}: {error.strerror}") from error
        except OSError as error:
            raise DialError(Reason.DIAL_FAILED, f"{candidate}: {error.strerror}") from error
        if candidate.kind is RouteKind.LOCAL:
            if candidate.proxy_version is not None:
                await self._introduce(call, candidate, wire)
            return Connected(candidate=candidate, attempts=attempt, wire=wire)
        try:
            framed = await self._open_framed(call, candidate, attempt, Framed(wire, Side.RELAY))
        except BaseException:
            wire.reset()
            raise
        return Connected(candidate=candidate, attempts=attempt, framed=framed)

    async def _introduce(self, call: Call, candidate: Candidate, wire: Wire) -> None:
        """Tell a service of our own network whose connection it is."""
        try:
            header = ProxyHeader(source=call.client, destination=call.local).packed(candidate.proxy_version)
            await wire.send(header)
        except (OSError, ProxyError) as error:
            wire.reset()
            raise DialError(Reason.DIAL_FAILED, f"{candidate}: {error}") from error
        except BaseException:
            wire.reset()
            raise

    async def _open_framed(self, call: Call, candidate: Candidate, attempt: int, framed: Framed) -> Framed:
        preamble = self._preamble(call, candidate, attempt)
        room = MAX_FIRST_WRITE - len(preamble) - HEADER_SIZE
        first, rest = call.data[:room], call.data[room:]
        await self._greet(framed, preamble, first, candidate)
        # From here on the gateway may deliver what we send: neither silence nor a cut may bring it to another one.
        await self._await_opened(framed, candidate, partial(framed.send_data, rest) if rest else None)
        return framed

    async def _await_opened(
        self, framed: Framed, candidate: Candidate, send: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        await self._until(
            Opened,
            framed,
            send,
            limit_s=self._open_timeout_s,
            late=DialError(
                Reason.OPEN_TIMEOUT, f"{candidate}: the gateway did not open in {self._open_timeout_s} s", final=True
            ),
            cut=DialError(Reason.TRUNCATED, f"{candidate}: cut while the gateway was opening", final=True),
            final=True,
        )

    async def _open_warm(self, call: Call, candidate: Candidate, attempt: int, framed: Framed) -> Connected:
        """Begin the stream on a connection that is ready.

        Raises:
            DialError: as for a new connection behind READY.
            WarmLost: it was dead, and nothing was sent but a ClientHello: that one may arrive twice, nothing behind it may.
        """
        token = os.urandom(TOKEN_SIZE)
        try:
            await self._until(
                Pong,
                framed,
                partial(framed.open, token, self._preamble(call, candidate, attempt), call.data),
                limit_s=self._ready_timeout_s,
                late=_Silent(),
                cut=_Silent(),
                final=True,
            )
            await self._await_opened(framed, candidate)
        except _Silent:
            framed.wire.reset()
            if call.goes_on:
                detail = f"{candidate}: the connection that was kept ready has died"
                raise DialError(Reason.TRUNCATED, detail, final=True) from None
            raise WarmLost from None
        except BaseException:
            framed.wire.reset()
            raise
        return Connected(candidate=candidate, attempts=attempt, framed=framed, was_warm=True)

    async def warm_up(self, candidate: Candidate) -> Framed:
        """Make a connection to a gateway that is ready for a stream.

        Raises:
            ConnectionError: the gateway was not reached.
        """
        key = self._keys.get(self._network, candidate.network)
        if key is None:
            raise ConnectionError(f"no key signs streams to {candidate.network!r}")
        preamble = WarmPreamble(
            nonce=os.urandom(STREAM_ID_SIZE),
            from_network=self._network,
            to_network=candidate.network,
            addressee=candidate.addressee,
            key_id=key.id,
            time_ms=self._now_ms(),
        )
        try:
            wire = await connect(candidate.address, candidate.port, timeout_s=self._dial_timeout_s)
            framed = Framed(wire, Side.RELAY)
            framed.ends.warm = True
            try:
                await self._greet(framed, sign(preamble, key.secret), b"", candidate)
            except BaseException:
                wire.reset()
                raise
        except (OSError, DialError, PreambleError, _ResetBeforeReady) as error:
            raise ConnectionError(str(error)) from error
        return framed

    async def second(self, call: Call, candidate: Candidate, attempts: Iterator[int]) -> Framed:
        """Open the second connection of a stream through a TURN server, for its upload alone.

        Args:
            candidate: the one that the stream goes by.
            attempts: numbers that no attempt of the stream has had.

        Raises:
            ConnectionError: the gateway that holds the stream was not reached on it.
        """
        for pause in (*RESET_RETRY_S, None):
            try:
                wire = await connect(candidate.address, candidate.port, timeout_s=self._dial_timeout_s)
                framed = Framed(wire, Side.RELAY)
                try:
                    await self._greet(
                        framed, self._preamble(call, candidate, next(attempts), continues=True), b"", candidate
                    )
                except BaseException:
                    wire.reset()
                    raise
                return framed
            except (OSError, _ResetBeforeReady) as error:
                if pause is None:
                    raise ConnectionError(str(error)) from error
                await asyncio.sleep(pause)
            except (DialError, TimeoutError) as error:
                raise ConnectionError(str(error)) from error
        raise AssertionError("the last try returns or raises")

    async def _greet(self, framed: Framed, preamble: bytes, first: bytes, candidate: Candidate) -> None:
        """Send the preamble and what goes with it, and wait for READY."""
        await self._until(
            Ready,
            framed,
            partial(framed.begin, preamble, first),
            limit_s=self._ready_timeout_s,
            late=DialError(Reason.READY_TIMEOUT, f"{candidate}: no gateway answered in {self._ready_timeout_s} s"),
            cut=_ResetBeforeReady(f"{candidate}: cut before a gateway answered"),
            final=False,
        )

    async def _until(
        self,
        wanted: type[Message],
        framed: Framed,
        send: Callable[[], Awaitable[None]] | None,
        *,
        limit_s: float,
        late: Exception,
        cut: Exception,
        final: bool,
    ) -> None:
        """Send, then wait for `wanted`. A refusal, a broken protocol, silence and a cut each have their exception.

        Args:
            final: a refusal that does not say that nothing was delivered forbids to ask another gateway.
        """
        try:
            async with asyncio.timeout(limit_s):
                if send is not None and not framed.ends.refused:  # which may have come along with READY
                    # What the gateway said before it closed is still there to be read; if nothing is, reading says so.
                    with suppress(OSError):
                        await send()
                message = await framed.next_message()
        except TimeoutError:
            raise late from None
        except (OSError, EOFError) as error:
            raise cut from error
        except CapsuleError as error:
            # READY may have come in the same read as what is wrong, or whoever speaks there takes our bytes for its own.
            raise DialError(Reason.PROTOCOL_ERROR, str(error), final=True) from error
        if isinstance(message, Refused):
            reason = Reason(message.reason) if message.reason in set(Reason) else Reason.OTHER
            detail = f"the gateway refused: {message.detail}"
            refused = DialError(reason, detail, final=final and reason not in RETRYABLE)
            refused.answered = True
            raise refused
        if not isinstance(message, wanted):
            said = f"{type(message).__name__} instead of {wanted.__name__}"
            raise DialError(Reason.PROTOCOL_ERROR, said, final=True)

    def _preamble(self, call: Call, candidate: Candidate, attempt: int, *, continues: bool = False) -> bytes:
        key = self._keys.get(self._network, candidate.network)
        if key is None:
            raise DialError(Reason.NO_KEY, f"no key signs streams to {candidate.network!r}", final=True)
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
        )
        try:
            return sign(preamble, key.secret)
        except PreambleError as error:
            raise DialError(Reason.OTHER, f"{candidate}: {error.detail}", final=True) from error


def _choice(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates to try, in their order; each network in turn has one before another has all."""
    left = MAX_CANDIDATES
    networks = list(dict.fromkeys(candidate.network for candidate in candidates))
    chosen: list[Candidate] = []
    for number, network in enumerate(networks, 1):
        # An import that names several networks wants failover from one to the next, however many gateways the first has.
        share = max(1, left - (len(networks) - number))
        found = [candidate for candidate in candidates if candidate.network == network][: min(share, left)]
        chosen += found
        left -= len(found)
    return chosen


def _given_up(candidate: Candidate, error: _ResetBeforeReady) -> DialError:
    if candidate.kind is not RouteKind.TURN:
        return DialError(Reason.DIAL_FAILED, str(error))
    return DialError(
        Reason.NO_PERMISSION,
        f"{candidate} reset the connection {len(RESET_RETRY_S) + 1} times before a gateway answered: "
        "the TURN server has no permission for this relay's address, or the gateway is gone",
    )
