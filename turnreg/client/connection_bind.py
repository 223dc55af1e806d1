"""Peers that connected to an allocation: announced on the control connection, bound by a connection of their own each.

coturn answers a bind that it does not like with a bare reset and forgets the peer, so a bind is signed only with a
nonce that was good a moment ago. Others answer with an error and keep the peer: there it is tried once more.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from enum import StrEnum
from typing import Any

from sniproxy.engine import SocketStream
from turnreg.client.bind_concurrency import BindConcurrency
from turnreg.client.control_connection import (
    ControlConnection,
    TurnError,
    TurnReason,
    counts,
    describe,
    read_message,
    request,
)
from turnreg.client.permissions import FATAL
from turnreg.client.timing import Timing
from turnreg.stun.message import Attribute, Message, MessageClass, Method, StunError

log = logging.getLogger(__name__)


LOG_PERIOD_S = 60.0
LOGGED_PER_PERIOD = 20
"""Anybody whom the server lets through, and the server itself, can make binds fail; the metrics count those not logged."""


class BindResult(StrEnum):
    """How an announced peer ended: `ok`, or why it has no stream. Metric label and log field."""

    OK = "ok"
    NOT_ALLOWED = "not_allowed"
    OVERLOADED = "overloaded"
    CONNECT_FAILED = "connect_failed"
    RESET = "reset"
    TIMEOUT = "timeout"
    REJECTED = "rejected"
    MALFORMED = "malformed"


class BindFailed(Exception):
    """A peer could not be bound. `code` is the server's, if it gave one."""

    def __init__(self, result: BindResult, detail: str, code: int | None = None) -> None:
        super().__init__(f"{result}: {detail}")
        self.result = result
        self.detail = detail
        self.code = code


