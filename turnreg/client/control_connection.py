"""The control connection to a TURN server: signed STUN transactions over one TCP stream.

Not here: what an allocation needs (`turnreg.client.allocation`) and the message format (`turnreg.stun.message`).

Which answers are accepted. An answer is matched to a request by transaction id and method. The request was signed with a key, or
not signed at all before the first challenge. Then:

- request not signed: any answer is accepted;
- answer with MESSAGE-INTEGRITY: it is accepted if it verifies with that key. If not, it is ignored as if it had never been
  received (RFC 8489, section 9.2.5), and the request times out;
- error answer without it: accepted, since 401 and 438 cannot be signed and some servers sign no error at all. It can make us fail
  or ask again, but never makes us trust anything;
- success answer without it: ignored, except for ConnectionBind (`unsigned_success`), which some servers never sign. An attacker on
  the path gains no more by that than by cutting or filling a plain TCP stream.

An answer that matches no pending request (late, unknown, duplicate) is ignored. Bytes that are not STUN, or a message whose
attributes cannot be parsed, end the connection: there is no way to find the start of the next message.
"""

import asyncio
import logging
import os
import secrets
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address

from sniproxy.engine import SocketStream
from turnreg.client.timing import TRANSACTION_TIMEOUT_S
from turnreg.stun.auth import long_term_key, rest_expiry
from turnreg.stun.message import (
    FAMILY_IPV4,
    FAMILY_IPV6,
    HEADER_BYTES,
    TRANSACTION_ID_BYTES,
    Attribute,
    Message,
    MessageClass,
    Method,
    StunError,
    frame_length,
)

log = logging.getLogger(__name__)

MAX_CHALLENGES = 3
"""How often one request is repeated after a 401 or 438. An Allocate needs two repeats if its nonce expires just then."""

_KNOWN = frozenset(map(int, Attribute))


class TurnReason(StrEnum):
    """Why a registration failed or an allocation ended. Metric label and log field."""

    CONNECT_FAILED = "connect_failed"
    TLS_FAILED = "tls_failed"
    CONNECTION_LOST = "connection_lost"
    TIMEOUT = "timeout"
    MALFORMED = "malformed"
    BAD_ANSWER = "bad_answer"
    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    WRONG_CREDENTIALS = "wrong_credentials"
    STALE_NONCE = "stale_nonce"
    FORBIDDEN = "forbidden"
    MISMATCH = "mismatch"
    UNSUPPORTED_TRANSPORT = "unsupported_transport"
    FAMILY = "family"
    PEER_TAKEN = "peer_taken"
    PEER_UNREACHABLE = "peer_unreachable"
    QUOTA = "quota"
    CAPACITY = "capacity"
    REDIRECTED = "redirected"
    REJECTED = "rejected"
    NO_CREDENTIALS = "no_credentials"
    REFUSED_ADDRESS = "refused_address"
    UNRESOLVED = "unresolved"
    INTERNAL = "internal"


_REASON_OF_CODE = {
    300: TurnReason.REDIRECTED,
    400: TurnReason.BAD_REQUEST,
    401: TurnReason.UNAUTHORIZED,
    403: TurnReason.FORBIDDEN,
    437: TurnReason.MISMATCH,
    438: TurnReason.STALE_NONCE,
    440: TurnReason.FAMILY,
    441: TurnReason.WRONG_CREDENTIALS,
    442: TurnReason.UNSUPPORTED_TRANSPORT,
    443: TurnReason.FAMILY,
    446: TurnReason.PEER_TAKEN,
    447: TurnReason.PEER_UNREACHABLE,
    486: TurnReason.QUOTA,
    508: TurnReason.CAPACITY,
}


class TurnError(Exception):
    """A request to a TURN server failed, or the connection to it ended. `detail` is safe to log."""

    def __init__(
        self, reason: TurnReason, detail: str, *, code: int | None = None, alternate: tuple[str, int] | None = None
    ) -> None:
        """Make an error with a reason for metrics and a detail for people.

        Args:
            code: the server's error code, if it sent one.
            alternate: address and port of the server that a 300 redirects us to.
        """
        super().__init__(f"{reason}: {detail}")
        self.alternate = alternate
        self.reason = reason
        self.detail = detail
        self.code = code

    @classmethod
    def of_answer(cls, answer: Message) -> "TurnError":
        """Make the error for an error answer."""
        try:
            error = answer.error
        except StunError as exc:
            return cls(TurnReason.BAD_ANSWER, str(exc))
        if error is None:
            return cls(TurnReason.BAD_ANSWER, "an error answer without ERROR-CODE")
        code, phrase = error
        reason = _REASON_OF_CODE.get(code, TurnReason.REJECTED)
        alternate = None
        if code == 300:
            try:
                alternate = _plain_address(answer.get(Attribute.ALTERNATE_SERVER))
            except StunError as exc:
                return cls(TurnReason.BAD_ANSWER, str(exc), code=code)
        return cls(reason, f"the server answered {code} {phrase}".rstrip(), code=code, alternate=alternate)


