"""Binding peers: the server announces them on the control connection, and each is bound over a data connection of its own.

coturn answers a bind that it rejects with a bare reset and drops the peer, so a bind is signed only with a nonce that was valid a
moment ago. Other servers answer with an error and keep the peer; there the bind is tried once more.
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
"""Failed binds logged in each period. Any admitted peer, and the server itself, can make binds fail; metrics count all of them."""


class BindResult(StrEnum):
    """Result for an announced peer: `ok`, or why it has no stream. Metric label and log field."""

    OK = "ok"
    NOT_ALLOWED = "not_allowed"
    OVERLOADED = "overloaded"
    CONNECT_FAILED = "connect_failed"
    RESET = "reset"
    TIMEOUT = "timeout"
    REJECTED = "rejected"
    MALFORMED = "malformed"


class BindFailed(Exception):
    """A peer could not be bound. `code` is the server's error code, if it sent one."""

    def __init__(self, result: BindResult, detail: str, code: int | None = None) -> None:
        super().__init__(f"{result}: {detail}")
        self.result = result
        self.detail = detail
        self.code = code


class ConnectionBinds:
    """Binds the peers announced to `take()`, in order, each in a task of its own."""

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
        """Bind the peers of one allocation.

        Args:
            dial: opens a data connection within that many seconds. Raises OSError, TimeoutError.
            admits: says whether a peer at this address is to be bound at all.
            spawn: runs a task of the allocation; a TurnError from it ends the allocation.
            on_bound: called with each bound stream, which it then owns, and the peer's address and port.
            on_result: called with the result for each announced peer.
        """
        self._control = control
        self._record = record
        self._dial, self._admits, self._spawn = dial, admits, spawn
        self._on_bound, self._on_result = on_bound, on_result
        self._timing = timing
        self._binding: set[bytes] = set()
        self._queue: deque[tuple[float, bytes, tuple[str, int]]] = (
            deque()
        )  # time of the announcement, connection id, peer
        self._under_way = 0
        self._window = BindConcurrency(timing.max_binds)
        self._proving: asyncio.Task[None] | None = None
        self._log_until, self._logged = 0.0, 0

    def take(self, indication: Message) -> None:
        """Handle an indication. A ConnectionAttempt is not signed, so it is only a hint until a bind has succeeded."""
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
        """Start queued binds, as many as the limit allows."""
        now = asyncio.get_running_loop().time()
        while self._queue and self._under_way < self._window.size:
            announced, connection_id, peer = self._queue.popleft()
            if now - announced > self._timing.max_queued_s:
                self._binding.discard(connection_id)
                self._failed(BindResult.OVERLOADED, peer, f"still queued after {self._timing.max_queued_s:g} s")
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
                stream = await self._bound_wire(connection_id, peer)
        except asyncio.CancelledError:
            self._queue.clear()  # the allocation ends: no more binds
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
                self._on_bound(stream, peer)
            except Exception:  # an error in one stream must not end the allocation and all other streams
                log.exception("stream_error", extra={"event": {"allocation": self._record, "peer": list(peer)}})
                stream.reset()
        finally:
            self._binding.discard(connection_id)
            self._under_way -= 1
            self._begin()

    async def _bound_wire(self, connection_id: bytes, peer: tuple[str, int]) -> SocketStream:
        """Open a data connection and bind it. Try once more if the server rejected the nonce."""
        try:
            return await self._bind_once(connection_id, peer)
        except BindFailed as exc:
            # coturn gives no reason. It may have been the nonce, so the next bind must verify it first.
            self._control.doubt_nonce()
            if exc.code not in (401, 438):
                raise
        return await self._bind_once(connection_id, peer)

    async def _bind_once(self, connection_id: bytes, peer: tuple[str, int]) -> SocketStream:
        proving = self._prove_nonce(peer[0])
        try:
            stream = await self._dial(self._timing.bind_s)
        except TimeoutError:
            raise
        except OSError as exc:
            raise BindFailed(BindResult.CONNECT_FAILED, describe(exc)) from exc
        try:
            if proving is not None:
                await asyncio.wait({proving})
            await self._connection_bind(stream, connection_id)
        except BaseException as exc:
            stream.reset()  # a close would keep our local port for a minute (TIME_WAIT)
            match exc:
                case EOFError():
                    raise BindFailed(BindResult.RESET, "the server closed the connection") from exc
                case OSError():
                    raise BindFailed(BindResult.RESET, describe(exc)) from exc
                case StunError():
                    raise BindFailed(BindResult.MALFORMED, str(exc)) from exc
            raise
        return stream

    async def _connection_bind(self, stream: SocketStream, connection_id: bytes) -> None:
        """Send ConnectionBind and read its answer and no further: the peer's bytes follow (RFC 6062, section 5.4).

        Nothing is written between request and answer: servers drop it.
        """
        bind = request(Method.CONNECTION_BIND).with_bytes(Attribute.CONNECTION_ID, connection_id)
        data, key = self._control.sign(bind)
        await stream.send(data)
        answer = await read_message(stream)
        if answer.transaction_id != bind.transaction_id or answer.method != Method.CONNECTION_BIND:
            raise BindFailed(BindResult.MALFORMED, "an answer to another request")
        if not counts(answer, key, unsigned_success=True):
            # Ignoring it, as on the control connection, would mean reading the peer's bytes as another answer.
            raise BindFailed(BindResult.REJECTED, "an answer with a bad MESSAGE-INTEGRITY")
        if answer.message_class is not MessageClass.SUCCESS:
            error = TurnError.of_answer(answer)
            raise BindFailed(BindResult.REJECTED, error.detail, error.code)

    def _prove_nonce(self, peer: str) -> asyncio.Task[None] | None:
        """Return the task that verifies the nonce, to be awaited before signing; None if the nonce was verified recently.

        A signed CreatePermission for the peer on the control connection verifies it. One such request serves all waiting peers.
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
