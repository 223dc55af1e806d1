"""A relay's upstreams: connects a stream to a service, trying one candidate after the other.

Retries must not deliver anything twice: client bytes are sent to the next candidate only while no gateway can have delivered them
(before READY, or after a refusal that guarantees it), never after silence following READY.
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
"""Candidates tried for one stream, so that a client waits for at most three timeouts."""

DEFAULT_DIAL_TIMEOUT_S = 3.0
"""For the TCP handshake. A lost SYN is retransmitted after 1 s, a second one after 3 s."""

_BUSY = frozenset({Reason.OVERLOADED, Reason.DRAINING})
"""A gateway that answers with one of these gets no new streams for a while."""

_DISTRUSTED = frozenset({Reason.NO_KEY, Reason.BAD_SIGNATURE, Reason.CLOCK_SKEW, Reason.REPLAY, Reason.STALE_EPOCH})
"""A gateway that answers with one of these accepts no stream of ours. Another one, with the right keys or clock, may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """A stream that is connected to a service."""

    candidate: Candidate
    attempts: int
    stream: ByteStream
    """To the service itself, or to a gateway."""
    connection: CapsuleConnection | None = None
    """The capsule connection over `stream`, if the far end is a gateway."""
    sent: int = 0
    """How many bytes of `StreamRequest.data` have already been sent. The caller sends the rest."""
    was_warm: bool = False
    """Whether a warm connection was used."""


class Upstreams:
    """The upstreams of one relay. Call `reconfigure` first; `run` keeps connections warm until `close`."""

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
        """Use these from now on, and keep `pool` warm connections for each warmable candidate in use."""
        self._connector = connector
        self._transports = {transport.traits.name: transport for transport in transports}
        self._gateways = {
            name: found for name, found in self._transports.items() if isinstance(found, GatewayTransport)
        }
        self._dial_timeout_s = dial_timeout_s
        self._metrics.know(self._transports)
        self.pool.resize(pool)

    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Sort the candidates for one network into the order in which a stream tries them."""
        return self.health.order(candidates)

    def carrying(self, candidate: Candidate) -> AbstractContextManager[None]:
        """Count a stream on this candidate while the block runs."""
        return self.health.carrying(candidate) if candidate.traits.to_gateway else nullcontext()

    def follow(self, mesh: Mesh) -> None:
        """Close the warm connections of candidates that no longer exist."""
        self.pool.keep(lambda candidate: self._transports[candidate.traits.name].offers(candidate, mesh))

    async def run(self) -> None:
        """Keep connections warm, until `close`."""
        await self.pool.run()

    def close(self) -> None:
        """Close all warm connections."""
        self.pool.close()

    async def connect(self, request: StreamRequest, candidates: Sequence[Candidate]) -> Connected:
        """Connect a stream, trying up to three gateways in this order, or all endpoints of a service in the own network.

        Raises:
            DialError: with the last failure's reason, once no candidate is left or no other may be tried.
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
                # Its gateway may have vanished: a new connection would wait as long again, so other candidates come first.
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
            del failure  # its traceback holds this frame: a reference cycle for each stream that fails

    async def second(self, request: StreamRequest, candidate: Candidate, attempts: Iterator[int]) -> CapsuleConnection:
        """Open the second connection of a stream, for its upload only.

        Args:
            request: the request of the stream.
            candidate: the one that the stream uses.
            attempts: attempt numbers that the stream has not used yet.

        Raises:
            ConnectionError: the gateway of the stream was not reached.
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
        """Connect to a service through this candidate: on a warm connection if there is one and it is allowed, else on a new one.

        Raises:
            DialError: the service was not reached.
            WarmLost: the warm connection stayed silent; a new one has not been tried.
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
        """Make an attempt, and another one if the gateway's epoch has changed."""
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
        """Connect to a candidate. Raises ResetBeforeReady for a reset that may be temporary, otherwise DialError."""
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
        """Make a warm connection. Raises DialError."""
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
        """Note whether a candidate led to a service. One that often fails is left out for a while."""
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
    """Send the PROXY header to a service of our own network. Raises DialError."""
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
    """Return the candidates to try, in their order, with at least one of each network as far as the limit allows.

    A service in the own network counts as one, however many endpoints it has.
    """
    left = MAX_CANDIDATES
    networks = list(dict.fromkeys(candidate.network for candidate in candidates))
    chosen: list[Candidate] = []
    for number, network in enumerate(networks, 1):
        # An import from several networks means failover between them, however many gateways the first one has.
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
