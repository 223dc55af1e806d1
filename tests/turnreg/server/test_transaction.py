"""One request, one answer: every method and every error, without a socket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.turn_client import unknown_attributes
from tests.turnreg.server.decisions import NOW, OTHER, RELAYED, TUPLE, UNIX, Server, reply_of
from turnreg.server.allocation import CODES, Drop, FiveTuple, Refusal
from turnreg.server.outcome import Close, GiveBack, Ignore, Join, Open, Reply
from turnreg.stun.auth import long_term_key, rest_credentials
from turnreg.stun.message import (
    FAMILY_IPV4,
    FAMILY_IPV6,
    TRANSPORT_UDP,
    Attribute,
    Message,
    MessageClass,
    Method,
)


class TestBinding:
    def test_tells_the_address_to_anybody(self) -> None:
        server = Server()
        step = server.respond(server.request(Method.BINDING))
        answer = Message.parse(reply_of(step).answer)
        assert answer.message_class is MessageClass.SUCCESS
        assert answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == TUPLE.client
        assert answer.text(Attribute.SOFTWARE) == "crossnet"
        assert not answer.has_integrity
        assert not answer.has_fingerprint

    def test_with_something_unknown(self) -> None:
        server = Server()
        request = server.request(Method.BINDING).with_bytes(0x0003, bytes(4))  # CHANGE-REQUEST of RFC 5780
        answer = Message.parse(reply_of(server.respond(request)).answer)
        assert answer.error == (420, "Unknown Attribute")
        assert unknown_attributes(answer) == (0x0003,)

    def test_fingerprint_is_answered_with_one(self) -> None:
        server = Server()
        request = Message.parse(server.request(Method.BINDING).pack(fingerprint=True))
        assert Message.parse(reply_of(server.respond(request)).answer).has_fingerprint


class TestIgnored:
    @pytest.mark.parametrize("message_class", [MessageClass.INDICATION, MessageClass.SUCCESS, MessageClass.ERROR])
    @pytest.mark.parametrize("method", list(Method))
    def test_what_is_no_request(self, method: Method, message_class: MessageClass) -> None:
        server = Server()
        server.allocate()
        step = server.respond(Message(method, message_class, bytes(12)))
        is_datagram = (method, message_class) == (Method.SEND, MessageClass.INDICATION)
        assert step == (Drop.NO_ALLOCATION if is_datagram else Ignore())

    @pytest.mark.parametrize("method", [Method.SEND, Method.DATA, Method.CONNECTION_ATTEMPT, 0x00F])
    def test_a_method_that_is_not_supported(self, method: int) -> None:
        server = Server()
        assert server.respond(server.sign(server.request(method))) == Ignore()


class TestAuthentication:
    METHODS = (
        Method.ALLOCATE,
        Method.REFRESH,
        Method.CREATE_PERMISSION,
        Method.CHANNEL_BIND,
        Method.CONNECT,
        Method.CONNECTION_BIND,
    )

    @pytest.mark.parametrize("method", METHODS)
    def test_challenge(self, method: Method) -> None:
        server = Server()
        step = server.respond(server.request(method).with_bytes(0x7777, b""))  # not even told what is unknown
        answer = Message.parse(reply_of(step).answer)
        assert answer.error == (401, "Unauthorized")
        assert answer.text(Attribute.REALM) == "lab"
        assert answer.text(Attribute.NONCE) == server.authenticator.nonce("192.0.2.1", UNIX)
        assert not answer.has_integrity
        assert reply_of(step).refusal is Refusal.NO_CREDENTIALS
        assert isinstance(step, Close) is (method is Method.CONNECTION_BIND)

    def test_stale_nonce(self) -> None:
        server = Server()
        message = server.sign(server.allocate_request())
        step = server.transactions.respond(TUPLE, message, now=NOW, unix_now=UNIX + 3600)
        answer = Message.parse(reply_of(step).answer)
        assert answer.error == (438, "Stale Nonce")
        assert answer.text(Attribute.NONCE) == server.authenticator.nonce("192.0.2.1", UNIX + 3600)
        assert answer.text(Attribute.REALM) == "lab"
        assert isinstance(step, Reply)

    def test_signed_without_a_nonce(self) -> None:
        server = Server()
        message = server.allocate_request().with_text(Attribute.USERNAME, "u")
        message = Message.parse(message.pack(integrity_key=b"k"))
        answer = Message.parse(reply_of(server.respond(message)).answer)
        assert answer.error == (400, "Bad Request")
        assert answer.get(Attribute.NONCE) is None

    @pytest.mark.parametrize("method", METHODS)
    def test_unknown_attribute(self, method: Method) -> None:
        server = Server()
        message = server.request(method).with_bytes(0x7777, b"x").with_bytes(0x001E, b"").with_bytes(0x7777, b"")
        answer = server.answer(message)
        assert answer.error == (420, "Unknown Attribute")
        assert unknown_attributes(answer) == (0x7777, 0x001E)

    def test_as_many_unknown_ones_as_fit(self) -> None:
        server = Server()
        message = server.allocate_request()
        for kind in range(0x7000, 0x7000 + 440):
            message = message.with_bytes(kind, b"")
        assert len(unknown_attributes(server.answer(message))) == 440

    def test_an_optional_unknown_attribute_is_ignored(self) -> None:
        server = Server()
        server.allocate(server.allocate_request().with_bytes(0x8030, b""))  # MOBILITY-TICKET: no ticket comes back


class TestAllocate:
    def test_success(self) -> None:
        server = Server()
        allocation, answer = server.allocate()
        assert answer.message_class is MessageClass.SUCCESS
        assert answer.xor_address(Attribute.XOR_RELAYED_ADDRESS) == RELAYED
        assert answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == TUPLE.client
        assert answer.number(Attribute.LIFETIME) == 600
        assert answer.text(Attribute.SOFTWARE) == "crossnet"
        assert answer.verify_integrity(long_term_key("u", "lab", "p"))
        assert server.table.find(TUPLE, NOW) is allocation

    @pytest.mark.parametrize(("asked", "granted"), [(0, 600), (1, 600), (601, 601), (3600, 3600), (2**32 - 1, 3600)])
    def test_lifetime(self, asked: int, granted: int) -> None:
        server = Server()
        allocation, answer = server.allocate(server.allocate_request().with_number(Attribute.LIFETIME, asked))
        assert answer.number(Attribute.LIFETIME) == granted
        assert allocation.expires_at == NOW + granted

    def test_retransmission_is_answered_alike(self) -> None:
        server = Server()
        request = server.allocate_request().with_number(Attribute.LIFETIME, 700)
        _, first = server.allocate(request)
        assert server.answer(request) == first
        assert len(server.table) == 1

    def test_a_second_one(self) -> None:
        server = Server()
        server.allocate()
        assert server.code(server.allocate_request()) == 437
        server.allocate(at=OTHER)

    @pytest.mark.parametrize(
        ("attribute", "value", "code"),
        [
            (Attribute.EVEN_PORT, b"\x80", 400),
            (Attribute.DONT_FRAGMENT, b"", 400),
            (Attribute.RESERVATION_TOKEN, bytes(8), 400),
            (Attribute.REQUESTED_ADDRESS_FAMILY, b"\2\0\0\0", 440),
            (Attribute.REQUESTED_ADDRESS_FAMILY, b"\3\0\0\0", 440),
            (Attribute.REQUESTED_ADDRESS_FAMILY, b"\1", 400),
            (Attribute.LIFETIME, b"", 400),
        ],
    )
    def test_invalid_allocate_requests(self, attribute: Attribute, value: bytes, code: int) -> None:
        server = Server()
        request = server.allocate_request().with_bytes(attribute, value)
        assert server.code(request) == code
        assert len(server.table) == 0
        server.allocate()  # no place was lost

    @pytest.mark.parametrize(("transport", "code"), [(TRANSPORT_UDP, 442), (132, 442), (None, 400)])
    def test_transport(self, transport: int | None, code: int) -> None:
        server = Server()
        request = server.request(Method.ALLOCATE) if transport is None else server.allocate_request(transport)
        assert server.code(request) == code

    def test_family(self) -> None:
        server = Server(families=(FAMILY_IPV6,))
        assert server.code(server.allocate_request()) == 440  # IPv4 is meant where nothing is said
        request = server.allocate_request().with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6)
        assert server.allocate(request)[0].family == FAMILY_IPV6

    def test_quota(self) -> None:
        server = Server(max_allocations_per_account=1, max_allocations=2)
        allocation, _ = server.allocate()
        assert server.code(server.allocate_request(), at=OTHER) == 486
        third = FiveTuple(("192.0.2.1", 3333), TUPLE.server)
        server.allocate(user="v", password="q", at=third)
        fourth = FiveTuple(("192.0.2.1", 4444), TUPLE.server)
        username, password = rest_credentials("north", "w", UNIX + 9)
        assert server.code(server.allocate_request(), user=username, password=password, at=fourth) == 508
        server.table.remove(allocation)
        server.allocate(at=OTHER)

    def test_quota_of_rest_credentials_is_by_name(self) -> None:
        server = Server(max_allocations_per_account=1)
        first, second = rest_credentials("north", "gw", UNIX + 9), rest_credentials("north", "gw", UNIX + 99)
        server.allocate(user=first[0], password=first[1])
        assert server.code(server.allocate_request(), user=second[0], password=second[1], at=OTHER) == 486

    def test_no_port(self) -> None:
        server = Server(max_allocations_per_account=1)
        step = server.respond(server.sign(server.allocate_request()))
        assert isinstance(step, Open)
        refused = server.transactions.fail_allocate(step)
        assert Message.parse(refused.answer).error == (508, "Insufficient Capacity")
        server.allocate()


class TestAllocationNeeded:
    @pytest.mark.parametrize("method", [Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND, Method.CONNECT])
    def test_there_is_none(self, method: Method) -> None:
        server = Server()
        assert server.code(server.request(method)) == 437

    @pytest.mark.parametrize("method", [Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND, Method.CONNECT])
    def test_it_has_expired(self, method: Method) -> None:
        server = Server()
        server.allocate()
        step = server.respond(server.sign(server.request(method)), now=NOW + 600)
        assert reply_of(step).refusal is Refusal.NO_ALLOCATION

    @pytest.mark.parametrize("method", [Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND, Method.CONNECT])
    def test_it_belongs_to_another_account(self, method: Method) -> None:
        server = Server()
        server.allocate()
        assert server.code(server.request(method), user="v", password="q") == 441

    @pytest.mark.parametrize("method", [Method.CHANNEL_BIND, Method.CONNECT])
    def test_methods_that_are_forbidden(self, method: Method) -> None:
        server = Server()
        server.allocate()
        request = server.request(method).with_xor_address(Attribute.XOR_PEER_ADDRESS, ("10.0.0.9", 80))
        assert server.code(request.with_number(Attribute.CHANNEL_NUMBER, 0x4000 << 16)) == 403


class TestRefresh:
    def test_prolongs(self) -> None:
        server = Server()
        allocation, _ = server.allocate()
        request = server.request(Method.REFRESH).with_number(Attribute.LIFETIME, 900)
        step = server.respond(server.sign(request), now=NOW + 500)
        assert Message.parse(reply_of(step).answer).number(Attribute.LIFETIME) == 900
        assert allocation.expires_at == NOW + 1400
        assert isinstance(step, Reply)

    def test_without_a_lifetime(self) -> None:
        server = Server()
        server.allocate()
        assert server.answer(server.request(Method.REFRESH)).number(Attribute.LIFETIME) == 600

    def test_deletes_the_allocation(self) -> None:
        server = Server()
        allocation, _ = server.allocate()
        request = server.request(Method.REFRESH).with_number(Attribute.LIFETIME, 0)
        step = server.respond(server.sign(request))
        assert Message.parse(reply_of(step).answer).number(Attribute.LIFETIME) == 0
        assert isinstance(step, GiveBack)
        assert step.allocation is allocation

    @pytest.mark.parametrize(("family", "code"), [(FAMILY_IPV4, 0), (FAMILY_IPV6, 443)])
    def test_family(self, family: int, code: int) -> None:
        server = Server()
        server.allocate()
        request = server.request(Method.REFRESH).with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, family)
        assert server.code(request) == code

    def test_new_rest_credentials_of_the_same_name(self) -> None:
        server = Server()
        old, new = rest_credentials("north", "gw", UNIX + 1), rest_credentials("north", "gw", UNIX + 600)
        server.allocate(user=old[0], password=old[1])
        assert server.code(server.request(Method.REFRESH), user=new[0], password=new[1]) == 0
        other = rest_credentials("north", "gw-2", UNIX + 600)
        assert server.code(server.request(Method.REFRESH), user=other[0], password=other[1]) == 441

    def test_expired_rest_credentials(self) -> None:
        server = Server()
        username, password = rest_credentials("north", "gw", UNIX)
        step = server.respond(server.sign(server.allocate_request(), username, password))
        assert reply_of(step).refusal is Refusal.EXPIRED
        assert Message.parse(reply_of(step).answer).error == (401, "Expired 0 s ago by this server's clock")


class TestPermission:
    def test_several_at_once(self) -> None:
        server = Server()
        allocation, _ = server.allocate()
        assert server.code(server.permission("10.0.0.9", "10.0.0.10")) == 0
        assert allocation.permits("10.0.0.9", NOW + 299)
        assert allocation.permits("10.0.0.10", NOW + 299)
        assert not allocation.permits("10.0.0.9", NOW + 300)

    def test_none_or_malformed(self) -> None:
        server = Server()
        server.allocate()
        assert server.code(server.permission()) == 400
        bad = server.permission("10.0.0.9").with_bytes(Attribute.XOR_PEER_ADDRESS, b"\0\1")
        assert server.code(bad) == 400

    def test_all_or_none(self) -> None:
        server = Server()
        allocation, _ = server.allocate()
        assert server.code(server.permission("10.0.0.9", "127.0.0.1")) == 403
        assert server.code(server.permission("10.0.0.9", "2001:db8::1")) == 443
        assert not allocation.permits("10.0.0.9", NOW)

    def test_limit(self) -> None:
        server = Server(max_permissions=1)
        server.allocate()
        assert server.code(server.permission("10.0.0.9", "10.0.0.10")) == 508
        assert server.code(server.permission("10.0.0.9")) == 0
        assert server.code(server.permission("10.0.0.10")) == 508

    @pytest.mark.parametrize(
        "address",
        [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.9",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
        ],
    )
    def test_peers_that_nobody_may_permit(self, address: str) -> None:
        server = Server(families=(FAMILY_IPV4, FAMILY_IPV6))
        family = FAMILY_IPV6 if ":" in address else FAMILY_IPV4
        server.allocate(server.allocate_request().with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, family))
        assert server.code(server.permission(address)) == 403

    def test_refusals_can_be_lifted(self) -> None:
        server = Server(allowed_peers=("127.0.0.0/8",))
        server.allocate()
        assert server.code(server.permission("127.0.0.1")) == 0
        assert server.code(server.permission("169.254.169.254")) == 403


class TestPeers:
    def test_attempt(self) -> None:
        server = Server()
        allocation, _ = server.allocate()
        attempt = server.attempt(allocation)
        indication = Message.parse(server.transactions.attempt(attempt))
        assert (indication.method, indication.message_class) == (Method.CONNECTION_ATTEMPT, MessageClass.INDICATION)
        assert indication.get(Attribute.CONNECTION_ID) == attempt.connection_id
        assert indication.xor_address(Attribute.XOR_PEER_ADDRESS) == ("10.0.0.9", 40_000)
        assert not indication.has_fingerprint

    def test_attempt_for_a_client_that_uses_fingerprints(self) -> None:
        server = Server()
        step = server.respond(server.sign(server.allocate_request(), fingerprint=True))
        assert isinstance(step, Open)
        allocation, answer = server.transactions.complete_allocate(step, RELAYED, NOW)
        assert Message.parse(answer).has_fingerprint
        assert Message.parse(server.transactions.attempt(server.attempt(allocation))).has_fingerprint

    def test_bind(self) -> None:
        server = Server()
        attempt = server.attempt(server.allocate()[0])
        step = server.respond(server.sign(server.bind(attempt.connection_id)), at=OTHER)
        assert isinstance(step, Join)
        assert step.attempt is attempt
        answer = Message.parse(reply_of(step).answer)
        assert answer.message_class is MessageClass.SUCCESS
        assert answer.verify_integrity(long_term_key("u", "lab", "p"))

    def test_a_bind_that_fails_leaves_the_peer_waiting(self) -> None:
        server = Server()
        attempt = server.attempt(server.allocate()[0])
        good = server.bind(attempt.connection_id)
        failures = [
            (good, 401),
            (server.sign(good, "u", "wrong"), 401),
            (server.sign(good, "v", "q"), 441),
            (server.sign(server.bind(b"\xff\xff\xff\xff")), 400),
            (server.sign(server.bind(b"")), 400),
            (server.sign(server.request(Method.CONNECTION_BIND)), 400),
            (server.sign(good.with_bytes(0x7777, b"")), 420),
        ]
        for message, code in failures:
            step = server.respond(message, at=OTHER)
            assert (Message.parse(reply_of(step).answer).error or (0, ""))[0] == code
            assert isinstance(step, Close)
        joined = server.respond(server.sign(good), at=OTHER)
        assert isinstance(joined, Join)
        assert joined.attempt is attempt
        again = server.respond(server.sign(good), at=OTHER)
        assert reply_of(again).refusal is Refusal.UNKNOWN_CONNECTION

    def test_bind_on_the_control_connection(self) -> None:
        server = Server()
        attempt = server.attempt(server.allocate()[0])
        step = server.respond(server.sign(server.bind(attempt.connection_id)))
        assert Message.parse(reply_of(step).answer).error == (400, "Bad Request")
        assert isinstance(step, Reply)
        joined = server.respond(server.sign(server.bind(attempt.connection_id)), at=OTHER)
        assert isinstance(joined, Join)
        assert joined.attempt is attempt


ATTRIBUTES = st.lists(
    st.tuples(
        st.sampled_from([a for a in Attribute if a not in (Attribute.MESSAGE_INTEGRITY, Attribute.FINGERPRINT)]),
        st.binary(max_size=24) | st.just(b"\6\0\0\0") | st.just(b"\0\1\0\0\1\2\3\4"),
    ),
    max_size=6,
)


@given(st.sampled_from(list(Method)), ATTRIBUTES, st.booleans(), st.booleans())
def test_no_request_breaks_it(
    method: Method, attributes: list[tuple[Attribute, bytes]], allocated: bool, fingerprint: bool
) -> None:
    """A signed request with random attributes gets a success or one of our errors, and the answer can be parsed."""
    server = Server()
    if allocated:
        server.allocate()
    message = server.sign(server.request(method))
    for attribute, value in attributes:
        message = message.with_bytes(attribute, value)
    key = long_term_key("u", "lab", "p")
    message = Message.parse(message.pack(integrity_key=key, fingerprint=fingerprint))
    step = server.respond(message)
    if not isinstance(step, Open | Ignore | Drop):
        reply = reply_of(step)
        answer = Message.parse(reply.answer)
        assert answer.transaction_id == message.transaction_id
        assert answer.has_fingerprint is fingerprint
        assert (reply.refusal is None) is (answer.message_class is MessageClass.SUCCESS)
        if reply.refusal is not None:
            assert answer.error == CODES[reply.refusal]
    else:
        assert isinstance(step, Open) or method in (Method.SEND, Method.DATA, Method.CONNECTION_ATTEMPT)
