"""An RFC 6062 allocation: a port on a TURN server. We take over each connection that peers make to it.

One `Allocation` is one control connection from start to end: allocate, refresh lifetime and permissions, bind each peer that the
server announces, close. It is not reusable: if it is lost, the registrar makes a new one, which has another port.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from sniproxy.engine import SocketStream, connect
from turnreg.client.connection_bind import BindResult, ConnectionBinds
from turnreg.client.control_connection import ControlConnection, Credentials, TurnError, TurnReason, describe
from turnreg.client.permissions import Permissions
from turnreg.client.timing import Timing
from turnreg.stun.message import FAMILY_IPV4, FAMILY_IPV6, TRANSPORT_TCP, Attribute, Message, Method, StunError

__all__ = ["Allocation", "BindResult", "Bound", "Credentials", "Dial", "Timing", "TurnError", "TurnReason"]

log = logging.getLogger(__name__)

MIN_REFRESH_S = 0.25
"""Shortest time between two refreshes, however short the lifetime that the server grants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The bound connection of one peer: the next byte read from the stream is the peer's first byte."""

    stream: SocketStream
    peer: tuple[str, int]
    """Its address and port, as the TURN server sees them."""
    via: str
    """The network that owns the TURN server."""
    turn: str
    """Id of that TURN server's record."""
    allocation: str
    """Id of our allocation record."""


class Dial(Protocol):
    """Open a connection to a TURN server: the engine's `connect`, or something that adds TLS to it."""

    def __call__(self, address: str, port: int, *, timeout_s: float) -> Awaitable[SocketStream]: ...


