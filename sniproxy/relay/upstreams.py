"""A relay's upstreams: how a stream gets to a service, by one candidate after the other until one has it at its far end.

What may be tried again is bounded by what may have run: client bytes go to the next candidate only while no gateway can have
delivered them (before READY, or after a refusal that says so), never after silence behind READY.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from discovery.model.mesh import Mesh
from discovery.model.names import ServiceTarget
from sniproxy.endpoints.dialer import EndpointDialer, NoAnswer
from sniproxy.engine import ByteStream
from sniproxy.formats.proxy_protocol import ProxyError, ProxyHeader
from sniproxy.relay.health import UpstreamHealth
from sniproxy.relay.upstream_metrics import UpstreamMetrics
from sniproxy.relay.warm_pool import WarmPool
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate, GatewayTransport, Transport
from sniproxy.transport.errors import DialError, ResetBeforeReady, StaleEpoch, WarmLost
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.relay_handshake import GatewayConnector, StreamRequest

MAX_CANDIDATES = 3
"""Candidates asked for one stream: a client waits at most three times for silence."""

DEFAULT_DIAL_TIMEOUT_S = 3.0
"""For the TCP handshake: one lost SYN is sent again after 1 s, a second after 3 s."""

_BUSY = frozenset({Reason.OVERLOADED, Reason.DRAINING})
"""A gateway that says so has to do without new streams for a while."""

_DISTRUSTED = frozenset({Reason.NO_KEY, Reason.BAD_SIGNATURE, Reason.CLOCK_SKEW, Reason.REPLAY, Reason.STALE_EPOCH})
"""A gateway that answers so takes no stream of ours: another one, with the right keys or clock, may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """A stream that has a service at its far end."""

    candidate: Candidate
    attempts: int
    stream: ByteStream
    """To the service itself, or to the gateway."""
    connection: CapsuleConnection | None = None
    """What is spoken on it, where a gateway is at its far end."""
    sent: int = 0
    """How many bytes of `StreamRequest.data` have been sent already; the rest is the caller's to send."""
    was_warm: bool = False
    """Whether it had been kept ready."""


