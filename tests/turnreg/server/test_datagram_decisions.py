"""Decisions about UDP allocations, channels, Send, the active Connect and refused addresses, without a socket."""

from typing import Any

import pytest

from discovery.model.addresses import TargetList
from tests.turnreg.server.decisions import NOW, RELAYED, UNIX, Server
from turnreg.server.allocation import Allocation, Drop, FiveTuple, Refusal
from turnreg.server.outcome import Connect, Open, Relay, Reply
from turnreg.server.transaction import Transactions
from turnreg.stun.message import (
    FAMILY_IPV4,
    FAMILY_IPV6,
    TRANSPORT_TCP,
    TRANSPORT_UDP,
    Attribute,
    Message,
    MessageClass,
    Method,
)

PEER = ("10.0.0.9", 4000)
OURS = "10.0.0.7"
OVER_UDP = FiveTuple(("192.0.2.1", 1111), ("192.0.2.2", 3478), TRANSPORT_UDP)


def server(*, allowed_peers: tuple[str, ...] = (), limits: dict[str, Any] | None = None, **options: Any) -> Server:
    """A server with UDP allocations and the active Connect enabled, unless options say otherwise."""
    made = Server(families=(FAMILY_IPV4, FAMILY_IPV6), **(limits or {}))
    made.transactions = Transactions(
        authenticator=made.authenticator,
        table=made.table,
        families=(FAMILY_IPV4, FAMILY_IPV6),
        allowed_peers=TargetList.parse(allowed_peers),
        software="crossnet",
        draw=made.draw,
        is_ours=lambda address: address == OURS,
        **({"udp_allocations": True, "active_connect": True} | options),
    )
    return made


def udp_allocation(on: Server, at: FiveTuple = OVER_UDP) -> Allocation:
    return on.allocate(on.allocate_request(TRANSPORT_UDP), at=at)[0]


def channel_bind(on: Server, channel: int = 0x4000, peer: tuple[str, int] = PEER) -> Message:
    message = on.request(Method.CHANNEL_BIND).with_number(Attribute.CHANNEL_NUMBER, channel << 16)
    return message.with_xor_address(Attribute.XOR_PEER_ADDRESS, peer)


def send(peer: tuple[str, int] = PEER, data: bytes = b"hello") -> Message:
    message = Message(Method.SEND, MessageClass.INDICATION, bytes(12))
    return message.with_xor_address(Attribute.XOR_PEER_ADDRESS, peer).with_bytes(Attribute.DATA, data)