class Allocation:
    """One TCP allocation. It exists until `run()` raises, or returns after `close()`. Not reusable."""

    def __init__(
        self,
        *,
        address: str,
        port: int,
        credentials: Credentials,
        on_stream: Callable[[Bound], None],
        via: str,
        turn: str,
        record: str,
        peers: frozenset[str] = frozenset(),
        family: int = FAMILY_IPV4,
        on_bind: Callable[[BindResult], None] = lambda _: None,
        dial: Dial = connect,
        timing: Timing | None = None,
    ) -> None:
        """Make an allocation that `run` connects.

        Args:
            address: the server's IP address. All data connections use the same address, port and `dial`: a name could resolve to
                another server by then.
            on_stream: called with each bound stream, whose byte stream it then owns; must not block.
            via, turn, record: copied into each `Bound`.
            peers: as for `allow`.
            family: FAMILY_IPV4 or FAMILY_IPV6, the family of the relayed address.
            on_bind: called with the result for every peer that the server announced.
        """
        self.address, self.port, self.record = address, port, record
        self.relayed: tuple[str, int] | None = None
        """Address and port that peers connect to; None until allocated."""
        self.mapped: tuple[str, int] | None = None
        """Our own address and port as the server sees them; None until allocated."""
        self.lifetime_s = 0
        self.timing = timing or Timing()
        self.permissions = Permissions(
            record=record,
            ask=self._insist,
            refresh_s=self.timing.permission_refresh_s,
            refused_retry_s=self.timing.refused_retry_s,
        )
        self._credentials = credentials
        self._on_stream, self._on_bind = on_stream, on_bind
        self._via, self._turn = via, turn
        self._family = family
        self._dial = dial
        self._ended = asyncio.Event()
        self._error: TurnError | None = None
        self._control: ControlConnection | None = None
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._wires: list[SocketStream] = []
        self._pruned_at = 0
        self.allow(peers)

    def allow(self, addresses: frozenset[str]) -> None:
        """Set the addresses that may connect. A new address has its permission one round trip later.

        The server keeps a permission for up to 300 s after its address was removed from the set; such a peer is not bound.
        """
        self.permissions.want(addresses)

    @property
    def streams(self) -> int:
        """Number of bound streams that are still open."""
        self._wires = [stream for stream in self._wires if not stream.closed]
        return len(self._wires)

    async def renew(self, credentials: Credentials) -> None:
        """Switch to these credentials, if the server accepts new ones for an existing allocation. Otherwise nothing changes.

        Some servers do if both are of the same account (RFC 8656, section 7.3: the username must be the same; of REST usernames
        only the part after the expiry counts). coturn answers 441.

        Raises:
            TurnError: the server does not accept them, or there is no allocation.
        """
        if self._control is None or self.relayed is None:
            raise TurnError(TurnReason.CONNECTION_LOST, "there is no allocation")
        answer = await self._control.ask(Method.REFRESH, self._asking_lifetime, as_whom=credentials)
        self.lifetime_s = _lifetime(answer)

    # Life

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Allocate, then keep the allocation until it is lost or `close()` is called. Cancel to drop everything at once.

        `on_ready` is called once, when the server has granted the allocation and has answered the request for every permission
        that was wanted by then.

        Raises:
            TurnError: the allocation failed or was lost.
        """
        stream = await self._connected()
        try:
            control = ControlConnection(stream, self._credentials, timeout_s=self.timing.transaction_s)
            peers = ConnectionBinds(
                control,
                record=self.record,
                dial=self._dialled,
                admits=self.permissions.wants,
                spawn=self._spawn,
                on_bound=self._bound,
                on_result=self._on_bind,
                timing=self.timing,
            )
            async with asyncio.TaskGroup() as self._group:
                self._control = control
                self._spawn(control.run, peers.take)
                self._spawn(self._live, on_ready)
                await self._ended.wait()
                for task in self._tasks:
                    task.cancel()
        finally:
            self._control = self._group = None
            stream.close()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Delete the allocation on the server, which ends its streams, and make `run()` return. Takes at most `timing.close_s`."""
        control = self._control
        self._closing = True
        if control is not None and self.relayed is not None and not self._ended.is_set():
            try:
                async with asyncio.timeout(self.timing.close_s):
                    await control.ask(Method.REFRESH, lambda m: m.with_number(Attribute.LIFETIME, 0))
            except (TurnError, TimeoutError) as exc:
                log.debug("allocation %s: not deleted: %s", self.record, exc)
        self._finish(None)

    def _finish(self, error: TurnError | None) -> None:
        if not self._ended.is_set():
            self._error = (
                None if self._closing else error
            )  # the server may hang up as soon as it has been asked to delete
            self._ended.set()

    def _spawn(self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> asyncio.Task[None]:
        """Run a task of this allocation; a TurnError from it ends the allocation."""
        assert self._group is not None, "only while running"
        task = self._group.create_task(self._part(function, *arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _part(self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        try:
            await function(*arguments)
        except TurnError as exc:
            self._finish(exc)

    async def _connected(self) -> SocketStream:
        try:
            stream = await self._dialled(self.timing.connect_s)
        except TimeoutError:
            raise TurnError(TurnReason.CONNECT_FAILED, f"no connection in {self.timing.connect_s:g} s") from None
        except ssl.SSLError as exc:
            raise TurnError(TurnReason.TLS_FAILED, describe(exc)) from exc
        except OSError as exc:
            raise TurnError(TurnReason.CONNECT_FAILED, describe(exc)) from exc
        with socket.fromfd(
            stream.fd, socket.AF_INET, socket.SOCK_STREAM
        ) as same:  # the option belongs to the connection, not to the descriptor
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self.timing.user_timeout_s * 1000))
        return stream

    async def _dialled(self, timeout_s: float) -> SocketStream:
        return await self._dial(self.address, self.port, timeout_s=timeout_s)

    def _bound(self, stream: SocketStream, peer: tuple[str, int]) -> None:
        if len(self._wires) >= 2 * self._pruned_at + 16:
            self._pruned_at = self.streams
        self._wires.append(stream)
        self._on_stream(Bound(stream=stream, peer=peer, via=self._via, turn=self._turn, allocation=self.record))

    # Allocation and lifetime

    async def _live(self, on_ready: Callable[[], None]) -> None:
        await self._allocate()
        self._spawn(self._keep_lifetime)
        self._spawn(self._keep_alive)
        await self.permissions.ask()
        on_ready()
        await self.permissions.keep()

    async def _allocate(self) -> None:
        def fill(message: Message) -> Message:
            message = message.with_first_byte(Attribute.REQUESTED_TRANSPORT, TRANSPORT_TCP)
            message = message.with_number(Attribute.LIFETIME, self.timing.lifetime_s)
            if self._family == FAMILY_IPV6:  # IPv4 is the default, and some servers reject the attribute
                message = message.with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6)
            return message

        answer = await self._ask(Method.ALLOCATE, fill)
        try:
            relayed = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS)
            self.mapped = answer.xor_address(Attribute.XOR_MAPPED_ADDRESS)
        except StunError as exc:
            raise TurnError(TurnReason.BAD_ANSWER, str(exc)) from exc
        if relayed is None or relayed[1] == 0:
            raise TurnError(TurnReason.BAD_ANSWER, "the answer to ALLOCATE has no relayed address")
        self.lifetime_s = _lifetime(answer)
        self.permissions.family = FAMILY_IPV6 if ":" in relayed[0] else FAMILY_IPV4
        self.relayed = relayed

    async def _keep_lifetime(self) -> None:
        while True:
            await asyncio.sleep(max(MIN_REFRESH_S, self.lifetime_s / 2))
            self.lifetime_s = _lifetime(await self._insist(Method.REFRESH, self._asking_lifetime))

    async def _keep_alive(self) -> None:
        """Detect a dead path within 30 s, even if it loses only what we send, and keep NAT mappings alive.

        A Binding is the cheapest request, but a server may be configured not to answer it. So a Binding without an answer is
        followed by a Refresh; if that is answered, Refresh is used from then on.
        """
        assert self._control is not None, "only while running"
        binding = True
        while True:
            await asyncio.sleep(self.timing.keepalive_s)
            try:
                if binding:
                    await self._control.ping()
                    continue
            except TurnError as exc:
                if exc.reason is not TurnReason.TIMEOUT:
                    raise
                binding = False
            self.lifetime_s = _lifetime(await self._insist(Method.REFRESH, self._asking_lifetime))

    def _asking_lifetime(self, message: Message) -> Message:
        return message.with_number(Attribute.LIFETIME, self.timing.lifetime_s)

    async def _ask(self, method: Method, fill: Callable[[Message], Message]) -> Message:
        assert self._control is not None, "only while running"
        return await self._control.ask(method, fill)

    async def _insist(self, method: Method, fill: Callable[[Message], Message]) -> Message:
        """Ask again if no answer comes: losing the allocation would end all its streams."""
        for _ in range(self.timing.tries - 1):
            try:
                return await self._ask(method, fill)
            except TurnError as exc:
                if exc.reason is not TurnReason.TIMEOUT:
                    raise
                log.warning("turn_no_answer", extra={"event": {"allocation": self.record, "detail": exc.detail}})
        return await self._ask(method, fill)


def _lifetime(answer: Message) -> int:
    """Return the lifetime that the server grants, in seconds. Raises TurnError if it grants none."""
    try:
        lifetime_s = answer.number(Attribute.LIFETIME)
    except StunError as exc:
        raise TurnError(TurnReason.BAD_ANSWER, str(exc)) from exc
    if not lifetime_s:
        raise TurnError(TurnReason.BAD_ANSWER, "the server grants no lifetime")
    return lifetime_s
