"""One registration: our allocation on one TURN server of another network, had again whenever it is lost.

Not here: which TURN servers there are (`turnreg.registrar`), what an allocation does (`turnreg.client`).
"""

import asyncio
import hashlib
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar

from discovery.addresses import BadAddress, TurnUrl, parse_turn_url, refusal
from discovery.client import Discovery, DiscoveryError
from discovery.model import AllocationSpec, Kind
from discovery.spec import MAX_ID
from sniproxy.engine import connect
from turnreg.auth import rest_credentials
from turnreg.client import Allocation, BindResult, Bound, Credentials, Dial, TurnError, TurnReason
from turnreg.settings import RegistrarConfig, RestSecret, TurnCredentials

log = logging.getLogger(__name__)

T = TypeVar("T")

REST_LIFETIME_S = 7 * 24 * 3600.0
"""How long the REST credentials are good that a gateway with the secret makes for itself, anew at every registration.
Nobody else ever sees them, so short ones would win nothing. A server that looks at the expiry does so when the allocation
is refreshed: that refresh fails with 401 or 441, and the registration begins anew at once with fresh ones."""

RESOLVE_TIMEOUT_S = 5.0
ISSUE_TIMEOUT_S = 10.0
"""Discovery is an HTTP request away, and may have to fail over to its second server."""

STEADY_S = 10.0
"""An allocation lost sooner than that counts as one more failure in a row: a server may accept and drop us for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What the record of a TURN server says of how to register there."""

    url: str
    family: int
    """Of the relayed address: IPv6 only where the server's record has no IPv4 address."""
    port_min: int
    port_max: int


def record_id(gateway: str, via: str, turn: str) -> str:
    """Make the id of an allocation record: the same at every registration, another for every gateway.

    Network ids have no dots. Where a gateway's or TURN server's id has some, or all is too long, a hash keeps ids apart.
    """
    text = f"{gateway}.{via}.{turn}"
    if len(text) <= MAX_ID and text.count(".") == 2:
        return text
    digest = hashlib.sha256(f"{gateway}\0{via}\0{turn}".encode()).hexdigest()[:16]
    return f"{text[: MAX_ID - 17].rstrip('.-_')}-{digest}"


