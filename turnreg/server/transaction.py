"""The rules of RFC 8656 and RFC 6062 for each method, without sockets: one message in, one outcome out.

`Transactions.respond()` decides and packs the answer; the returned `Outcome` says what to do with sockets. By default there are
only TCP allocations, and only passive ones: peers connect to the relayed address, and the server connects to nobody, so a leaked
credential gives no access to the networks that the server can reach. UDP allocations and the active Connect do give access; each
has to be enabled.

`now` is monotonic seconds for lifetimes; `unix_now` is unix time in seconds for nonces and REST credentials.
"""

from collections.abc import Callable, Collection, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address

from discovery.model.addresses import TargetList, refusal, spellings
from turnreg.server.allocate_request import AllocatePolicy, AllocateRequest, refuse
from turnreg.server.allocation import CODES, Allocation, AllocationTable, Attempt, Drop, Endpoint, FiveTuple, Refusal
from turnreg.server.framing import MAX_CHANNEL, MIN_CHANNEL
from turnreg.server.outcome import Close, Connect, GiveBack, Ignore, Join, Open, Outcome, Relay, Reply
from turnreg.server.pace import Paces
from turnreg.stun.auth import Accepted, Authenticator, Refused
from turnreg.stun.message import (
    FAMILY_IPV4,
    FAMILY_IPV6,
    TRANSACTION_ID_BYTES,
    TRANSPORT_TCP,
    TRANSPORT_UDP,
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
_NEED_ALLOCATION = frozenset({Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND, Method.CONNECT})
_AUTHENTICATED = _NEED_ALLOCATION | {Method.ALLOCATE, Method.CONNECTION_BIND}


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
        udp_allocations: bool = False,
        active_connect: bool = False,
        advertised: Mapping[str, str] | None = None,
        is_ours: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Decide by these settings.

        Args:
            families: address families of the relay addresses.
            allowed_peers: peers to allow although they are in a refused range or are our own addresses.
            draw: returns that many unpredictable random bytes.
            advertised: relay address to the address that a NAT in front of us maps it to.
            is_ours: says whether this host has that address.
        """
        self._authenticator = authenticator
        self._table = table
        self._policy = AllocatePolicy(families=frozenset(families), udp_allocations=udp_allocations)
        self.allowed_peers = allowed_peers
        self._software = software
        self._draw = draw
        self._active_connect = active_connect
        self._advertised = dict(advertised or {})
        self._is_ours = is_ours
        self._paces = Paces(table.limits.max_bytes_per_second_per_account)

    def respond(self, five_tuple: FiveTuple, message: Message, *, now: float, unix_now: float) -> Outcome:
        """Return the outcome for one message of a client."""
        if message.message_class != MessageClass.REQUEST:
            if message.message_class == MessageClass.INDICATION and message.method == Method.SEND:
                return self._send(five_tuple, message, now)
            return Ignore()
        if message.method == Method.BINDING:
            return self._binding(five_tuple, message)
        if message.method not in _AUTHENTICATED:
            return Ignore()  # RFC 8489, section 6.3: a method that is not supported is silently discarded
        outcome = self._request(five_tuple, message, now, unix_now)
        if isinstance(outcome, Reply) and outcome.refusal and message.method == Method.CONNECTION_BIND:
            # RFC 6062, section 4.3: a data connection whose bind failed is useless. The peer with the id still waits.
            return Close(reply=outcome) if self._table.find(five_tuple, now) is None else outcome
        return outcome

    def _request(self, five_tuple: FiveTuple, message: Message, now: float, unix_now: float) -> Outcome:
        verdict = self._authenticator.check(message, five_tuple.client[0], unix_now)
        if not isinstance(verdict, Accepted):
            return self._challenge(five_tuple, message, verdict, unix_now)
        if message.not_understood(_UNDERSTOOD):
            return self._refused(message, verdict, Refusal.UNKNOWN_ATTRIBUTE)
        try:
            return self._authenticated(five_tuple, message, verdict, now)
        except StunError:
            return self._refused(message, verdict, Refusal.BAD_REQUEST)

    def _challenge(self, five_tuple: FiveTuple, message: Message, why: Refused, unix_now: float) -> Reply:
        """Answer a client that is not authenticated. Over UDP without SOFTWARE, to keep the answer short."""
        challenge = message.refused(why.code, why.phrase)
        if why.code != 400:
            nonce = self._authenticator.nonce(five_tuple.client[0], unix_now)
            challenge = challenge.with_text(Attribute.REALM, self._authenticator.realm)
            challenge = challenge.with_text(Attribute.NONCE, nonce)
        answer = self._pack(message, challenge, named=five_tuple.transport != TRANSPORT_UDP)
        return Reply(answer=answer, refusal=Refusal(why.reason.value), unproven=True)

    def complete_allocate(
        self, opening: Open, relayed: Endpoint, now: float, *, reservation: bytes = b""
    ) -> tuple[Allocation, bytes]:
        """Make the allocation for a port that was opened. Returns it and the answer.

        `reservation` is the token of the reserved next higher port, if requested.
        """
        allocation = Allocation(
            five_tuple=opening.five_tuple,
            account=opening.user.account,
            relayed=relayed,
            transaction_id=opening.request.transaction_id,
            lifetime_s=opening.lifetime_s,
            expires_at=now + opening.lifetime_s,
            family=opening.family,
            transport=opening.transport,
            reservation=reservation,
            pace=self._paces.of(opening.user.account, now),
            fingerprint=opening.request.has_fingerprint,
        )
        self._table.add(allocation)
        return allocation, self._allocated(opening.request, opening.user, allocation)

    def fail_allocate(self, opening: Open) -> Reply:
        """Release the reserved place and return the refusal: there was no free port."""
        self._table.give_up(opening.user.account)
        return self._refused(opening.request, opening.user, Refusal.CAPACITY)

    def complete_connect(self, connecting: Connect, attempt: Attempt) -> bytes:
        """Return the answer to a Connect that reached its peer (RFC 6062, section 5.2)."""
        answer = connecting.request.success().with_bytes(Attribute.CONNECTION_ID, attempt.connection_id)
        return self._pack(connecting.request, answer, connecting.user)

    def fail_connect(self, connecting: Connect) -> Reply:
        """Return the refusal of a Connect: the peer refused or did not answer in time."""
        return self._refused(connecting.request, connecting.user, Refusal.CONNECT_FAILED)

    def attempt(self, attempt: Attempt) -> bytes:
        """Return the ConnectionAttempt that announces a peer to the client (RFC 6062, section 5.2).

        It is not signed, as in coturn: the long-term mechanism does not cover indications (RFC 8489, section 9.2).
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

    def _binding(self, five_tuple: FiveTuple, message: Message) -> Reply:
        """Tell a client its address. This needs no authentication; relays find their address this way."""
        if message.not_understood(_UNDERSTOOD):
            refused = self._refused(message, None, Refusal.UNKNOWN_ATTRIBUTE)
            return Reply(answer=refused.answer, refusal=refused.refusal, unproven=True)
        answer = message.success().with_xor_address(Attribute.XOR_MAPPED_ADDRESS, five_tuple.client)
        named = five_tuple.transport != TRANSPORT_UDP
        return Reply(answer=self._pack(message, answer, named=named), unproven=True)

    def _authenticated(self, five_tuple: FiveTuple, message: Message, user: Accepted, now: float) -> Outcome:
        allocation = self._table.find(five_tuple, now)
        match message.method:
            case Method.ALLOCATE:
                return self._allocate(five_tuple, message, user, allocation)
            case Method.CONNECTION_BIND:
                if five_tuple.transport == TRANSPORT_UDP:
                    return self._refused(message, user, Refusal.BAD_REQUEST)
                return self._connection_bind(message, user, allocation)
        if allocation is None:
            return self._refused(message, user, Refusal.NO_ALLOCATION)
        if allocation.account != user.account:
            # The RFC compares usernames. We compare accounts, so that a client can switch to new REST credentials and keep
            # its streams, where coturn requires a new allocation.
            return self._refused(message, user, Refusal.WRONG_USER)
        match message.method:
            case Method.REFRESH:
                return self._refresh(message, user, allocation, now)
            case Method.CREATE_PERMISSION:
                return self._create_permission(message, user, allocation, now)
            case Method.CHANNEL_BIND if allocation.transport == TRANSPORT_UDP:
                return self._channel_bind(message, user, allocation, now)
            case Method.CONNECT if allocation.transport == TRANSPORT_TCP and self._active_connect:
                return self._connect(message, user, allocation)
        return self._refused(message, user, Refusal.FORBIDDEN_METHOD)

    def _allocate(
        self, five_tuple: FiveTuple, message: Message, user: Accepted, allocation: Allocation | None
    ) -> Reply | Open:
        """RFC 8656, section 7.2, and RFC 6062, section 5.1. Raises StunError."""
        if allocation is not None:
            if allocation.transaction_id == message.transaction_id and allocation.account == user.account:
                return Reply(answer=self._allocated(message, user, allocation))  # a retransmission
            return self._refused(message, user, Refusal.HAS_ALLOCATION)
        request = AllocateRequest.parse(message, five_tuple.transport)
        why = refuse(request, self._policy) or self._table.reserve(user.account)
        if why is not None:
            return self._refused(message, user, why)
        return Open(
            request=message,
            five_tuple=five_tuple,
            user=user,
            family=request.family,
            lifetime_s=self._lifetime_s(request.asked_lifetime_s),
            transport=request.transport,
            even=request.even,
            pair=request.pair,
            token=request.token,
        )

    def _refresh(self, message: Message, user: Accepted, allocation: Allocation, now: float) -> Reply | GiveBack:
        """RFC 8656, section 8.2."""
        family = message.first_byte(Attribute.REQUESTED_ADDRESS_FAMILY)
        if family is not None and family != allocation.family:
            return self._refused(message, user, Refusal.FAMILY_MISMATCH)
        asked_s = message.number(Attribute.LIFETIME)
        lifetime_s = 0.0 if asked_s == 0 else self._lifetime_s(asked_s or 0)
        answer = self._pack(message, message.success().with_number(Attribute.LIFETIME, int(lifetime_s)), user)
        if asked_s == 0:
            return GiveBack(answer=answer, allocation=allocation)
        allocation.refresh(lifetime_s, now)
        return Reply(answer=answer)

    def _create_permission(self, message: Message, user: Accepted, allocation: Allocation, now: float) -> Reply:
        """RFC 8656, section 10.2: all of the addresses or none."""
        addresses = [ip_address(host) for host, _ in message.xor_addresses(Attribute.XOR_PEER_ADDRESS)]
        if not addresses:
            return self._refused(message, user, Refusal.BAD_REQUEST)
        for address in addresses:
            why = self._forbidden(address, allocation)
            if why is not None:
                return self._refused(message, user, why)
        limits = self._table.limits
        if not allocation.permit(map(str, addresses), limits.permission_lifetime_s, limits.max_permissions, now):
            return self._refused(message, user, Refusal.CAPACITY)
        return Reply(answer=self._pack(message, message.success(), user))

    def _forbidden(self, address: IPv4Address | IPv6Address, allocation: Allocation) -> Refusal | None:
        """Return why an allocation must not have that peer, None if it may."""
        if (FAMILY_IPV4 if address.version == 4 else FAMILY_IPV6) != allocation.family:
            return Refusal.FAMILY_MISMATCH
        if refusal(address, self.allowed_peers):
            return Refusal.FORBIDDEN_PEER
        if allocation.transport == TRANSPORT_TCP and not self._active_connect:
            return None  # the peer can only connect to us, and a relay may run on this host
        if self.allowed_peers is not None and any(address in network for network in self.allowed_peers.networks):
            return None
        ours = any(self._is_ours(str(spelling)) for spelling in spellings(address))
        return Refusal.FORBIDDEN_PEER if ours else None

    def _channel_bind(self, message: Message, user: Accepted, allocation: Allocation, now: float) -> Reply:
        """RFC 8656, section 12.2."""
        value = message.number(Attribute.CHANNEL_NUMBER)
        peer = message.xor_address(Attribute.XOR_PEER_ADDRESS)
        if value is None or peer is None or not MIN_CHANNEL <= value >> 16 <= MAX_CHANNEL:
            return self._refused(message, user, Refusal.BAD_REQUEST)
        why = self._forbidden(ip_address(peer[0]), allocation)
        why = why or allocation.bind_channel(value >> 16, peer, self._table.limits, now)
        if why is not None:
            return self._refused(message, user, why)
        return Reply(answer=self._pack(message, message.success(), user))

    def _connect(self, message: Message, user: Accepted, allocation: Allocation) -> Reply | Connect:
        """RFC 6062, section 5.2. It needs no permission; the peer only must not be forbidden."""
        peer = message.xor_address(Attribute.XOR_PEER_ADDRESS)
        if peer is None or not peer[1]:
            return self._refused(message, user, Refusal.BAD_REQUEST)
        why = self._forbidden(ip_address(peer[0]), allocation) or self._table.connect(allocation, peer)
        if why is not None:
            return self._refused(message, user, why)
        return Connect(request=message, user=user, allocation=allocation, peer=peer)

    def _send(self, five_tuple: FiveTuple, message: Message, now: float) -> Relay | Drop:
        """RFC 8656, section 11.2. An indication gets no answer, right or wrong."""
        allocation = self._table.find(five_tuple, now)
        if allocation is None or allocation.transport != TRANSPORT_UDP:
            return Drop.NO_ALLOCATION
        try:
            peer = message.xor_address(Attribute.XOR_PEER_ADDRESS)
        except StunError:
            peer = None
        data = message.get(Attribute.DATA)
        if peer is None or not peer[1] or data is None or message.not_understood(_UNDERSTOOD):
            return Drop.NOT_STUN
        if not allocation.permits(peer[0], now):
            return Drop.NO_PERMISSION
        dont_fragment = message.get(Attribute.DONT_FRAGMENT) is not None
        return Relay(allocation=allocation, peer=peer, data=data, dont_fragment=dont_fragment)

    def reconfigure(self, allowed_peers: TargetList | None, now: float) -> None:
        """Use these allowed peers, and the table's current limits, from now on.

        Streams that started without a limit of bytes per second stay without one.
        """
        self.allowed_peers = allowed_peers
        self._paces.reconfigure(self._table.limits.max_bytes_per_second_per_account)
        for allocation in self._table:
            allocation.pace = self._paces.of(allocation.account, now)

    def channel_data(self, five_tuple: FiveTuple, channel: int, data: bytes, now: float) -> Relay | Drop:
        """Return where ChannelData is to be sent (RFC 8656, section 12.6)."""
        allocation = self._table.find(five_tuple, now)
        if allocation is None:
            return Drop.NO_ALLOCATION
        peer = allocation.peer_of(channel, now)
        if peer is None:
            return Drop.NO_CHANNEL
        if not allocation.permits(peer[0], now):
            return Drop.NO_PERMISSION  # a channel outlives the permission that was made with it
        return Relay(allocation=allocation, peer=peer, data=data)

    def _connection_bind(self, message: Message, user: Accepted, allocation: Allocation | None) -> Reply | Join:
        """RFC 6062, section 5.4. The success is signed. Only a success uses up the connection id."""
        if allocation is not None:
            return self._refused(message, user, Refusal.BAD_REQUEST)
        attempt = self._table.claim(message.get(Attribute.CONNECTION_ID), user.account)
        if isinstance(attempt, Refusal):
            return self._refused(message, user, attempt)
        return Join(answer=self._pack(message, message.success(), user), attempt=attempt)

    # -- answers

    def _lifetime_s(self, asked_s: float) -> float:
        """At least the default, at most the maximum (RFC 8656, section 7.2)."""
        return max(self._table.limits.default_lifetime_s, min(float(asked_s), self._table.limits.max_lifetime_s))

    def _allocated(self, message: Message, user: Accepted, allocation: Allocation) -> bytes:
        answer = (
            message.success()
            .with_xor_address(Attribute.XOR_RELAYED_ADDRESS, self.reached(allocation))
            .with_number(Attribute.LIFETIME, int(allocation.lifetime_s))
            .with_xor_address(Attribute.XOR_MAPPED_ADDRESS, allocation.five_tuple.client)
        )
        if allocation.reservation:
            answer = answer.with_bytes(Attribute.RESERVATION_TOKEN, allocation.reservation)
        return self._pack(message, answer, user)

    def reached(self, allocation: Allocation) -> Endpoint:
        """Return the relayed address at which peers reach the allocation."""
        address, port = allocation.relayed
        return self._advertised.get(address, address), port

    def _refused(self, message: Message, user: Accepted | None, why: Refusal) -> Reply:
        answer = message.refused(*CODES[why])
        if why is Refusal.UNKNOWN_ATTRIBUTE:
            kinds = message.not_understood(_UNDERSTOOD)
            answer = answer.with_bytes(
                Attribute.UNKNOWN_ATTRIBUTES, b"".join(kind.to_bytes(2, "big") for kind in kinds)
            )
        return Reply(answer=self._pack(message, answer, user), refusal=why)

    def _pack(self, request: Message, answer: Message, user: Accepted | None = None, *, named: bool = True) -> bytes:
        if named and self._software is not None:
            answer = answer.with_text(Attribute.SOFTWARE, self._software)
        return answer.pack(integrity_key=None if user is None else user.key, fingerprint=request.has_fingerprint)
