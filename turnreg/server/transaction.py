"""One request in, one answer out: what RFC 8656 and RFC 6062 say about each method, without a socket.

`Transactions.respond()` decides and packs the answer; where the sockets must do something, the returned `Step` says so. TCP
allocations only, and passive only: a peer comes to the relayed address, the server never connects anywhere. So a leaked
credential opens no way into the networks that the server sees, and the active Connect is 403.

`now` is monotonic seconds for lifetimes; `unix_now` is unix time in seconds for nonces and REST credentials.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from ipaddress import ip_address

from discovery.addresses import TargetList, refusal
from turnreg.auth import Accepted, Authenticator
from turnreg.server.allocation import CODES, Allocation, AllocationTable, Attempt, Endpoint, FiveTuple, Refusal
from turnreg.stun import (
    FAMILY_IPV4,
    FAMILY_IPV6,
    TRANSACTION_ID_BYTES,
    TRANSPORT_TCP,
    Attribute,
    Message,
    MessageClass,
    Method,
    StunError,
)

_UNDERSTOOD = frozenset(
    {
        Attribute.USERNAME,
        Attribute.MESSAGE_INTEGRITY,
        Attribute.ERROR_CODE,
        Attribute.UNKNOWN_ATTRIBUTES,
        Attribute.CHANNEL_NUMBER,
        Attribute.LIFETIME,
        Attribute.XOR_PEER_ADDRESS,
        Attribute.DATA,
        Attribute.REALM,
        Attribute.NONCE,
        Attribute.XOR_RELAYED_ADDRESS,
        Attribute.REQUESTED_ADDRESS_FAMILY,
        Attribute.EVEN_PORT,
        Attribute.REQUESTED_TRANSPORT,
        Attribute.DONT_FRAGMENT,
        Attribute.XOR_MAPPED_ADDRESS,
        Attribute.RESERVATION_TOKEN,
        Attribute.CONNECTION_ID,
    }
)
_NOT_WITH_TCP = (Attribute.EVEN_PORT, Attribute.DONT_FRAGMENT, Attribute.RESERVATION_TOKEN)
_NEED_ALLOCATION = frozenset({Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND, Method.CONNECT})
_AUTHENTICATED = _NEED_ALLOCATION | {Method.ALLOCATE, Method.CONNECTION_BIND}


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """An Allocate that was granted a place: open a port, then call `opened` or `not_opened`, whatever happens."""

    request: Message
    five_tuple: FiveTuple
    user: Accepted
    family: int
    lifetime_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What comes of a message. All empty: ignore it."""

    answer: bytes | None = None
    """Send this first."""
    refusal: Refusal | None = None
    """Why the answer is an error."""
    opening: Opening | None = None
    """Open a relayed address; the answer comes from that."""
    ended: Allocation | None = None
    """The client gave its allocation back, as wished."""
    bound: Attempt | None = None
    """Join this connection to that peer; what follows the request is payload."""
    close: bool = False
    """End the connection, so that the answer still arrives."""


