"""Cases of the behaviour table about credentials, allocations and permissions: what a control connection sees.

Each takes the server's address and returns what it saw.
"""

import socket
import time
from collections.abc import Callable

from tests.support.turn_client import Client, code, connect, read_all, reset, unknown_attributes, until_refused
from tests.support.waiting import wait_until
from tests.turnreg.server.situations import Server, control, sees_reset, stream
from turnreg.stun.auth import rest_credentials
from turnreg.stun.message import FAMILY_IPV6, Attribute, Message, MessageClass, Method

# -- credentials


def challenge(server: Server) -> object:
    with Client(server) as client:
        answer = client.ask(client.allocate_request(), sign=False)
        return code(answer), answer.text(Attribute.REALM), bool(answer.text(Attribute.NONCE)), answer.has_integrity


def wrong_password(server: Server) -> object:
    with Client(server, password="wrong") as client:
        client.login()
        return code(client.ask(client.allocate_request()))


def unknown_user(server: Server) -> object:
    with Client(server, user="nobody") as client:
        client.login()
        return code(client.ask(client.allocate_request()))


def stale_nonce(server: Server) -> object:
    """The nonce of an existing allocation expires; a retry with the new one works."""
    with Client(server) as client:
        client.allocate()
        first, codes = client.nonce, [0]

        def is_refused() -> bool:
            codes.append(code(client.refresh(600)))
            return codes[-1] != 0

        wait_until(is_refused)
        return codes[-1], client.nonce != first, code(client.refresh(600))


def rest_name_that_ends(server: Server) -> object:
    """Refresh and CreatePermission after its expiry; then a Refresh with a new name of the same user."""
    user, password = rest_credentials("north", "gw", time.time() + 2.9)
    with Client(server, user=user, password=password) as client:
        client.allocate()
        assert wait_until(lambda: time.time() > int(user.partition(":")[0]))
        late = code(client.refresh(600)), code(client.permit("127.0.0.1"))
        client.user, client.password = rest_credentials("north", "gw", time.time() + 60)
        return *late, code(client.refresh(600))


def rest_secret(secret: str) -> Callable[[Server], object]:
    def run(server: Server) -> object:
        user, password = rest_credentials(secret, "gw", time.time() + 60)
        with Client(server, user=user, password=password) as client:
            client.login()
            return code(client.ask(client.allocate_request()))

    return run


# -- allocations


def allocate(server: Server) -> object:
    with Client(server) as client:
        client.login()
        answer = client.ask(client.allocate_request())
        assert answer.verify_integrity(client.key)
        assert answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == client.sock.getsockname()
        relayed = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS)
        assert relayed is not None
        return answer.message_class, relayed[0], 20_000 <= relayed[1] <= 32_000, answer.number(Attribute.LIFETIME)


def lifetimes(server: Server) -> object:
    granted = []
    for asked in (1, 3600, 100_000):
        with Client(server) as client:
            client.login()
            answer = client.ask(client.allocate_request().with_number(Attribute.LIFETIME, asked))
            granted.append(answer.number(Attribute.LIFETIME))
    return granted


def second_allocate(server: Server) -> object:
    with Client(server) as client:
        client.allocate()
        return code(client.ask(client.allocate_request()))


def retransmitted_allocate(server: Server) -> object:
    with Client(server) as client:
        client.login()
        request = client.allocate_request()
        first, second = client.ask(request), client.ask(request)
        return second.xor_address(Attribute.XOR_RELAYED_ADDRESS) == first.xor_address(Attribute.XOR_RELAYED_ADDRESS)


def allocate_with(attribute: int, value: bytes) -> Callable[[Server], object]:
    def run(server: Server) -> object:
        with Client(server) as client:
            client.login()
            answer = client.ask(client.allocate_request().with_bytes(attribute, value))
            return code(answer), unknown_attributes(answer)

    return run


def transport(number: int) -> Callable[[Server], object]:
    def run(server: Server) -> object:
        with Client(server) as client:
            client.login()
            return code(client.ask(client.allocate_request(number)))

    return run


def no_transport(server: Server) -> object:
    with Client(server) as client:
        client.login()
        return code(client.ask(client.bare(Method.ALLOCATE)))


def refresh_without_allocation(server: Server) -> object:
    with Client(server) as client:
        client.login()
        return code(client.refresh(600))


def quota(server: Server) -> object:
    """Two are allowed. The third is refused with a signed answer; a place is free again once a client has gone."""
    with Client(server) as first, Client(server) as second, Client(server) as third:
        first.allocate()
        second.allocate()
        third.login()
        answer = third.ask(third.allocate_request())
        first.sock.close()
        assert until_refused(first.relayed)
        with Client(server) as fourth:
            fourth.login()
            codes = [486]

            def is_answered_otherwise() -> bool:
                codes.append(code(fourth.ask(fourth.allocate_request())))
                return codes[-1] != 486

            wait_until(is_answered_otherwise, interval_s=0.05)  # sixteen refusals end the connection
        return code(answer), answer.verify_integrity(third.key), codes[-1]