class Registration:
    """The life of one registration. The registrar says what is wanted; `run()` makes it so until nothing is."""

    def __init__(
        self,
        config: RegistrarConfig,
        discovery: Discovery,
        via: str,
        turn: str,
        *,
        on_stream: Callable[[Bound], None],
        on_bind: Callable[[BindResult], None],
        on_outcome: Callable[[str], None],
    ) -> None:
        """Describe it; `want()` and `run()` begin it. `on_outcome` is told "ok" or the TurnReason of every attempt."""
        self.via, self.turn = via, turn
        self.record = record_id(config.gateway, via, turn)
        self.allocation: Allocation | None = None
        """The one that we hold or are about to."""
        self.published = False
        self._config, self._discovery = config, discovery
        self._on_stream, self._on_bind, self._on_outcome = on_stream, on_bind, on_outcome
        self._server: Server | None = None
        self._credentials: TurnCredentials | None = None
        self._peers: frozenset[str] = frozenset()
        self._draining = self._ending = False
        self._changed = asyncio.Event()
        self._failures = 0
        self._binds = 0
        self._last: TurnError | None = None
        self._ready_at: float | None = None  # unix time, for people

    # What is wanted

    def want(self, server: Server | None, credentials: TurnCredentials | None, peers: frozenset[str]) -> None:
        """Say where, as whom and for which peers to register; without server or credentials, not at all."""
        if peers != self._peers:
            self._peers = peers
            if self.allocation is not None:
                self.allocation.allow(peers)
        if (server, credentials) != (self._server, self._credentials):
            self._server, self._credentials = server, credentials
            self._changed.set()

    def drain(self) -> None:
        """Withdraw the record for good; what we hold stays, so that streams can end."""
        self._draining = True
        self._withdraw()
        self._changed.set()

    def end(self) -> None:
        """Give everything back and make `run()` return."""
        self.drain()
        self._ending = True

    @property
    def ready(self) -> bool:
        """There is an allocation, and peers can connect to it."""
        return self._ready_at is not None

    def status(self) -> dict[str, Any]:
        """Say how things are, for people; no secrets.

        `state` is waiting, registering, ready, lingering (no record of the server any more), draining.
        """
        allocation, last = self.allocation, self._last
        lines: dict[str, Any] = {
            "via": self.via,
            "turn": self.turn,
            "record": self.record,
            "url": self._server.url if self._server else None,
            "state": self._state(),
            "published": self.published,
            "failures": 0 if self.ready else self._failures,
            "streams_bound": self._binds,
            "last_error": None if last is None else {"reason": str(last.reason), "detail": last.detail},
        }
        if allocation is not None and self.ready:
            lines |= {
                "since": self._ready_at,
                "server": [allocation.address, allocation.port],
                "relayed": list(allocation.relayed or ()),
                "mapped": list(allocation.mapped or ()),
                "lifetime_s": allocation.lifetime_s,
                "permissions": sorted(allocation.permissions.granted),
                "refused": dict(sorted(allocation.permissions.refused.items())),
            }
        return lines

    def _state(self) -> str:
        if self.ready:
            if self._draining:
                return "draining"
            return "ready" if self.published else "lingering"
        return "waiting" if self.allocation is None else "registering"

    # Life

    async def run(self) -> None:
        """Register, and again whenever that fails or is lost, until nothing is wanted any more."""
        while (wanted := self._wanted()) is not None:
            began = time.monotonic()
            error: TurnError | None = None
            try:
                await self._register(*wanted)
            except TurnError as exc:
                error = exc
            except Exception as exc:  # one registration's fault must not end the others
                log.exception("registration on %s at %s: unexpected error", self.turn, self.via)
                error = TurnError(TurnReason.INTERNAL, type(exc).__name__)
            finally:
                was_ready = self.ready
                self._withdraw()
                self.allocation, self._ready_at = None, None
            if error is None:
                continue
            self._failures = 1 if was_ready and time.monotonic() - began >= STEADY_S else self._failures + 1
            self._last = error
            self._on_outcome(error.reason)
            if self._wanted() == wanted:
                delay_s = self._config.backoff.delay_s(self._failures, error.reason)
                self._log("allocation_lost" if was_ready else "registration_failed", error, delay_s)
                await self._pause(delay_s)

    def _wanted(self) -> tuple[Server, TurnCredentials] | None:
        if self._draining or self._server is None or self._credentials is None:
            return None
        return self._server, self._credentials

    async def _pause(self, delay_s: float) -> None:
        """Wait, but not on when something else is wanted."""
        try:
            async with asyncio.timeout(delay_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _register(self, server: Server, credentials: TurnCredentials) -> None:
        """Hold one allocation. Returns when another one is wanted, or none; raises TurnError when it is lost."""
        self._changed.clear()
        url = _parsed(server.url)
        dial = _dial(url)
        shown = await self._made(credentials)
        address = await self._resolved(url)
        self.allocation = allocation = Allocation(
            address=address,
            port=url.port,
            credentials=shown,
            on_stream=self._on_stream,
            via=self.via,
            turn=self.turn,
            record=self.record,
            peers=self._peers,
            family=server.family,
            on_bind=self._bound,
            dial=dial,
            timing=self._config.timing,
        )

        def ready() -> None:
            self._ready_at = time.time()
            self._on_outcome("ok")
            if self._wanted() == (server, credentials):
                self._publish(server)

        lost: list[TurnError] = []

        async def live() -> None:
            try:
                await allocation.run(ready)
            except TurnError as exc:
                lost.append(exc)

        async with asyncio.TaskGroup() as group:
            life = group.create_task(live())
            while await self._changes_before(life, math.inf):
                if self._wanted() == (server, credentials):
                    if self.ready:
                        self._publish(server)
                    continue
                self._withdraw()
                if self._ending or self._wanted() is not None or not self.ready:
                    break
                # Drained, or the server's record is gone: streams go on until that is final.
                linger_s = math.inf if self._draining else self._config.linger_s
                if not await self._changes_before(life, linger_s):
                    break
                self._changed.set()  # look again at what it was
            await allocation.close()
        if lost:
            raise lost[0]

    async def _changes_before(self, life: asyncio.Task[None], timeout_s: float) -> bool:
        """Wait for a change: True if it came before the allocation ended and the time was up."""
        async with asyncio.TaskGroup() as group:
            change = group.create_task(self._changed.wait())
            await asyncio.wait(
                {life, change},
                timeout=None if timeout_s == math.inf else timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            changed = change.done() and not life.done()
            change.cancel()
        self._changed.clear()
        return changed

    async def _made(self, credentials: TurnCredentials) -> Credentials:
        match credentials:
            case Credentials():
                return credentials
            case RestSecret(secret=secret):
                name = f"{self._config.network}.{self._config.gateway}"
                username, password = rest_credentials(secret, name, time.time() + REST_LIFETIME_S)
                return Credentials(username=username, password=password)
        return await _in_time(self._issued(), ISSUE_TIMEOUT_S, TurnReason.NO_CREDENTIALS)

    async def _issued(self) -> Credentials:
        try:
            issued = await self._discovery.turn_credentials(self.via)
        except DiscoveryError as exc:
            raise TurnError(TurnReason.NO_CREDENTIALS, str(exc)) from exc
        return Credentials(username=issued.username, password=issued.password)

    async def _resolved(self, url: TurnUrl) -> str:
        """Return an IP address of the server, the next one after every failure. It stays the allocation's."""
        try:
            addresses = [str(ip_address(url.host))]
        except ValueError:
            addresses = await _in_time(_look_up(url), RESOLVE_TIMEOUT_S, TurnReason.UNRESOLVED)
        good, detail = [], "the name has no address"
        for address in addresses:
            # Another network wrote this: it must not lead us to what only we can reach.
            if why := refusal(ip_address(address), self._config.allowed):
                detail = f"{address} is {why}"
            else:
                good.append(address)
        if not good:
            raise TurnError(TurnReason.REFUSED_ADDRESS, detail)
        return good[self._failures % len(good)]

    def _bound(self, result: BindResult) -> None:
        self._binds += result is BindResult.OK
        self._on_bind(result)

    # The record

    def _publish(self, server: Server) -> None:
        allocation = self.allocation
        if self._draining or self.published or allocation is None or allocation.relayed is None:
            return
        port = allocation.relayed[1]
        if not server.port_min <= port <= server.port_max:
            log.warning(
                "allocation %s: port %d is outside %d-%d of the server's record: relays will refuse it",
                *(self.record, port, server.port_min, server.port_max),
            )
        spec = AllocationSpec(
            via=self.via, turn=self.turn, port=port, gateway=self._config.gateway, proto=list(self._config.proto)
        )
        self._discovery.publish(Kind.ALLOCATION, self.record, spec)
        self.published = True
        self._log("allocation")

    def _withdraw(self) -> None:
        if self.published:
            self.published = False
            self._discovery.withdraw(Kind.ALLOCATION, self.record)

    def _log(self, event: str, error: TurnError | None = None, retry_s: float | None = None) -> None:
        fields: dict[str, Any] = {"via": self.via, "turn": self.turn, "allocation": self.record}
        allocation = self.allocation
        if allocation is not None and allocation.relayed is not None:
            fields |= {"relayed": list(allocation.relayed), "lifetime_s": allocation.lifetime_s}
        if error is not None:
            fields |= {"reason": str(error.reason), "detail": error.detail, "failures": self._failures}
        if retry_s is not None:
            fields["retry_s"] = round(retry_s, 3)
        log.log(logging.INFO if error is None else logging.WARNING, event, extra={"event": fields})


async def _in_time(work: Awaitable[T], timeout_s: float, reason: TurnReason) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise TurnError(reason, f"no answer within {timeout_s:g} s") from None


def _parsed(url: str) -> TurnUrl:
    try:
        return parse_turn_url(url)
    except BadAddress as exc:
        raise TurnError(TurnReason.REFUSED_ADDRESS, str(exc)) from exc


def _dial(url: TurnUrl) -> Dial:
    """Return what opens connections to this server, control and data alike."""
    if url.tls:
        raise TurnError(TurnReason.TLS_UNSUPPORTED, "turns: is not supported yet; give the server a turn: URL as well")
    return connect


async def _look_up(url: TurnUrl) -> list[str]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise TurnError(TurnReason.UNRESOLVED, f"{url.host}: {exc.strerror or exc}") from exc
    return list(dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found))