class ConnectionBinds:
    """Bind every peer that `take()` is told of in its turn, each in a task of its own."""

    def __init__(
        self,
        control: ControlConnection,
        *,
        record: str,
        dial: Callable[[float], Awaitable[SocketStream]],
        admits: Callable[[str], bool],
        spawn: Callable[[Callable[..., Coroutine[Any, Any, None]], *tuple[Any, ...]], asyncio.Task[None]],
        on_bound: Callable[[SocketStream, tuple[str, int]], None],
        on_result: Callable[[BindResult], None],
        timing: Timing,
    ) -> None:
        """Take what the allocation has.

        Args:
            dial: opens a data connection within that many seconds: OSError, TimeoutError.
            admits: tells whether a peer at this address is to be bound at all.
            spawn: runs something as part of the allocation's life; a TurnError out of it ends the allocation.
            on_bound: owns the wire from then on.
            on_result: is told how each announced peer ended.
        """
        self._control = control
        self._record = record
        self._dial, self._admits, self._spawn = dial, admits, spawn
        self._on_bound, self._on_result = on_bound, on_result
        self._timing = timing
        self._binding: set[bytes] = set()
        self._queue: deque[tuple[float, bytes, tuple[str, int]]] = deque()  # announced when, which, who
        self._under_way = 0
        self._window = BindConcurrency(timing.max_binds)
        self._proving: asyncio.Task[None] | None = None
        self._log_until, self._logged = 0.0, 0

    def take(self, indication: Message) -> None:
        """Take an indication. A ConnectionAttempt is not signed: it is a hint, which only a bind proves."""
        if indication.method != Method.CONNECTION_ATTEMPT:
            return
        try:
            connection_id = indication.get(Attribute.CONNECTION_ID)
            peer = indication.xor_address(Attribute.XOR_PEER_ADDRESS)
        except StunError:
            connection_id = peer = None
        if connection_id is None or len(connection_id) != 4 or peer is None:
            self._failed(BindResult.MALFORMED, ("?", 0), "announced without an address or an id")
        elif not self._admits(peer[0]):
            self._failed(BindResult.NOT_ALLOWED, peer, "no relay of that network is known at this address")
        elif connection_id in self._binding:
            log.debug("allocation %s: peer %s port %d announced twice", self._record, *peer)
        elif len(self._binding) >= self._timing.max_waiting:
            self._failed(BindResult.OVERLOADED, peer, f"{len(self._binding)} peers wait already")
        else:
            self._binding.add(connection_id)
            self._queue.append((asyncio.get_running_loop().time(), connection_id, peer))
            self._begin()

    def _begin(self) -> None:
        """Begin with those that wait, as far as there is room."""
        now = asyncio.get_running_loop().time()
        while self._queue and self._under_way < self._window.size:
            announced, connection_id, peer = self._queue.popleft()
            if now - announced > self._timing.max_queued_s:
                self._binding.discard(connection_id)
                self._failed(BindResult.OVERLOADED, peer, f"its turn did not come in {self._timing.max_queued_s:g} s")
                continue
            self._under_way += 1
            self._spawn(self._bind, connection_id, peer)

    def _failed(self, result: BindResult, peer: tuple[str, int], detail: str) -> None:
        self._on_result(result)
        now = asyncio.get_running_loop().time()
        if now >= self._log_until:
            self._log_until, self._logged = now + LOG_PERIOD_S, 0
        self._logged += 1
        if self._logged > LOGGED_PER_PERIOD:
            return
        fields = {"allocation": self._record, "peer": list(peer), "reason": str(result), "detail": detail}
        log.warning("bind_failed", extra={"event": fields})

    async def _bind(self, connection_id: bytes, peer: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(self._timing.bind_s):
                wire = await self._bound_wire(connection_id, peer)
        except asyncio.CancelledError:
            self._queue.clear()  # the allocation ends: nobody else's turn comes
            raise
        except BindFailed as exc:
            self._failed(exc.result, peer, exc.detail)
        except TimeoutError:
            self._window.took(self._timing.bind_s)
            self._failed(BindResult.TIMEOUT, peer, f"not bound in {self._timing.bind_s:g} s")
        else:
            self._window.took(loop.time() - started)
            self._on_result(BindResult.OK)
            try:
                self._on_bound(wire, peer)
            except Exception:  # a fault with one stream must not end the allocation and with it all the others
                log.exception("stream_error", extra={"event": {"allocation": self._record, "peer": list(peer)}})
                wire.reset()
        finally:
            self._binding.discard(connection_id)
            self._under_way -= 1
            self._begin()

    async def _bound_wire(self, connection_id: bytes, peer: tuple[str, int]) -> SocketStream:
        """Open a data connection and bind it, once more where the server says that it was the nonce."""
        try:
            return await self._bind_once(connection_id, peer)
        except BindFailed as exc:
            # coturn gives no reason, and it may have been the nonce: the next bind shall not find out again.
            self._control.doubt_nonce()
            if exc.code not in (401, 438):
                raise
        return await self._bind_once(connection_id, peer)

    async def _bind_once(self, connection_id: bytes, peer: tuple[str, int]) -> SocketStream:
        proving = self._prove_nonce(peer[0])
        try:
            wire = await self._dial(self._timing.bind_s)
        except TimeoutError:
            raise
        except OSError as exc:
            raise BindFailed(BindResult.CONNECT_FAILED, describe(exc)) from exc
        try:
            if proving is not None:
                await asyncio.wait({proving})
            await self._connection_bind(wire, connection_id)
        except BaseException as exc:
            wire.close()
            match exc:
                case EOFError():
                    raise BindFailed(BindResult.RESET, "the server closed the connection") from exc
                case OSError():
                    raise BindFailed(BindResult.RESET, describe(exc)) from exc
                case StunError():
                    raise BindFailed(BindResult.MALFORMED, str(exc)) from exc
            raise
        return wire

    async def _connection_bind(self, wire: SocketStream, connection_id: bytes) -> None:
        """Send ConnectionBind and read its answer, not a byte more: the peer's follow (RFC 6062, section 5.4).

        Nothing else is written before the answer: servers drop what comes behind the request.
        """
        bind = request(Method.CONNECTION_BIND).with_bytes(Attribute.CONNECTION_ID, connection_id)
        data, key = self._control.sign(bind)
        await wire.send(data)
        answer = await read_message(wire)
        if answer.transaction_id != bind.transaction_id or answer.method != Method.CONNECTION_BIND:
            raise BindFailed(BindResult.MALFORMED, "an answer to another request")
        if not counts(answer, key, unsigned_success=True):
            # To ignore it, as on the control connection, would be to read what follows as another answer.
            raise BindFailed(BindResult.REJECTED, "an answer with a bad MESSAGE-INTEGRITY")
        if answer.message_class is not MessageClass.SUCCESS:
            error = TurnError.of_answer(answer)
            raise BindFailed(BindResult.REJECTED, error.detail, error.code)

    def _prove_nonce(self, peer: str) -> asyncio.Task[None] | None:
        """See to it that the nonce is known to be good: return what to wait for before signing, None if it is.

        A signed CreatePermission for the peer does it, on the control connection, one at a time for all peers.
        """
        if not self._control.challenged or self._control.nonce_age_s() <= self._timing.nonce_fresh_s:
            return None
        if self._proving is None or self._proving.done():
            self._proving = self._spawn(self._prove, peer)
        return self._proving

    async def _prove(self, peer: str) -> None:
        try:
            await self._control.ask(
                Method.CREATE_PERMISSION, lambda m: m.with_xor_address(Attribute.XOR_PEER_ADDRESS, (peer, 0))
            )
        except TurnError as exc:
            if exc.reason in FATAL and exc.reason is not TurnReason.TIMEOUT:
                raise
            log.warning("nonce_may_be_stale", extra={"event": {"allocation": self._record, "detail": exc.detail}})