class TestAllocate:
    def test_is_off_by_default(self) -> None:
        on = server(udp_allocations=False)
        assert on.code(on.allocate_request(TRANSPORT_UDP)) == 442

    @pytest.mark.parametrize("at", [OVER_UDP, FiveTuple(("192.0.2.1", 1), ("192.0.2.2", 3478))])
    def test_over_any_transport(self, at: FiveTuple) -> None:
        on = server()
        assert udp_allocation(on, at).transport == TRANSPORT_UDP
        assert on.table.find(at, NOW) is not None

    def test_streams_only_over_streams(self) -> None:
        on = server()
        assert on.code(on.allocate_request(TRANSPORT_TCP), at=OVER_UDP) == 400

    def test_clients_on_two_transports_are_two(self) -> None:
        on = server()
        udp_allocation(on)
        over_tcp = FiveTuple(OVER_UDP.client, OVER_UDP.server, TRANSPORT_TCP)
        assert on.table.find(over_tcp, NOW) is None
        on.allocate(at=over_tcp)

    def test_a_retransmission_is_answered_alike(self) -> None:
        on = server()
        request = on.allocate_request(TRANSPORT_UDP)
        _, first = on.allocate(request, at=OVER_UDP)
        second = on.answer(request, at=OVER_UDP)
        assert second.attributes == first.attributes
        assert len(on.table) == 1

    @pytest.mark.parametrize(
        ("value", "even", "pair"), [(None, False, False), (b"\0", True, False), (b"\x80", True, True)]
    )
    def test_even_port(self, value: bytes | None, even: bool, pair: bool) -> None:
        on = server()
        request = on.allocate_request(TRANSPORT_UDP)
        if value is not None:
            request = request.with_bytes(Attribute.EVEN_PORT, value)
        step = on.respond(on.sign(request), at=OVER_UDP)
        assert isinstance(step, Open)
        assert (step.even, step.pair) == (even, pair)

    def test_the_token_of_a_pair_is_in_the_answer_and_in_its_repetition(self) -> None:
        on = server()
        request = on.allocate_request(TRANSPORT_UDP).with_bytes(Attribute.EVEN_PORT, b"\x80")
        step = on.respond(on.sign(request), at=OVER_UDP)
        assert isinstance(step, Open)
        _, answer = on.transactions.complete_allocate(step, RELAYED, NOW, reservation=b"12345678")
        assert Message.parse(answer).get(Attribute.RESERVATION_TOKEN) == b"12345678"
        assert on.answer(request, at=OVER_UDP).get(Attribute.RESERVATION_TOKEN) == b"12345678"

    @pytest.mark.parametrize(
        "attributes",
        [
            {Attribute.EVEN_PORT: b""},
            {Attribute.EVEN_PORT: b"\0\0"},
            {Attribute.RESERVATION_TOKEN: b"1234567"},
            {Attribute.RESERVATION_TOKEN: b"12345678", Attribute.EVEN_PORT: b"\0"},
            {Attribute.RESERVATION_TOKEN: b"12345678", Attribute.REQUESTED_ADDRESS_FAMILY: b"\1\0\0\0"},
        ],
    )
    def test_contradicting_attributes(self, attributes: dict[int, bytes]) -> None:
        on = server()
        request = on.allocate_request(TRANSPORT_UDP)
        for kind, value in attributes.items():
            request = request.with_bytes(kind, value)
        assert on.code(request, at=OVER_UDP) == 400

    def test_the_address_that_a_nat_shows(self) -> None:
        on = server(advertised={RELAYED[0]: "203.0.113.7"})
        allocation, answer = on.allocate()
        assert answer.xor_address(Attribute.XOR_RELAYED_ADDRESS) == ("203.0.113.7", RELAYED[1])
        assert allocation.relayed == RELAYED

    def test_none_while_draining(self) -> None:
        on = server()
        on.allocate()
        on.table.draining = True
        assert on.code(on.allocate_request(TRANSPORT_UDP), at=OVER_UDP) == 508
        assert on.code(on.request(Method.REFRESH)) == 0


class TestStrangers:
    def test_answers_over_udp_are_at_most_four_times_the_request(self) -> None:
        """The shortest request that a client would send: an Allocate with its REQUESTED-TRANSPORT."""
        on = server()
        for request, times in ((on.allocate_request(TRANSPORT_UDP), 4), (on.request(Method.BINDING), 2.3)):
            step = on.respond(Message.parse(request.pack()), at=OVER_UDP)
            assert isinstance(step, Reply)
            assert step.unproven
            assert len(step.answer) <= times * len(request.pack())
            assert Message.parse(step.answer).get(Attribute.SOFTWARE) is None

    def test_a_client_with_the_nonce_is_not_rate_limited(self) -> None:
        on = server()
        step = on.respond(on.sign(on.request(Method.REFRESH)), at=OVER_UDP)
        assert isinstance(step, Reply)
        assert step.refusal is Refusal.NO_ALLOCATION
        assert not step.unproven

    def test_a_bind_over_udp_is_nothing(self) -> None:
        on = server()
        assert on.code(on.bind(b"1234"), at=OVER_UDP) == 400


