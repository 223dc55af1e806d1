"""Open a stream: try candidates one after the other until one has a service at its far end.

What may be tried again is bounded by what may have run: client bytes go to the next candidate only while no gateway can have
delivered them (before READY, or after a refusal that says so), never after silence behind READY.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from sniproxy.engine import SocketStream
from sniproxy.formats.proxy_protocol import ProxyError, ProxyHeader
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate, RouteKind
from sniproxy.transport.errors import DialError, ResetBeforeReady, StaleEpoch, WarmLost
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.relay_handshake import GatewayConnector, StreamRequest

MAX_CANDIDATES = 3
"""Candidates asked for one stream: a client waits at most three times for silence."""

RESET_RETRY_S = (0.1, 0.3, 0.9)
"""A reset before READY may be a permission that is still on its way to the TURN server."""

RESET = "reset"
WARM_LOST = "warm_lost"
"""The results of attempts that may be made again with the same candidate."""


async def _none_is_warm(_candidate: Candidate) -> CapsuleConnection | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """A stream that has a service at its far end."""

    candidate: Candidate
    attempts: int
    wire: SocketStream | None = None
    """The service's own connection, on a local route; nothing has been sent yet but a PROXY header that it wants."""
    framed: CapsuleConnection | None = None
    """The connection to the gateway otherwise; all of `StreamRequest.data` has been sent."""
    was_warm: bool = False
    """Whether it had been kept ready."""