class Upstreams:
    """The upstreams of one relay. `reconfigure` comes first; `run` keeps streams warm until `close`."""

    _connector: GatewayConnector
    _transports: Mapping[str, Transport]
    _gateways: Mapping[str, GatewayTransport]
    _dial_timeout_s: float

    def __init__(
        self,
        registry: CollectorRegistry,
        endpoints: EndpointDialer,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Register the metrics.

        Args:
            endpoints: connects to services of the relay's own network.
            sleep: waits for so many seconds before an attempt is made again.
        """
        self._sleep = sleep
        self._metrics = UpstreamMetrics(registry)
        self.pool = WarmPool(self._warm_up, size=0, count=self._metrics.fate)
        self.health = UpstreamHealth(time.monotonic, is_ready=self.pool.has)
        self._endpoints = endpoints
        self._metrics.watch(ready=lambda: self.pool.ready, left_out=lambda: self.health.left_out)

    def reconfigure(
        self,
        connector: GatewayConnector,
        transports: Sequence[Transport],
        *,
        pool: int,
        dial_timeout_s: float = DEFAULT_DIAL_TIMEOUT_S,
    ) -> None:
        """Go by these from now on, and keep `pool` connections ready for each candidate in use that takes long to reach."""
        self._connector = connector
        self._transports = {transport.traits.name: transport for transport in transports}
        self._gateways = {
            name: found for name, found in self._transports.items() if isinstance(found, GatewayTransport)
        }
        self._dial_timeout_s = dial_timeout_s
        self._metrics.know(self._transports)
        self.pool.resize(pool)

    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Put the ways to one network into the order in which a stream tries them."""
        return self.health.order(candidates)

    def carrying(self, candidate: Candidate) -> AbstractContextManager[None]:
        """Count a stream on this way while the block runs."""
        return self.health.carrying(candidate) if candidate.traits.to_gateway else nullcontext()

    def follow(self, mesh: Mesh) -> None:
        """Let go what was kept ready where that is no way any more."""
        self.pool.keep(lambda candidate: self._transports[candidate.traits.name].offers(candidate, mesh))

    async def run(self) -> None:
        """Keep streams warm, until `close`."""
        await self.pool.run()

    def close(self) -> None:
        """Let go all that is kept ready."""
        self.pool.close()

    async def connect(self, request: StreamRequest, candidates: Sequence[Candidate]) -> Connected:
        """Try up to three gateways in their order, or all endpoints of a service in the relay's own network.

        Raises:
            DialError: with the last failure's reason, once none is left or none may be asked.
        """
        attempts = itertools.count(1)
        failure = DialError(Reason.NO_ROUTE, "no candidate")
        queue = [(candidate, True) for candidate in _choice(candidates)]
        for candidate, may_be_warm in queue:
            try:
                if not candidate.traits.to_gateway:
                    endpoints = [other for other in candidates if other.network == candidate.network]
                    return await self._reach_service(request, endpoints, attempts)
                connected = await self._reach(request, candidate, attempts, may_be_warm=may_be_warm)
            except WarmLost as lost:
                # Its gateway may be gone without a word: a new connection would wait as long, so the others come first.
                queue.append((candidate, False))
                self._settle(candidate, DialError(Reason.READY_TIMEOUT, str(lost)))
            except DialError as error:
                failure = error
                if candidate.traits.to_gateway:
                    self._settle(candidate, error)
                if error.final:
                    break
            else:
                self._settle(candidate, None)
                return connected
        failure.attempts = next(attempts) - 1
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame: a cycle for each stream that reaches nobody

    async def second(self, request: StreamRequest, candidate: Candidate, attempts: Iterator[int]) -> CapsuleConnection:
        """Open the second connection of a stream, for its upload alone.

        Args:
            candidate: the one that the stream goes by.
            attempts: numbers that no attempt of the stream has had.

        Raises:
            ConnectionError: the gateway that holds the stream was not reached on it.
        """
        for pause in (*candidate.traits.reset_retry_s, None):
            try:
                stream = await self._dial(candidate)
                return await self._connector.join(request, candidate, next(attempts), stream)
            except (ResetBeforeReady, DialError) as error:
                is_stale = isinstance(error, StaleEpoch)
                may_pass = isinstance(error, ResetBeforeReady) or is_stale or error.reason is Reason.DIAL_FAILED
                if pause is None or not may_pass:
                    raise ConnectionError(str(error)) from error
                if not is_stale:
                    await self._sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _reach(
        self, request: StreamRequest, candidate: Candidate, attempts: Iterator[int], *, may_be_warm: bool
    ) -> Connected:
        """Reach a service by this candidate: on a connection that is ready, if there is one and it may be, else on a new one.

        Raises:
            DialError: it was not reached.
            WarmLost: the connection that was ready said nothing; a new one has not been tried.
        """
        traits = candidate.traits
        warm = await self.pool.take(candidate) if traits.warmable and may_be_warm else None
        if warm is not None:
            try:
                return await self._on_warm(request, candidate, next(attempts), warm)
            except WarmLost as lost:
                self.pool.distrust(candidate)
                if lost.silent:
                    raise
            except StaleEpoch:
                self.pool.distrust(candidate)
        for pause in traits.reset_retry_s:
            try:
                return await self._signed_anew(request, candidate, attempts)
            except ResetBeforeReady:
                await self._sleep(pause)
        try:
            return await self._signed_anew(request, candidate, attempts)
        except ResetBeforeReady as error:
            raise _given_up(candidate, error) from error

    async def _reach_service(
        self, request: StreamRequest, candidates: Sequence[Candidate], attempts: Iterator[int]
    ) -> Connected:
        """Connect to one of these endpoints of a service in the relay's own network. Raises DialError."""
        by_endpoint = {(candidate.address, candidate.port): candidate for candidate in candidates}
        meant = candidates[0].meant
        service = f"{meant.service}:{meant.port}" if isinstance(meant, ServiceTarget) else ""
        tries = self._endpoints.attempts(service, list(by_endpoint), lambda _: True)
        with self._metrics.attempt(candidates[0].traits.name):
            while True:
                made = tries.made
                try:
                    connected = await tries.connect(timeout_s=self._dial_timeout_s)
                except NoAnswer as error:
                    raise DialError(Reason.DIAL_FAILED, error.detail) from None
                finally:
                    attempt = [next(attempts) for _ in range(tries.made - made)]
                candidate = by_endpoint[connected.endpoint]
                try:
                    if candidate.proxy_version is not None:
                        await _introduce(request, candidate, connected.stream)
                except DialError as error:
                    tries.reject(connected.endpoint, error.detail)
                    continue
                return Connected(candidate=candidate, attempts=attempt[-1], stream=connected.stream)

    async def _signed_anew(self, request: StreamRequest, candidate: Candidate, attempts: Iterator[int]) -> Connected:
        """Make an attempt, and one more where the gateway's process has changed."""
        try:
            return await self._on_new(request, candidate, next(attempts))
        except StaleEpoch:
            return await self._on_new(request, candidate, next(attempts))

    async def _on_new(self, request: StreamRequest, candidate: Candidate, attempt: int) -> Connected:
        with self._metrics.attempt(candidate.traits.name):
            stream = await self._dial(candidate)
            connection = await self._connector.open(request, candidate, attempt, stream)
        return Connected(
            candidate=candidate, attempts=attempt, stream=stream, connection=connection, sent=len(request.data)
        )

    async def _on_warm(
        self, request: StreamRequest, candidate: Candidate, attempt: int, connection: CapsuleConnection
    ) -> Connected:
        with self._metrics.attempt(candidate.traits.name):
            await self._connector.open_warm(request, candidate, attempt, connection)
        return Connected(
            candidate=candidate,
            attempts=attempt,
            stream=connection.stream,
            connection=connection,
            sent=len(request.data),
            was_warm=True,
        )

    async def _dial(self, candidate: Candidate) -> ByteStream:
        """Connect to a candidate. Raises ResetBeforeReady, where a reset may pass, and DialError."""
        transport = self._gateways[candidate.traits.name]
        try:
            return await transport.dial(candidate, timeout_s=self._dial_timeout_s)
        except TimeoutError:
            detail = f"{candidate}: no answer in {self._dial_timeout_s} s"
            raise DialError(Reason.DIAL_FAILED, detail) from None
        except OSError as error:
            if isinstance(error, ConnectionResetError) and candidate.traits.reset_retry_s:
                raise ResetBeforeReady(str(error)) from error
            raise DialError(Reason.DIAL_FAILED, f"{candidate}: {error.strerror or error}") from error

    async def _warm_up(self, candidate: Candidate) -> CapsuleConnection:
        """Make a connection that is ready for a stream. Raises DialError."""
        try:
            try:
                connection = await self._connector.warm_up(candidate, await self._dial(candidate))
            except StaleEpoch:
                connection = await self._connector.warm_up(candidate, await self._dial(candidate))
        except ResetBeforeReady as error:
            failure = DialError(Reason.TRUNCATED, str(error))
            self._failed(candidate, failure)
            raise failure from error
        except DialError as error:
            self._failed(candidate, error)
            raise
        self.health.succeeded(candidate)
        return connection

    def _settle(self, candidate: Candidate, failure: DialError | None) -> None:
        """Take in whether a candidate led to a service; one that often does not is left out for a while."""
        if failure is None:
            self.health.succeeded(candidate)
            if candidate.traits.warmable:
                self.pool.used(candidate)
        elif failure.answered and failure.reason not in _BUSY | _DISTRUSTED:
            self.health.succeeded(candidate)
        else:
            self._failed(candidate, failure)

    def _failed(self, candidate: Candidate, failure: DialError) -> None:
        failed = self.health.failed(candidate)
        if failed is not None:
            self._metrics.log_failed(candidate, failure, failed)


async def _introduce(request: StreamRequest, candidate: Candidate, stream: ByteStream) -> None:
    """Tell a service of our own network whose connection it is. Raises DialError."""
    try:
        header = ProxyHeader(source=request.client, destination=request.local).packed(candidate.proxy_version)
        await stream.send(header)
    except (OSError, ProxyError) as error:
        stream.reset()
        raise DialError(Reason.DIAL_FAILED, f"{candidate}: {error}") from error
    except BaseException:
        stream.reset()
        raise


def _choice(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates to try, in their order; each network in turn has one before another has all.

    A service in the own network counts as one, however many endpoints it has.
    """
    left = MAX_CANDIDATES
    networks = list(dict.fromkeys(candidate.network for candidate in candidates))
    chosen: list[Candidate] = []
    for number, network in enumerate(networks, 1):
        # An import that names several networks wants failover from one to the next, however many gateways the first has.
        share = max(1, left - (len(networks) - number))
        found = [candidate for candidate in candidates if candidate.network == network]
        found = found[: min(share, left) if found[0].traits.to_gateway else 1]
        chosen += found
        left -= len(found)
    return chosen


def _given_up(candidate: Candidate, error: ResetBeforeReady) -> DialError:
    tries = len(candidate.traits.reset_retry_s) + 1
    if tries == 1:
        return DialError(Reason.DIAL_FAILED, str(error))
    return DialError(
        Reason.NO_PERMISSION,
        f"{candidate} reset the connection {tries} times before a gateway answered: "
        "the TURN server has no permission for this relay's address, or the gateway is gone",
    )