class TestChannelBind:
    def test_leads_to_the_peer(self) -> None:
        on = server()
        allocation = udp_allocation(on)
        assert on.code(channel_bind(on), at=OVER_UDP) == 0
        expected = Relay(allocation=allocation, peer=PEER, data=b"x")
        assert on.transactions.channel_data(OVER_UDP, 0x4000, b"x", NOW) == expected
        assert on.transactions.channel_data(OVER_UDP, 0x4001, b"x", NOW) is Drop.NO_CHANNEL
        assert on.transactions.channel_data(OVER_UDP, 0x4000, b"x", NOW + 301) is Drop.NO_PERMISSION
        assert on.transactions.channel_data(OVER_UDP, 0x4000, b"x", NOW + 599) is Drop.NO_PERMISSION

    def test_nowhere_without_an_allocation(self) -> None:
        assert server().transactions.channel_data(OVER_UDP, 0x4000, b"x", NOW) is Drop.NO_ALLOCATION

    @pytest.mark.parametrize(
        ("channel", "peer", "code"),
        [
            (0x3FFF, PEER, 400),
            (0x8000, PEER, 400),
            (0x4000, ("2001:db8::1", 4000), 443),
            (0x4000, ("127.0.0.1", 4000), 403),
            (0x4000, (OURS, 4000), 403),
        ],
    )
    def test_refused(self, channel: int, peer: tuple[str, int], code: int) -> None:
        on = server()
        udp_allocation(on)
        assert on.code(channel_bind(on, channel, peer), at=OVER_UDP) == code

    def test_refused_without_number_or_peer(self) -> None:
        on = server()
        udp_allocation(on)
        assert on.code(on.request(Method.CHANNEL_BIND), at=OVER_UDP) == 400

    def test_refused_on_a_tcp_allocation(self) -> None:
        on = server()
        on.allocate()
        assert on.code(channel_bind(on)) == 403


class TestSend:
    def permitted(self, on: Server) -> Allocation:
        allocation = udp_allocation(on)
        assert on.code(on.permission(PEER[0]), at=OVER_UDP) == 0
        return allocation

    def test_goes_to_a_peer_with_permission(self) -> None:
        on = server()
        expected = Relay(allocation=self.permitted(on), peer=PEER, data=b"hello")
        assert on.respond(send(), at=OVER_UDP) == expected

    def test_without_fragments_if_asked_for(self) -> None:
        on = server()
        self.permitted(on)
        step = on.respond(send().with_bytes(Attribute.DONT_FRAGMENT, b""), at=OVER_UDP)
        assert isinstance(step, Relay)
        assert step.dont_fragment

    def test_empty_data_is_data(self) -> None:
        on = server()
        self.permitted(on)
        step = on.respond(send(data=b""), at=OVER_UDP)
        assert isinstance(step, Relay)
        assert step.data == b""

    def test_is_dropped_without_permission_or_after_it(self) -> None:
        on = server()
        self.permitted(on)
        assert on.respond(send(("10.0.0.8", 4000)), at=OVER_UDP) == Drop.NO_PERMISSION
        assert on.respond(send(), at=OVER_UDP, now=NOW + 301) == Drop.NO_PERMISSION

    @pytest.mark.parametrize(
        "message",
        [
            Message(Method.SEND, MessageClass.INDICATION, bytes(12)),
            Message(Method.SEND, MessageClass.INDICATION, bytes(12)).with_bytes(Attribute.DATA, b"x"),
            send(("10.0.0.9", 0)),
            send().with_bytes(0x7777, b""),
            Message(Method.SEND, MessageClass.INDICATION, bytes(12))
            .with_bytes(Attribute.XOR_PEER_ADDRESS, b"\0\1")
            .with_bytes(Attribute.DATA, b"x"),
        ],
    )
    def test_is_dropped_if_malformed(self, message: Message) -> None:
        on = server()
        self.permitted(on)
        assert on.respond(message, at=OVER_UDP) == Drop.NOT_STUN

    def test_is_dropped_on_a_tcp_allocation(self) -> None:
        on = server()
        on.allocate()
        assert on.respond(send()) == Drop.NO_ALLOCATION