class Dialer:
    """Dials for one relay."""

    def __init__(
        self,
        opener: GatewayConnector,
        *,
        warm: Callable[[Candidate], Awaitable[CapsuleConnection | None]] = _none_is_warm,
        count: Callable[[RouteKind, str], None] = lambda _kind, _result: None,
        settled: Callable[[Candidate, DialError | None], None] = lambda _candidate, _failure: None,
        distrust: Callable[[Candidate], None] = lambda _candidate: None,
    ) -> None:
        """Reach gateways by this opener.

        Args:
            warm: gives a connection to this allocation that is ready (`GatewayConnector.warm_up`), None if there is none.
            distrust: told that such a connection turned out to be dead.
            count: told of each attempt and its result: "ok", "reset" before a gateway answered, "warm_lost", or a reason.
            settled: told of each candidate, once it has been reached or given up.
        """
        self._opener = opener
        self._warm = warm
        self._distrust = distrust
        self._count = count
        self._settled = settled

    async def open(self, call: StreamRequest, candidates: list[Candidate]) -> Connected:
        """Try up to three candidates in their order.

        Raises:
            DialError: with the last failure's reason, once none is left or none may be asked.
        """
        attempts = itertools.count(1)
        failure = DialError(Reason.NO_ROUTE, "no candidate")
        queue = [(candidate, True) for candidate in _choice(candidates)]
        for candidate, warm in queue:
            try:
                connected = await self._reach(call, candidate, attempts, warm=warm)
            except WarmLost as lost:
                # Its gateway may be gone without a word: a new connection would wait as long, so the others come first.
                queue.append((candidate, False))
                self._settled(candidate, DialError(Reason.READY_TIMEOUT, str(lost)))
            except DialError as error:
                failure = error
                self._settled(candidate, error)
                if error.final:
                    break
            else:
                self._settled(candidate, None)
                return connected
        failure.attempts = next(attempts) - 1
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame: a cycle for each stream that reaches nobody

    async def _reach(
        self, call: StreamRequest, candidate: Candidate, attempts: Iterator[int], *, warm: bool
    ) -> Connected:
        """Reach a service by this candidate: on a connection that is ready, if there is one and `warm`, else on a new one.

        Raises:
            DialError: it was not reached.
            WarmLost: the connection that was ready said nothing; a new one has not been tried.
        """
        # Only a TURN server makes a stream wait for the gateway, or resets it because a permission is still on its way.
        if candidate.kind is RouteKind.TURN:
            framed = await self._warm(candidate) if warm else None
            if framed is not None:
                attempt = next(attempts)
                try:
                    return await self._counted(candidate, self._attempt_warm(call, candidate, attempt, framed))
                except WarmLost as lost:
                    self._distrust(candidate)
                    if lost.silent:
                        raise
                except StaleEpoch:
                    self._distrust(candidate)
            for pause in RESET_RETRY_S:
                try:
                    return await self._signed_anew(call, candidate, attempts)
                except ResetBeforeReady:
                    await asyncio.sleep(pause)
        try:
            return await self._signed_anew(call, candidate, attempts)
        except ResetBeforeReady as error:
            raise _given_up(candidate, error) from error

    async def _signed_anew(self, call: StreamRequest, candidate: Candidate, attempts: Iterator[int]) -> Connected:
        """Make an attempt, and one more where the gateway's process has changed."""
        try:
            return await self._counted(candidate, self._attempt(call, candidate, next(attempts)))
        except StaleEpoch:
            return await self._counted(candidate, self._attempt(call, candidate, next(attempts)))

    async def _counted(self, candidate: Candidate, attempt: Awaitable[Connected]) -> Connected:
        """Make an attempt and tell how it went."""
        try:
            connected = await attempt
        except ResetBeforeReady:
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

    async def _attempt(self, call: StreamRequest, candidate: Candidate, attempt: int) -> Connected:
        try:
            wire = await self._opener.connect(candidate)
        except TimeoutError:
            detail = f"{candidate}: no answer in {self._opener.dial_timeout_s} s"
            raise DialError(Reason.DIAL_FAILED, detail) from None
        except ConnectionResetError as error:
            if candidate.kind is RouteKind.TURN:
                raise ResetBeforeReady(str(error)) from error
            raise DialError(Reason.DIAL_FAILED, f"{candidate}: {error.strerror}") from error
        except OSError as error:
            raise DialError(Reason.DIAL_FAILED, f"{candidate}: {error.strerror}") from error
        if candidate.kind is RouteKind.LOCAL:
            if candidate.proxy_version is not None:
                await self._introduce(call, candidate, wire)
            return Connected(candidate=candidate, attempts=attempt, wire=wire)
        framed = await self._opener.open(call, candidate, attempt, wire)
        return Connected(candidate=candidate, attempts=attempt, framed=framed)

    async def _attempt_warm(
        self, call: StreamRequest, candidate: Candidate, attempt: int, framed: CapsuleConnection
    ) -> Connected:
        await self._opener.open_warm(call, candidate, attempt, framed)
        return Connected(candidate=candidate, attempts=attempt, framed=framed, was_warm=True)

    async def second(self, call: StreamRequest, candidate: Candidate, attempts: Iterator[int]) -> CapsuleConnection:
        """Open the second connection of a stream through a TURN server, for its upload alone.

        Args:
            candidate: the one that the stream goes by.
            attempts: numbers that no attempt of the stream has had.

        Raises:
            ConnectionError: the gateway that holds the stream was not reached on it.
        """
        try:
            for pause in RESET_RETRY_S:
                try:
                    return await self._opener.join(call, candidate, next(attempts))
                except (OSError, ResetBeforeReady):
                    await asyncio.sleep(pause)
                except StaleEpoch:
                    pass
            return await self._opener.join(call, candidate, next(attempts))
        except (OSError, ResetBeforeReady, DialError) as error:
            raise ConnectionError(str(error)) from error

    async def _introduce(self, call: StreamRequest, candidate: Candidate, wire: SocketStream) -> None:
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


def _given_up(candidate: Candidate, error: ResetBeforeReady) -> DialError:
    if candidate.kind is not RouteKind.TURN:
        return DialError(Reason.DIAL_FAILED, str(error))
    return DialError(
        Reason.NO_PERMISSION,
        f"{candidate} reset the connection {len(RESET_RETRY_S) + 1} times before a gateway answered: "
        "the TURN server has no permission for this relay's address, or the gateway is gone",
    )