def _lifetime_left(username: str) -> str:
    """Say how long a REST username is valid by our clock: if a server refuses it, the clocks may differ."""
    expiry = rest_expiry(username)
    if expiry is None:
        return ""
    left_s = round(expiry - time.time())
    if left_s <= 0:
        return f"; the credentials expired {-left_s} s ago by our clock"
    return f"; the credentials are valid for {left_s} s more by our clock: if they are right, compare it with the server's clock"


def _plain_address(value: bytes | None) -> tuple[str, int] | None:
    """Parse an address that is not XORed, such as ALTERNATE-SERVER (RFC 8489, section 14.15). Raises StunError."""
    if value is None:
        return None
    if (len(value), value[1:2]) not in ((8, bytes([FAMILY_IPV4])), (20, bytes([FAMILY_IPV6]))):
        raise StunError("ALTERNATE-SERVER is malformed")
    return str(ip_address(value[4:])), int.from_bytes(value[2:4], "big")


def describe(error: OSError) -> str:
    """Return the text of a system error; `error` itself may have none."""
    if isinstance(error, ssl.SSLError) or not error.errno:
        return str(error) or type(error).__name__
    return os.strerror(error.errno)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Long-term credentials (RFC 8489, section 9.2), as sent to the server."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Session:
    """Realm and nonce of the server's last challenge."""

    realm: str
    nonce: str

    def key(self, credentials: Credentials) -> bytes:
        """Return the signing key for these credentials."""
        return long_term_key(credentials.username, self.realm, credentials.password)


@dataclass(frozen=True, slots=True)
class _Pending:
    method: int
    key: bytes | None
    answer: asyncio.Future[Message | None]
    """None: the connection ended."""


def request(method: Method) -> Message:
    """Make a request without attributes, with a new transaction id."""
    return Message(method, MessageClass.REQUEST, secrets.token_bytes(TRANSACTION_ID_BYTES))


def counts(answer: Message, key: bytes | None, *, unsigned_success: bool = False) -> bool:
    """Tell whether an answer to a request signed with `key` is accepted: the rules at the top of this module."""
    if key is None:
        return True
    if answer.has_integrity:
        return answer.verify_integrity(key)
    return answer.message_class is MessageClass.ERROR or unsigned_success


async def read_message(stream: SocketStream) -> Message:
    """Read one whole message and no further. Raises StunError, OSError, and EOFError if the message is incomplete."""
    head = await stream.recv_exactly(HEADER_BYTES)
    length = frame_length(head) or HEADER_BYTES
    return Message.parse(head + await stream.recv_exactly(length - HEADER_BYTES) if length > HEADER_BYTES else head)


