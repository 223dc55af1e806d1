"""One allocation's life within a registration, from its making to its end, and what it was made with.

Not here: when there is one and which is published (`turnreg.registrar.registration`).
"""

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import TypeVar

from discovery.client.client import Discovery, DiscoveryError
from discovery.model.addresses import BadAddress, TurnUrl, parse_turn_url
from sniproxy.engine import SocketStream, connect, connect_tls
from turnreg.client.allocation import Allocation, Credentials, Dial, TurnError, TurnReason
from turnreg.registrar.config import RegistrarConfig, RestSecret, TurnCredentials
from turnreg.stun.auth import rest_credentials

log = logging.getLogger(__name__)

T = TypeVar("T")

REST_LIFETIME_S = 7 * 24 * 3600.0
"""How long the REST credentials are good that a gateway with the secret makes for itself. Nobody else ever sees them, so
short ones would win nothing."""

RENEW_AFTER = 2 / 3
"""The part of their life after which credentials are replaced; the rest is for trying again."""

RESOLVE_TIMEOUT_S = 5.0
ISSUE_TIMEOUT_S = 10.0
"""Discovery is an HTTP request away, and may have to fail over to its second server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What the record of a TURN server says of how to register there."""

    url: str
    family: int
    """Of the relayed address: IPv6 only where the server's record has no IPv4 address."""
    port_min: int
    port_max: int


Wanted = tuple[Server, TurnCredentials, str | None]
"""Where to register, as whom, and by which authorities a `turns:` server is verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Credentials to show, and for how many seconds they are good."""

    credentials: Credentials
    lifetime_s: float | None
    """None: for ever."""


class Renewal(StrEnum):
    """How a renewal of credentials went. Metric label."""

    IN_PLACE = "in_place"
    REPLACED = "replaced"
    """The server gives a living allocation no new ones: another one is made and published, then the old one retired."""
    FAILED = "failed"
    """Tried again."""


class ManagedAllocation:
    """An allocation, and what was wanted when it was made."""

    def __init__(
        self,
        server: Server,
        credentials: TurnCredentials,
        *,
        show: Callable[[TurnCredentials], Awaitable[Shown]],
        find: Callable[[TurnUrl], Awaitable[tuple[str, int]]],
        make: Callable[[str, int, Credentials, Dial], Allocation],
        admit: Callable[[str, int], Awaitable[None]],
        ca: str | None,
        on_change: Callable[[], None],
    ) -> None:
        """Begin without an allocation; `run()` makes it.

        Args:
            show: makes the credentials that the server is shown.
            find: resolves a URL to an address and port that may be dialled.
            make: makes the allocation, as yet unconnected.
            admit: raises TurnError for an address and port that are not to be dialled, and waits until they may be.
            ca: the authorities of a `turns:` server, as PEM; None: the system's.
            on_change: called when it gets ready and when it has ended.
        """
        self.server, self.credentials, self.ca = server, credentials, ca
        self.allocation: Allocation | None = None
        self.error: TurnError | None = None
        self.over = False
        self.ready_at: float | None = None
        """Unix time, for people."""
        self.steady_from = 0.0
        """When it got ready, on the loop's clock."""
        self.retired_at = 0.0
        self.renew_at: float | None = None
        """When its credentials are to be replaced, on the loop's clock."""
        self.outdated = False
        """Its credentials will expire, and it cannot have others: another one is to take its place."""
        self._loop = asyncio.get_running_loop()
        self._show, self._find, self._make, self._admit = show, find, make, admit
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Peers can connect to it."""
        return self.ready_at is not None and not self.over

    @property
    def streams(self) -> int:
        """Open streams."""
        return 0 if self.allocation is None else self.allocation.streams

    def is_for(self, wanted: "Wanted") -> bool:
        """Tell whether it was made for this."""
        return (self.server, self.credentials, self.ca) == wanted

    def begin(self, group: asyncio.TaskGroup) -> None:
        """Live in a task of its own until the allocation is lost or closed; the error, if any, is kept."""
        self._task = group.create_task(self._run())

    async def close(self) -> None:
        """Give the allocation back, which ends its streams. Bounded in time."""
        if self.ready and self.allocation is not None:
            await self.allocation.close()
        elif self._task is not None:
            self._task.cancel()

    async def renew(self) -> None:
        """Replace the credentials of the living allocation. Raises TurnError; `outdated` is set where it never can."""
        assert self.allocation is not None
        given = await self._show(self.credentials)
        try:
            await self.allocation.renew(given.credentials)
        except TurnError as exc:
            if exc.reason not in (TurnReason.TIMEOUT, TurnReason.CONNECTION_LOST):
                self.outdated = True
            raise
        self._note(given)

    def _note(self, given: Shown) -> None:
        self.renew_at = None
        if given.lifetime_s is not None:
            # Not all at once: many allocations are made in the same second, at our start.
            self.renew_at = self._loop.time() + given.lifetime_s * RENEW_AFTER * random.uniform(0.85, 1)

    async def _run(self) -> None:
        try:
            try:
                await self._live(None)
            except TurnError as exc:
                if exc.alternate is None or self.ready_at is not None:
                    raise
                # Followed once, with the same credentials and for the same name (RFC 8489, section 10).
                log.info("turn_redirected", extra={"event": {"url": self.server.url, "to": list(exc.alternate)}})
                await self._live(exc.alternate)
        except TurnError as exc:
            self.error = exc
        except Exception as exc:  # one registration's fault must not end the others
            log.exception("registration_error", extra={"event": {"url": self.server.url}})
            self.error = TurnError(TurnReason.INTERNAL, type(exc).__name__)
        finally:
            self.over = True
            self._on_change()

    async def _live(self, alternate: tuple[str, int] | None) -> None:
        url = parsed(self.server.url)
        dial = dialler(url, self.ca)
        given = await self._show(self.credentials)
        address, port = alternate or await self._find(url)
        await self._admit(address, port)
        self._note(given)
        self.allocation = self._make(address, port, given.credentials, dial)
        await self.allocation.run(self._ready)

    def _ready(self) -> None:
        self.ready_at, self.steady_from = time.time(), self._loop.time()
        self._on_change()


async def shown(config: RegistrarConfig, discovery: Discovery, via: str, credentials: TurnCredentials) -> Shown:
    """Make or get what that network's TURN servers are shown. Raises TurnError."""
    match credentials:
        case Credentials():
            return Shown(credentials=credentials, lifetime_s=None)
        case RestSecret(secret=secret):
            name = f"{config.network}.{config.gateway}"
            username, password = rest_credentials(secret, name, time.time() + REST_LIFETIME_S)
            return Shown(credentials=Credentials(username=username, password=password), lifetime_s=REST_LIFETIME_S)
    return await _in_time(_issued(discovery, via), ISSUE_TIMEOUT_S, TurnReason.NO_CREDENTIALS)