class TestConnect:
    def request(self, on: Server, peer: tuple[str, int] = PEER) -> Message:
        return on.request(Method.CONNECT).with_xor_address(Attribute.XOR_PEER_ADDRESS, peer)

    def test_is_off_by_default(self) -> None:
        on = server(active_connect=False)
        on.allocate()
        assert on.code(self.request(on)) == 403

    def test_is_granted_once(self) -> None:
        on = server()
        allocation, _ = on.allocate()
        step = on.respond(on.sign(self.request(on)))
        assert isinstance(step, Connect)
        assert (step.peer, step.allocation) == (PEER, allocation)
        assert on.code(self.request(on)) == 446
        attempt, _ = on.table.enqueue(allocation, PEER)
        answer = Message.parse(on.transactions.complete_connect(step, attempt))
        assert answer.get(Attribute.CONNECTION_ID) == attempt.connection_id
        assert answer.has_integrity
        failure = on.transactions.fail_connect(step)
        assert failure.refusal is Refusal.CONNECT_FAILED
        assert Message.parse(failure.answer).error == (447, "Connection Timeout or Failure")

    @pytest.mark.parametrize(
        ("peer", "code"),
        [
            (("127.0.0.1", 80), 403),
            (("169.254.169.254", 80), 403),
            (("0.0.0.0", 80), 403),
            ((OURS, 80), 403),
            ((PEER[0], 0), 400),
            (("2001:db8::1", 80), 443),
        ],
    )
    def test_refused(self, peer: tuple[str, int], code: int) -> None:
        on = server()
        on.allocate()
        assert on.code(self.request(on, peer)) == code

    def test_refused_without_a_peer_or_on_a_udp_allocation(self) -> None:
        on = server()
        on.allocate()
        assert on.code(on.request(Method.CONNECT)) == 400
        udp_allocation(on)
        assert on.code(self.request(on), at=OVER_UDP) == 403


class TestForbiddenPeers:
    SPELLINGS = (
        "::1",
        "::",
        "::ffff:10.0.0.9",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::",
        "::ffff:0:7f00:1",
        "64:ff9b:1::7f00:1",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
        "fd00:ec2::254",
        "fe80::1",
        "ff02::1",
        f"64:ff9b::{OURS}",
        "2002:a00:7::1",
    )

    @pytest.mark.parametrize("address", SPELLINGS)
    @pytest.mark.parametrize("transport", [TRANSPORT_TCP, TRANSPORT_UDP])
    def test_in_every_spelling(self, address: str, transport: int) -> None:
        on = server()
        request = on.allocate_request(transport).with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6)
        on.allocate(request)
        assert on.code(on.permission(address)) == 403
        if transport == TRANSPORT_UDP:
            assert on.code(channel_bind(on, peer=(address, 80))) == 403
        else:
            connect = on.request(Method.CONNECT).with_xor_address(Attribute.XOR_PEER_ADDRESS, (address, 80))
            assert on.code(connect) == 403

    def test_other_addresses_behind_nat64_are_allowed(self) -> None:
        on = server()
        request = on.allocate_request(TRANSPORT_UDP).with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6)
        on.allocate(request)
        assert on.code(on.permission("64:ff9b::10.0.0.9")) == 0

    def test_our_own_unless_they_are_allowed(self) -> None:
        on = server(allowed_peers=("10.0.0.0/24",))
        udp_allocation(on)
        assert on.code(on.permission(OURS), at=OVER_UDP) == 0

    def test_our_own_addresses_may_connect_to_us(self) -> None:
        """A relay may run on the TURN server's host; we never connect to it."""
        on = server(active_connect=False)
        on.allocate()
        assert on.code(on.permission(OURS)) == 0


def test_time_of_credentials_counts_for_udp_too() -> None:
    on = server()
    step = on.transactions.respond(OVER_UDP, on.sign(on.allocate_request(TRANSPORT_UDP)), now=NOW, unix_now=UNIX + 3601)
    assert isinstance(step, Reply)
    assert step.refusal is Refusal.STALE_NONCE


def test_unsupported_features_are_not_advertised() -> None:
    """No security bits in the nonce (RFC 8489, section 9.2), no PASSWORD-ALGORITHMS; SHA-256 alone is not a valid signature."""
    on = server()
    request = on.allocate_request().with_bytes(Attribute.MESSAGE_INTEGRITY_SHA256, bytes(32))
    step = on.respond(Message.parse(request.pack()))
    assert isinstance(step, Reply)
    answer = Message.parse(step.answer)
    assert answer.error == (401, "Unauthorized")
    assert not (answer.text(Attribute.NONCE) or "").startswith("obMatJos2")
    assert {kind for kind, _ in answer.attributes} == {
        Attribute.ERROR_CODE,
        Attribute.REALM,
        Attribute.NONCE,
        Attribute.SOFTWARE,
    }
    ticket, additional = 0x8030, Attribute.ADDITIONAL_ADDRESS_FAMILY
    made, _ = on.allocate(on.allocate_request().with_bytes(ticket, b"").with_bytes(additional, b"\2\0\0\0"))
    assert made.family == FAMILY_IPV4