class Transactions:
    """Answers the requests of all clients of one server."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        table: AllocationTable,
        families: Collection[int],
        allowed_peers: TargetList | None,
        software: str | None,
        draw: Callable[[int], bytes],
    ) -> None:
        """Take the parts. `families` are those of the relay addresses, `allowed_peers` lifts refused ranges (tests)."""
        self._authenticator = authenticator
        self._table = table
        self._limits = table.limits
        self._families = frozenset(families)
        self._allowed_peers = allowed_peers
        self._software = software
        self._draw = draw

    def respond(self, five_tuple: FiveTuple, message: Message, *, now: float, unix_now: float) -> Step:
        """Decide about one message of a client."""
        if message.message_class != MessageClass.REQUEST:
            return Step()  # Send indications among them: there is nothing on a TCP allocation that they could mean
        if message.method == Method.BINDING:
            return self._binding(five_tuple, message)
        if message.method not in _AUTHENTICATED:
            return Step()  # RFC 8489, section 6.3: a method that is not supported is silently discarded
        verdict = self._authenticator.check(message, five_tuple.client[0], unix_now)
        if not isinstance(verdict, Accepted):
            challenge = message.refused(verdict.code, verdict.phrase)
            if verdict.code != 400:
                nonce = self._authenticator.nonce(five_tuple.client[0], unix_now)
                challenge = challenge.with_text(Attribute.REALM, self._authenticator.realm)
                challenge = challenge.with_text(Attribute.NONCE, nonce)
            step = Step(answer=self._pack(message, challenge), refusal=Refusal(verdict.reason.value))
        elif message.not_understood(_UNDERSTOOD):
            step = self._refused(message, verdict, Refusal.UNKNOWN_ATTRIBUTE)
        else:
            try:
                step = self._authenticated(five_tuple, message, verdict, now)
            except StunError:
                step = self._refused(message, verdict, Refusal.BAD_REQUEST)
        if step.refusal and message.method == Method.CONNECTION_BIND and self._table.find(five_tuple, now) is None:
            # RFC 6062, section 4.3: a data connection whose bind fails is of no use. The id is not: it goes on waiting.
            return Step(answer=step.answer, refusal=step.refusal, close=True)
        return step

    def opened(self, opening: Opening, relayed: Endpoint, now: float) -> tuple[Allocation, bytes]:
        """Make the allocation whose port was opened. Returns it and the answer."""
        allocation = Allocation(
            five_tuple=opening.five_tuple,
            account=opening.user.account,
            relayed=relayed,
            transaction_id=opening.request.transaction_id,
            lifetime_s=opening.lifetime_s,
            expires_at=now + opening.lifetime_s,
            family=opening.family,
            fingerprint=opening.request.has_fingerprint,
        )
        self._table.add(allocation)
        return allocation, self._allocated(opening.request, opening.user, allocation)

    def not_opened(self, opening: Opening) -> Step:
        """Give the place back and answer: no port was to be had."""
        self._table.give_up(opening.user.account)
        return self._refused(opening.request, opening.user, Refusal.CAPACITY)

    def attempt(self, attempt: Attempt) -> bytes:
        """Return the ConnectionAttempt that tells the client of a peer (RFC 6062, section 5.2).

        Not signed, as in coturn: the long-term mechanism does not cover indications (RFC 8489, section 9.2).
        """
        indication = (
            Message(Method.CONNECTION_ATTEMPT, MessageClass.INDICATION, self._draw(TRANSACTION_ID_BYTES))
            .with_bytes(Attribute.CONNECTION_ID, attempt.connection_id)
            .with_xor_address(Attribute.XOR_PEER_ADDRESS, attempt.peer)
        )
        if self._software is not None:
            indication = indication.with_text(Attribute.SOFTWARE, self._software)
        return indication.pack(fingerprint=attempt.allocation.fingerprint)

    # -- methods

    def _binding(self, five_tuple: FiveTuple, message: Message) -> Step:
        """Tell a client which address it has, to anybody who asks: relays learn theirs so."""
        if message.not_understood(_UNDERSTOOD):
            return self._refused(message, None, Refusal.UNKNOWN_ATTRIBUTE)
        answer = message.success().with_xor_address(Attribute.XOR_MAPPED_ADDRESS, five_tuple.client)
        return Step(answer=self._pack(message, answer))

    def _authenticated(self, five_tuple: FiveTuple, message: Message, user: Accepted, now: float) -> Step:
        allocation = self._table.find(five_tuple, now)
        match message.method:
            case Method.ALLOCATE:
                return self._allocate(five_tuple, message, user, allocation)
            case Method.CONNECTION_BIND:
                return self._connection_bind(message, user, allocation)
        if allocation is None:
            return self._refused(message, user, Refusal.NO_ALLOCATION)
        if allocation.account != user.account:
            # The RFC compares usernames. We compare accounts, so that a client with REST credentials can go over to new
            # ones, and keep its streams, where coturn makes it allocate anew.
            return self._refused(message, user, Refusal.WRONG_USER)
        match message.method:
            case Method.REFRESH:
                return self._refresh(message, user, allocation, now)
            case Method.CREATE_PERMISSION:
                return self._create_permission(message, user, allocation, now)
        return self._refused(message, user, Refusal.FORBIDDEN_METHOD)  # ChannelBind is for UDP, Connect is active

    def _allocate(self, five_tuple: FiveTuple, message: Message, user: Accepted, allocation: Allocation | None) -> Step:
        """RFC 8656, section 7.2, and RFC 6062, section 5.1."""
        if allocation is not None:
            if allocation.transaction_id == message.transaction_id and allocation.account == user.account:
                return Step(answer=self._allocated(message, user, allocation))  # a retransmission
            return self._refused(message, user, Refusal.HAS_ALLOCATION)
        transport = message.first_byte(Attribute.REQUESTED_TRANSPORT)
        if transport is None:
            return self._refused(message, user, Refusal.BAD_REQUEST)
        if transport != TRANSPORT_TCP:
            return self._refused(message, user, Refusal.TRANSPORT_NOT_SUPPORTED)
        if any(message.get(attribute) is not None for attribute in _NOT_WITH_TCP):
            return self._refused(message, user, Refusal.BAD_REQUEST)
        family = message.first_byte(Attribute.REQUESTED_ADDRESS_FAMILY)
        if family is None:
            family = FAMILY_IPV4  # RFC 8656, section 7.2, whatever the control connection runs over
        if family not in self._families:
            return self._refused(message, user, Refusal.FAMILY_NOT_SUPPORTED)
        lifetime_s = self._lifetime_s(message)
        no_place = self._table.reserve(user.account)
        if no_place is not None:
            return self._refused(message, user, no_place)
        return Step(
            opening=Opening(request=message, five_tuple=five_tuple, user=user, family=family, lifetime_s=lifetime_s)
        )

    def _refresh(self, message: Message, user: Accepted, allocation: Allocation, now: float) -> Step:
        """RFC 8656, section 8.2."""
        family = message.first_byte(Attribute.REQUESTED_ADDRESS_FAMILY)
        if family is not None and family != allocation.family:
            return self._refused(message, user, Refusal.FAMILY_MISMATCH)
        ends = message.number(Attribute.LIFETIME) == 0
        lifetime_s = 0.0 if ends else self._lifetime_s(message)
        if not ends:
            allocation.refresh(lifetime_s, now)
        answer = message.success().with_number(Attribute.LIFETIME, int(lifetime_s))
        return Step(answer=self._pack(message, answer, user), ended=allocation if ends else None)

    def _create_permission(self, message: Message, user: Accepted, allocation: Allocation, now: float) -> Step:
        """RFC 8656, section 10.2: all of the addresses or none."""
        addresses = [ip_address(host) for host, _ in message.xor_addresses(Attribute.XOR_PEER_ADDRESS)]
        if not addresses:
            return self._refused(message, user, Refusal.BAD_REQUEST)
        if any((FAMILY_IPV4 if address.version == 4 else FAMILY_IPV6) != allocation.family for address in addresses):
            return self._refused(message, user, Refusal.FAMILY_MISMATCH)
        # Our own addresses are not refused, unlike in servers that connect to peers: a relay may well run on this host.
        if any(refusal(address, self._allowed_peers) for address in addresses):
            return self._refused(message, user, Refusal.FORBIDDEN_PEER)
        limits = self._limits
        if not allocation.permit(map(str, addresses), limits.permission_lifetime_s, limits.max_permissions, now):
            return self._refused(message, user, Refusal.CAPACITY)
        return Step(answer=self._pack(message, message.success(), user))

    def _connection_bind(self, message: Message, user: Accepted, allocation: Allocation | None) -> Step:
        """RFC 6062, section 5.4. The success is signed; only then is the id used up."""
        if allocation is not None:
            return self._refused(message, user, Refusal.BAD_REQUEST)
        attempt = self._table.claim(message.get(Attribute.CONNECTION_ID), user.account)
        if isinstance(attempt, Refusal):
            return self._refused(message, user, attempt)
        return Step(answer=self._pack(message, message.success(), user), bound=attempt)

    # -- answers

    def _lifetime_s(self, message: Message) -> float:
        """At least the default, at most the maximum (RFC 8656, section 7.2)."""
        asked_s = float(message.number(Attribute.LIFETIME) or 0)
        return max(self._limits.default_lifetime_s, min(asked_s, self._limits.max_lifetime_s))

    def _allocated(self, message: Message, user: Accepted, allocation: Allocation) -> bytes:
        answer = (
            message.success()
            .with_xor_address(Attribute.XOR_RELAYED_ADDRESS, allocation.relayed)
            .with_number(Attribute.LIFETIME, int(allocation.lifetime_s))
            .with_xor_address(Attribute.XOR_MAPPED_ADDRESS, allocation.five_tuple.client)
        )
        return self._pack(message, answer, user)

    def _refused(self, message: Message, user: Accepted | None, why: Refusal) -> Step:
        answer = message.refused(*CODES[why])
        if why is Refusal.UNKNOWN_ATTRIBUTE:
            kinds = message.not_understood(_UNDERSTOOD)
            answer = answer.with_bytes(
                Attribute.UNKNOWN_ATTRIBUTES, b"".join(kind.to_bytes(2, "big") for kind in kinds)
            )
        return Step(answer=self._pack(message, answer, user), refusal=why)

    def _pack(self, request: Message, answer: Message, user: Accepted | None = None) -> bytes:
        if self._software is not None:
            answer = answer.with_text(Attribute.SOFTWARE, self._software)
        return answer.pack(integrity_key=None if user is None else user.key, fingerprint=request.has_fingerprint)