def refresh_zero(server: Server) -> object:
    """It is answered; then the stream is reset, the port closed and the control connection ended."""
    with stream(server) as (peer, data, client):
        answer = client.refresh(0)
        return (
            code(answer),
            answer.number(Attribute.LIFETIME),
            sees_reset(peer),
            sees_reset(data),
            until_refused(client.relayed),
            read_all(client.sock)[0],
        )


def expiry(server: Server) -> object:
    with stream(server) as (peer, data, client):
        return sees_reset(peer), sees_reset(data), until_refused(client.relayed), read_all(client.sock)[0]


def control_lost(server: Server) -> object:
    with stream(server) as (peer, data, client):
        reset(client.sock)
        return sees_reset(peer), sees_reset(data), until_refused(client.relayed)


def control_closed(server: Server) -> object:
    with stream(server) as (peer, data, client):
        client.sock.close()
        return sees_reset(peer), sees_reset(data), until_refused(client.relayed)


def other_user(server: Server) -> object:
    with control(server) as client:
        client.user, client.password = "v", "q"
        return code(client.refresh(600)), code(client.permit("127.0.0.1"))


# -- permissions


def permissions(server: Server) -> object:
    with Client(server) as client:
        client.allocate()
        return code(client.permit("127.0.0.1", "127.0.0.2")), code(client.permit()), code(client.permit("::1"))


def loopback_spelt(address: str) -> Callable[[Server], object]:
    """Whether an IPv6 allocation may have that peer, where 127.0.0.0/8 is denied."""

    def run(server: Server) -> object:
        with Client(server) as client:
            client.login()
            request = client.allocate_request().with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6)
            assert code(client.ask(request)) == 0
            return code(client.permit(address))

    return run


def peer_without_permission(server: Server) -> object:
    """It is reset, and only the permitted peer is announced to the client."""
    with control(server) as client:
        try:
            stranger = connect(client.relayed, source="127.0.0.2")
        except ConnectionResetError:
            was_reset = True
        else:
            with stranger:
                was_reset = sees_reset(stranger)
        with connect(client.relayed) as peer:
            return was_reset, client.attempt().xor_address(Attribute.XOR_PEER_ADDRESS) == peer.getsockname()


def expired_permission(server: Server) -> object:
    """Existing streams continue, new peers are reset."""
    with stream(server) as (peer, data, client):
        deadline = time.monotonic() + 10
        refused = False
        while not refused and time.monotonic() < deadline:
            try:
                with connect(client.relayed) as late:
                    late.settimeout(0.1)
                    refused = sees_reset(late)
            except ConnectionResetError:
                refused = True
        data.sendall(b"still here")
        return refused, peer.recv(100)


def forbidden_methods(server: Server) -> object:
    with control(server) as client:
        peer = ("127.0.0.1", 9)
        channel = client.bare(Method.CHANNEL_BIND).with_number(Attribute.CHANNEL_NUMBER, 0x4000 << 16)
        bound = client.ask(channel.with_xor_address(Attribute.XOR_PEER_ADDRESS, peer))
        connected = client.ask(client.bare(Method.CONNECT).with_xor_address(Attribute.XOR_PEER_ADDRESS, peer))
        return code(bound), code(connected)


def send_indication(server: Server) -> object:
    """It is ignored: the next request is answered."""
    with control(server) as client:
        indication = Message(Method.SEND, MessageClass.INDICATION, bytes(12)).with_bytes(Attribute.DATA, b"x")
        client.send(indication.with_xor_address(Attribute.XOR_PEER_ADDRESS, ("127.0.0.1", 9)).pack())
        return code(client.refresh(600))


def binding_request(server: Server) -> object:
    with Client(server) as client:
        answer = client.ask(client.bare(Method.BINDING), sign=False)
        return answer.xor_address(Attribute.XOR_MAPPED_ADDRESS) == client.sock.getsockname()


def requests_in_one_write(server: Server) -> object:
    with Client(server) as client:
        requests = [client.bare(Method.BINDING) for _ in range(3)]
        client.send(b"".join(request.pack() for request in requests))
        return [code(client.answer_to(request)) for request in requests]


def request_byte_by_byte(server: Server) -> object:
    with Client(server) as client:
        request = client.bare(Method.BINDING)
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request.pack():
            client.send(bytes((byte,)))
        return code(client.answer_to(request))