class ControlConnection:
    """Transactions on one connected stream. `ask()` gets its answers only while `run()` runs; both raise TurnError."""

    def __init__(
        self, stream: SocketStream, credentials: Credentials, *, timeout_s: float = TRANSACTION_TIMEOUT_S
    ) -> None:
        self._stream = stream
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._pending: dict[bytes, _Pending] = {}
        self._sending = asyncio.Lock()
        self._session: _Session | None = None
        self._nonce_proved_at: float = -1e9
        self._error: TurnError | None = None
        self._forged = 0

    # Signing

    @property
    def challenged(self) -> bool:
        """Whether the server has asked for credentials. Requests are signed from then on."""
        return self._session is not None

    def nonce_age_s(self) -> float:
        """Return the seconds since the nonce was last verified by a successful request."""
        return self._loop.time() - self._nonce_proved_at

    def doubt_nonce(self) -> None:
        """Treat the nonce as unverified until a request succeeds: a bind signed with it was refused."""
        self._nonce_proved_at = -1e9

    def sign(self, message: Message, credentials: Credentials | None = None) -> tuple[bytes, bytes | None]:
        """Return the bytes of a request and the key that signs them. Without a challenge so far, it is unsigned and the key None.

        Raises TurnError if the server's realm and nonce leave no room for the request itself.
        """
        session, credentials = self._session, credentials or self._credentials
        try:
            if session is None:
                return message.pack(), None
            signed = (
                message.with_text(Attribute.USERNAME, credentials.username)
                .with_text(Attribute.REALM, session.realm)
                .with_text(Attribute.NONCE, session.nonce)
            )
            key = session.key(credentials)
            return signed.pack(integrity_key=key), key
        except StunError as exc:
            raise TurnError(TurnReason.BAD_ANSWER, f"the server's realm and nonce are too long: {exc}") from exc

    def _challenge(self, answer: Message) -> None:
        """Store REALM and NONCE of a 401 or 438. A 438 may omit the realm if it has not changed."""
        try:
            realm, nonce = answer.text(Attribute.REALM), answer.text(Attribute.NONCE)
        except StunError as exc:
            raise TurnError(TurnReason.BAD_ANSWER, str(exc)) from exc
        session = self._session
        if realm is None and session is not None:
            realm = session.realm
        if realm is None or not nonce:
            raise TurnError(TurnReason.BAD_ANSWER, "a challenge without REALM or NONCE")
        self._session = _Session(realm, nonce)
        self._nonce_proved_at = self._loop.time()

    # Asking

    async def ask(
        self,
        method: Method,
        fill: Callable[[Message], Message] = lambda message: message,
        *,
        as_whom: Credentials | None = None,
    ) -> Message:
        """Send a request, answer the server's challenges, return its success answer. Raises TurnError.

        Args:
            fill: adds the attributes. Called again, with a new transaction id, each time the request is sent.
            as_whom: credentials to use instead of ours. If the server accepts them, they replace ours.
        """
        for _ in range(MAX_CHALLENGES + 1):
            sent_at = self._loop.time()
            answer, signed = await self._transact(fill(request(method)), as_whom)
            if answer.message_class is MessageClass.SUCCESS:
                if signed:
                    self._nonce_proved_at = max(self._nonce_proved_at, sent_at)
                    self._credentials = as_whom or self._credentials
                if unknown := answer.not_understood(_KNOWN):
                    raise TurnError(TurnReason.BAD_ANSWER, f"the answer needs attribute {unknown[0]:#06x} understood")
                return answer
            error = TurnError.of_answer(answer)
            if error.code == 401 and signed:
                error.detail += _lifetime_left((as_whom or self._credentials).username)
            if error.code == 438 or (error.code == 401 and not signed):
                self._challenge(answer)
                continue
            raise error
        raise error

    async def ping(self) -> None:
        """Send a Binding request, which needs no credentials, and accept any answer to it. Raises TurnError."""
        question = request(Method.BINDING)
        await self._exchange(question, question.pack(), None)

    async def _transact(self, message: Message, as_whom: Credentials | None) -> tuple[Message, bool]:
        """Return the accepted answer and whether the request was signed."""
        data, key = self.sign(message, as_whom)
        return await self._exchange(message, data, key), key is not None

    async def _exchange(self, message: Message, data: bytes, key: bytes | None) -> Message:
        if self._error is not None:
            raise self._error
        answer: asyncio.Future[Message | None] = self._loop.create_future()
        self._pending[message.transaction_id] = _Pending(message.method, key, answer)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(data)
                got = await answer
        except TimeoutError:
            name = Method(message.method).name
            raise TurnError(TurnReason.TIMEOUT, f"no answer to {name} within {self._timeout_s:g} s") from None
        finally:
            del self._pending[message.transaction_id]
        if got is None:
            raise self._error or TurnError(TurnReason.CONNECTION_LOST, "the connection ended")
        return got

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            try:
                await self._stream.send(data)
            except OSError as exc:
                raise self.end(TurnError(TurnReason.CONNECTION_LOST, describe(exc))) from exc
            except asyncio.CancelledError:
                # Part of the request may have been sent. The server would read whatever follows as the rest of it.
                self.end(TurnError(TurnReason.TIMEOUT, "the server does not read what we send"))
                raise

    # Reading

    async def run(self, on_indication: Callable[[Message], None]) -> None:
        """Read until the connection ends, then raise the TurnError that says why. Never returns.

        `on_indication` is called with every indication that we understand, in order.
        """
        try:
            await self._read(on_indication)
        except StunError as exc:
            raise self.end(TurnError(TurnReason.MALFORMED, str(exc))) from exc
        except OSError as exc:
            raise self.end(TurnError(TurnReason.CONNECTION_LOST, describe(exc))) from exc
        raise self.end(TurnError(TurnReason.CONNECTION_LOST, "the server closed the connection"))

    async def _read(self, on_indication: Callable[[Message], None]) -> None:
        buffer = b""
        while data := await self._stream.recv():
            buffer += data
            at = 0
            while True:
                length = frame_length(buffer[at : at + 8])
                if length is None or len(buffer) - at < length:
                    break
                message = Message.parse(buffer[at : at + length])
                at += length
                if message.message_class is not MessageClass.INDICATION:
                    self._take(message)
                elif not message.not_understood(_KNOWN):
                    on_indication(message)
            buffer = buffer[at:]

    def _take(self, message: Message) -> None:
        pending = self._pending.get(message.transaction_id)
        if message.message_class is MessageClass.REQUEST or pending is None or pending.method != message.method:
            log.debug(
                "an answer that matches no pending request: method %#05x from %s", message.method, self._stream.peer
            )
        elif not counts(message, pending.key):
            level = logging.DEBUG if self._forged else logging.WARNING  # warn once: there may be very many
            self._forged += 1
            event = {
                "server": list(self._stream.peer),
                "detail": "an answer without a valid MESSAGE-INTEGRITY is ignored",
            }
            log.log(level, "turn_answer_forged", extra={"event": event})
        elif not pending.answer.done():
            pending.answer.set_result(message)

    def end(self, error: TurnError) -> TurnError:
        """Close the connection because of `error`. Return the error that it ended with: an earlier one if it had ended before."""
        if self._error is None:
            self._error = error
            self._stream.close()
            for pending in self._pending.values():
                if not pending.answer.done():
                    pending.answer.set_result(None)
        return self._error
