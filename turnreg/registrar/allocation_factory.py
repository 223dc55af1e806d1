"""The steps to make an allocation: get credentials, resolve the server's name, check that its address may be dialled, connect.

Every step that can fail raises TurnError.
"""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeVar

from discovery.client.contract import Discovery, DiscoveryError
from discovery.model.addresses import BadAddress, TurnUrl, parse_address, parse_turn_url, spellings
from sniproxy.engine import SocketStream, connect, connect_tls
from turnreg.client.allocation import Allocation, BindResult, Bound, Credentials, Dial, TurnError, TurnReason
from turnreg.registrar.admitted_peers import AdmittedPeers
from turnreg.registrar.config import RegistrarConfig, RestSecret, TurnCredentials
from turnreg.registrar.destinations import Destinations
from turnreg.stun.auth import rest_credentials

T = TypeVar("T")

LookUp = Callable[[str, int], Awaitable[list[str]]]
"""Resolves a host name, for a port, to IP addresses. Raises TurnError."""

REST_LIFETIME_S = 7 * 24 * 3600.0
"""Lifetime of the REST credentials that a gateway with the secret makes for itself. Nobody else sees them, so a shorter lifetime
would gain nothing."""

RESOLVE_TIMEOUT_S = 5.0
ISSUE_TIMEOUT_S = 10.0
"""For an HTTP request to discovery, which may have to fail over to its second server."""

ADMISSION_POLL_S = 1.0
"""How often a registration that waits before its next attempt at an address checks whether it still has to wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a TURN server's record says about registering there."""

    url: str
    family: int
    """Family of the relayed address: IPv6 only if the server's record has no IPv4 address."""
    port_min: int
    port_max: int


Wanted = tuple[Server, TurnCredentials, str | None]
"""Where to register, with which credentials, and the authorities (PEM) that verify a `turns:` server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Credentials to present to the server, and how long they are valid."""

    credentials: Credentials
    lifetime_s: float | None
    """Seconds; None if they do not expire."""