async def _issued(discovery: Discovery, via: str) -> Shown:
    try:
        issued = await discovery.turn_credentials(via)
    except DiscoveryError as exc:
        raise TurnError(TurnReason.NO_CREDENTIALS, str(exc)) from exc
    return Shown(
        credentials=Credentials(username=issued.username, password=issued.password), lifetime_s=float(issued.ttl_s)
    )


async def endpoint(url: TurnUrl, turn: int, refusal: Callable[[str, int], str | None]) -> tuple[str, int]:
    """Return an IP address of the server that is not refused, the next one with every `turn`, and its port. Raises TurnError."""
    try:
        addresses = [str(ip_address(url.host))]
    except ValueError:
        addresses = await _in_time(_look_up(url.host, url.port), RESOLVE_TIMEOUT_S, TurnReason.UNRESOLVED)
    if not addresses:
        raise TurnError(TurnReason.UNRESOLVED, "the name has no address")
    refused = {address: refusal(address, url.port) for address in addresses}
    good = [address for address, why in refused.items() if why is None]
    if not good:
        raise TurnError(TurnReason.REFUSED_ADDRESS, next(why for why in refused.values() if why is not None))
    return good[turn % len(good)], url.port


async def resolved(names: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the addresses and ports behind names of our own; of one that does not resolve in time, none."""
    found = []
    for host, port in names:
        with contextlib.suppress(TurnError):
            addresses = await _in_time(_look_up(host, port), RESOLVE_TIMEOUT_S, TurnReason.UNRESOLVED)
            found += [(address, port) for address in addresses]
    return found


def parsed(url: str) -> TurnUrl:
    """Read the URL of a server. Raises TurnError."""
    try:
        return parse_turn_url(url)
    except BadAddress as exc:
        raise TurnError(TurnReason.REFUSED_ADDRESS, str(exc)) from exc


def dialler(url: TurnUrl, ca: str | None) -> Dial:
    """Return what opens connections to this server, control and data alike; `ca` is PEM. Raises TurnError."""
    if not url.tls:
        return connect
    if ca == "":  # which would be the system's authorities
        raise TurnError(TurnReason.TLS_FAILED, "there is no certificate in the file of the authority")
    try:
        context = ssl.create_default_context(cadata=ca)
    except OSError as exc:
        raise TurnError(TurnReason.TLS_FAILED, f"the file of the authority: {exc.strerror or exc}") from exc
    return TlsDial(context, url.host)


class TlsDial:
    """Opens connections to one server over TLS, each of which resumes the session of the first where that is worth it.

    Every stream has a connection of its own. With TLS 1.2, which is all that Debian's coturn speaks, one that is resumed takes a
    round trip less, and less CPU of both. With TLS 1.3 it saves no round trip, and as much CPU as it costs to carry a session from
    one connection to the next (measured). A server that has forgotten the session shakes hands in full.
    """

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._context, self._host = context, host
        self._session: ssl.SSLSession | None = None

    async def __call__(self, address: str, port: int, *, timeout_s: float) -> SocketStream:
        """Connect and shake hands, as `connect_tls`."""
        try:
            wire = await connect_tls(
                address,
                port,
                context=self._context,
                server_hostname=self._host,
                timeout_s=timeout_s,
                resume=self._session,
            )
        except ssl.SSLError:
            self._session = None  # should it be to blame, then not twice
            raise
        if not wire.session.session_reused and wire.session.version() == "TLSv1.2":
            self._session = wire.session.session
        return wire


async def _in_time(work: Awaitable[T], timeout_s: float, reason: TurnReason) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise TurnError(reason, f"no answer within {timeout_s:g} s") from None


async def _look_up(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise TurnError(TurnReason.UNRESOLVED, f"{host}: {exc.strerror or exc}") from exc
    return list(dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found))