class AllocationFactory:
    """Makes the allocations of one registration, each in four steps: `show`, `find`, `admit`, `make`."""

    def __init__(
        self,
        config: RegistrarConfig,
        discovery: Discovery,
        destinations: Destinations,
        peers: AdmittedPeers,
        *,
        via: str,
        turn: str,
        record: str,
        on_stream: Callable[[Bound], None],
        on_bind: Callable[[BindResult], None],
        look_up: LookUp,
    ) -> None:
        """Make allocations for one registration.

        Args:
            via, turn, record: ids of the network, its TURN server, and our allocation record.
            look_up: resolves the server's name.
        """
        self.config = config
        self._discovery, self._destinations, self._peers = discovery, destinations, peers
        self._via, self._turn, self._record = via, turn, record
        self._on_stream, self._on_bind = on_stream, on_bind
        self._look_up = look_up
        self._loop = asyncio.get_running_loop()

    async def show(self, credentials: TurnCredentials) -> Shown:
        """Make or fetch the credentials to present to the TURN server."""
        match credentials:
            case Credentials():
                return Shown(credentials=credentials, lifetime_s=None)
            case RestSecret(secret=secret):
                name = f"{self.config.network}.{self.config.gateway}"
                username, password = rest_credentials(secret, name, time.time() + REST_LIFETIME_S)
                shown = Credentials(username=username, password=password)
                return Shown(credentials=shown, lifetime_s=REST_LIFETIME_S)
        return await _in_time(self._issued(), ISSUE_TIMEOUT_S, TurnReason.NO_CREDENTIALS)

    async def _issued(self) -> Shown:
        try:
            issued = await self._discovery.turn_credentials(self._via)
        except DiscoveryError as exc:
            raise TurnError(TurnReason.NO_CREDENTIALS, str(exc)) from exc
        shown = Credentials(username=issued.username, password=issued.password)
        return Shown(credentials=shown, lifetime_s=float(issued.ttl_s))

    async def find(self, url: TurnUrl, attempt: int) -> tuple[str, int]:
        """Resolve the server's name; return an IP address that may be dialled, and the port. Each attempt gets the next address."""
        refusal = await self._refusals()
        try:
            addresses = [str(ip_address(url.host))]
        except ValueError:
            addresses = await _in_time(self._look_up(url.host, url.port), RESOLVE_TIMEOUT_S, TurnReason.UNRESOLVED)
        if not addresses:
            raise TurnError(TurnReason.UNRESOLVED, "the name has no address")
        refused = {address: refusal(address, url.port) for address in addresses}
        good = [address for address, why in refused.items() if why is None]
        if not good:
            raise TurnError(TurnReason.REFUSED_ADDRESS, next(why for why in refused.values() if why is not None))
        return good[attempt % len(good)], url.port

    async def admit(self, address: str, port: int) -> None:
        """Wait until an address may be tried, and count the attempt. Raises TurnError if it must not be dialled."""
        refusal = await self._refusals()
        while (why := refusal(address, port)) is None:
            wait_s = self._destinations.wait_s(self._via, address, port, self._loop.time())
            if not wait_s:
                self._destinations.began(self._via, address, port, self._loop.time())
                return
            # Another registration may prove meanwhile that there is a TURN server.
            await asyncio.sleep(min(wait_s, ADMISSION_POLL_S))
        raise TurnError(TurnReason.REFUSED_ADDRESS, why)

    def make(self, server: Server, address: str, port: int, credentials: Credentials, dial: Dial) -> Allocation:
        """Make the allocation, without connecting it."""
        return Allocation(
            address=address,
            port=port,
            credentials=credentials,
            on_stream=self._on_stream,
            via=self._via,
            turn=self._turn,
            record=self._record,
            peers=self._peers.addresses,
            family=server.family,
            on_bind=self._on_bind,
            dial=dial,
            timing=self.config.timing,
        )

    def refusal(self, address: str, port: int, *, known: bool = False) -> str | None:
        """Return why this gateway must not connect there for this network, None if it may. `known`: we are connected there."""
        mesh, now = self._discovery.mesh, self._loop.time()
        try:
            return self._destinations.refusal(self._via, address, port, mesh, now, known=known)
        except BadAddress as exc:
            return str(exc)

    def prove(self, allocation: Allocation) -> None:
        """Record that there is a TURN server at this address."""
        self._destinations.succeeded(self._via, allocation.address, allocation.port, self._loop.time())

    async def _refusals(self) -> Callable[[str, int], str | None]:
        """Resolve the discovery servers that are configured by name. Return `refusal`, which refuses their addresses too."""
        named = await self._resolved(self.config.guard_names)

        def refusal(address: str, port: int) -> str | None:
            why = self.refusal(address, port)
            if why is None and any((str(one), port) in named for one in spellings(parse_address(address))):
                return f"{address} port {port} is a discovery server"
            return why

        return refusal

    async def _resolved(self, names: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Return addresses and ports of these names; none for a name that does not resolve in time."""
        found = []
        for host, port in names:
            with contextlib.suppress(TurnError):
                addresses = await _in_time(self._look_up(host, port), RESOLVE_TIMEOUT_S, TurnReason.UNRESOLVED)
                found += [(address, port) for address in addresses]
        return found


def parsed(url: str) -> TurnUrl:
    """Parse the URL of a server. Raises TurnError."""
    try:
        return parse_turn_url(url)
    except BadAddress as exc:
        raise TurnError(TurnReason.REFUSED_ADDRESS, str(exc)) from exc


def dialler(url: TurnUrl, ca: str | None) -> Dial:
    """Return the function that opens control and data connections to this server. `ca` is PEM. Raises TurnError."""
    if not url.tls:
        return connect
    if ca == "":  # which would select the system's authorities
        raise TurnError(TurnReason.TLS_FAILED, "there is no certificate in the CA file")
    try:
        context = ssl.create_default_context(cadata=ca)
    except OSError as exc:
        raise TurnError(TurnReason.TLS_FAILED, f"the CA file: {exc.strerror or exc}") from exc
    return TlsDial(context, url.host)


class TlsDial:
    """Opens TLS connections to one server. With TLS 1.2, they resume the session of the first one.

    Every stream has a connection of its own. With TLS 1.2, which is all that Debian's coturn supports, resuming saves a round trip
    and CPU on both sides. With TLS 1.3 it saves no round trip, and no more CPU than it costs to pass a session from one connection
    to the next (measured). If the server no longer has the session, there is a full handshake.
    """

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._context, self._host = context, host
        self._session: ssl.SSLSession | None = None

    async def __call__(self, address: str, port: int, *, timeout_s: float) -> SocketStream:
        """Connect and do the TLS handshake, as `connect_tls` does."""
        try:
            stream = await connect_tls(
                address,
                port,
                context=self._context,
                server_hostname=self._host,
                timeout_s=timeout_s,
                resume=self._session,
            )
        except ssl.SSLError:
            self._session = None  # in case it was the cause
            raise
        if not stream.session.session_reused and stream.session.version() == "TLSv1.2":
            self._session = stream.session.session
        return stream


async def _in_time(work: Awaitable[T], timeout_s: float, reason: TurnReason) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise TurnError(reason, f"no answer within {timeout_s:g} s") from None


async def look_up(host: str, port: int) -> list[str]:
    """Ask the system's resolver for the addresses of a TCP service. Raises TurnError."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise TurnError(TurnReason.UNRESOLVED, f"{host}: {exc.strerror or exc}") from exc
    return list(dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found))
