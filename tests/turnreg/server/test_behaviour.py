"""One table of behaviour, run against Debian's coturn and against the embedded server.

Each case is a small program that returns what it saw. Where the two differ the table says so: those differences are why the
embedded server exists, and why the stream protocol may not rely on a FIN, an early byte or a second bind.
"""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.turnreg.coturn import coturn
from tests.turnreg.server.embedded import embedded
from tests.turnreg.server.wireclient import Client, code, connect, noise, read_all, reset, until_refused
from turnreg.server import Limits
from turnreg.stun import FAMILY_IPV6, TRANSPORT_UDP, Attribute, Message, MessageClass, Method

Server = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run and what is seen. `coturn_options` and `embedded_options` bring both servers into the same state."""

    run: Callable[[Server], object]
    coturn: object
    embedded: object
    coturn_options: tuple[str, ...] = ()
    embedded_options: dict[str, Any] = field(default_factory=dict)


class Either:
    """What depends on who is quicker: any of these."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = outcomes

    def __eq__(self, other: object) -> bool:
        return other in self.outcomes

    def __hash__(self) -> int:
        return hash(self.outcomes)

    def __repr__(self) -> str:
        return f"Either{self.outcomes}"


def same(run: Callable[[Server], object], seen: object, *options: str, **more: Any) -> Case:
    return Case(run=run, coturn=seen, embedded=seen, coturn_options=options, embedded_options=more)


@contextmanager
def control(server: Server) -> Iterator[Client]:
    """A client with an allocation and a permission for 127.0.0.1."""
    with Client(server) as client:
        client.allocate()
        assert code(client.permit("127.0.0.1")) == 0
        yield client


@contextmanager
def stream(server: Server) -> Iterator[tuple[socket.socket, socket.socket, Client]]:
    """A peer, the data connection bound to it, and the control connection."""
    with control(server) as client, connect(client.relayed) as peer, client.bind(client.attempt()) as data:
        assert data.rest() == b""
        yield peer, data.sock, client


def sees_reset(peer: socket.socket) -> bool:
    """Whether a peer that was connected is reset. A FIN, or silence, is no."""
    try:
        return peer.recv(1) == b"?"
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


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
    """The nonce expires on a living allocation; a retry with the new one works."""
    with Client(server) as client:
        client.allocate()
        first, deadline = client.nonce, time.monotonic() + 10
        codes = [0]
        while codes[-1] == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
            codes.append(code(client.refresh(600)))
        return codes[-1], client.nonce != first, code(client.refresh(600))


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
            return code(answer), answer.unknown_attributes

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
    """Two are allowed: the third is refused, signed; a place is free again once a client has gone."""
    with Client(server) as first, Client(server) as second, Client(server) as third:
        first.allocate()
        second.allocate()
        third.login()
        answer = third.ask(third.allocate_request())
        first.sock.close()
        deadline = time.monotonic() + 5
        with Client(server) as fourth:
            fourth.login()
            while (last := code(fourth.ask(fourth.allocate_request()))) == 486 and time.monotonic() < deadline:
                time.sleep(0.02)
        return code(answer), answer.verify_integrity(third.key), last


def refresh_zero(server: Server) -> object:
    """It is answered, then the stream is cut, the port closed and the control connection ended."""
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


def peer_without_permission(server: Server) -> object:
    """It is reset, and the client hears of the permitted one only."""
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
    """Running streams go on, new peers are reset."""
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


# -- streams


def attempt_and_bind(server: Server) -> object:
    with control(server) as client, connect(client.relayed) as peer:
        attempt = client.attempt()
        assert attempt.xor_address(Attribute.XOR_PEER_ADDRESS) == peer.getsockname()
        assert len(attempt.get(Attribute.CONNECTION_ID) or b"") == 4
        with client.open_data() as data:
            answer = data.ask(data.bind_request(attempt.get(Attribute.CONNECTION_ID) or b""))
            peer.sendall(b"to the client")
            data.sock.sendall(b"to the peer")
            return (
                attempt.message_class,
                attempt.has_integrity,
                answer.verify_integrity(data.key),
                data.sock.recv(100),
                peer.recv(100),
            )


def early(size: int) -> Callable[[Server], object]:
    """The peer sends at once, the client binds a little later; then the peer sends an end mark.

    Returns whether all arrived before the mark, and whether at least the 64 KiB did that coturn keeps.
    """

    def run(server: Server) -> object:
        sent, mark = noise(size), noise(16)
        with control(server) as client, connect(client.relayed) as peer:
            attempt = client.attempt()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(peer.sendall, sent)
                time.sleep(0.2)  # for coturn to read, and drop, what it will: it says nothing that one could wait for
                with client.bind(attempt) as data:
                    pool.submit(peer.sendall, mark)
                    got = bytearray(data.rest())
                    while not got.endswith(mark):
                        more = data.sock.recv(1 << 20)
                        assert more
                        got += more
        kept = min(size, 65_536)
        return got == sent + mark, got[:kept] == sent[:kept]

    return run


def dribbled(server: Server) -> object:
    """Twenty small writes before the bind, each a read of its own: coturn keeps sixteen."""
    with control(server) as client, connect(client.relayed) as peer:
        attempt = client.attempt()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(20):
            peer.sendall(b"%03d\n" % number)
            time.sleep(0.01)
        with client.bind(attempt) as data:
            got = data.rest()
            data.sock.settimeout(0.5)
            peer.sendall(b"end\n")
            while not got.endswith(b"end\n"):
                got += data.sock.recv(100)
        return len(got.split()) - 1


def pipelined_behind_bind(server: Server) -> object:
    """What the client sends together with its ConnectionBind."""
    with control(server) as client, connect(client.relayed) as peer:
        attempt = client.attempt()
        with client.open_data() as data:
            request = data.credentials(data.bind_request(attempt.get(Attribute.CONNECTION_ID) or b""))
            data.send(request.pack(integrity_key=data.key) + b"early, ")
            assert code(data.answer_to(request)) == 0
            data.send(b"late")
            data.sock.shutdown(socket.SHUT_WR)
            return read_all(peer)[0]


def close_after(size: int, who: str) -> Callable[[Server], object]:
    """One side sends and closes at once, the other reads a little later: does all of it arrive, and as what end?"""

    def run(server: Server) -> object:
        sent = noise(size)
        with stream(server) as (peer, data, _):
            source, sink = (peer, data) if who == "peer" else (data, peer)
            source.sendall(sent)
            source.close()
            time.sleep(0.2)
            got, end = read_all(sink)
            return end if got == sent else "truncated"

    return run


def half_close(server: Server) -> object:
    """The peer ends its direction; the client answers only then."""
    with stream(server) as (peer, data, _):
        peer.sendall(b"question")
        peer.shutdown(socket.SHUT_WR)
        asked, end = read_all(data)
        if end != "fin":
            return asked, end, sees_reset(peer)
        data.sendall(b"answer")
        data.close()
        return asked, end, read_all(peer)


def peer_reset(server: Server) -> object:
    with stream(server) as (peer, data, _):
        reset(peer)
        return read_all(data)


def backpressure(server: Server) -> object:
    """A reader that pauses blocks the sender, once the kernel's buffers are full; nothing is lost.

    They hold 4 MB where little is allowed, and more than 32 MB where tcp_rmem allows that.
    """
    block = noise(1 << 20)
    sent = hashlib.sha256()
    got = hashlib.sha256()
    with stream(server) as (peer, data, _):
        data.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        peer.settimeout(0.2)
        total = 0
        blocked = False
        while not blocked and total < 256 << 20:
            try:
                size = peer.send(block)
            except TimeoutError:
                blocked = True
            else:
                sent.update(block[:size])
                total += size
        while total > 0:
            more = data.recv(1 << 20)
            got.update(more)
            total -= len(more) or total
        return blocked, got.digest() == sent.digest()


# -- binds that fail


def failed_bind(spoil: Callable[[Client, bytes], Message]) -> Callable[[Server], object]:
    """A bind that cannot work, then a good one on a new connection: what each of them sees."""

    def run(server: Server) -> object:
        with control(server) as client, connect(client.relayed) as peer:
            attempt = client.attempt()
            connection_id = attempt.get(Attribute.CONNECTION_ID) or b""
            with client.open_data() as bad:
                bad.sock.settimeout(2)
                request = spoil(bad, connection_id)
                signed = request.get(Attribute.USERNAME) is not None
                bad.send(request.pack(integrity_key=bad.key if signed else None))
                first: object
                try:
                    first = code(bad.answer_to(request)), read_all(bad.sock)[1]
                except ConnectionResetError:
                    first = "reset"
            with client.open_data() as data:
                try:
                    good: object = code(data.ask(data.bind_request(connection_id)))
                    peer.sendall(b"hello")
                    good = good, data.rest() or data.sock.recv(10)
                except ConnectionResetError:
                    good = "reset"
            return first, good

    return run


def unsigned(client: Client, connection_id: bytes) -> Message:
    return client.bind_request(connection_id)


def with_wrong_password(client: Client, connection_id: bytes) -> Message:
    client.password = "wrong"
    return client.credentials(client.bind_request(connection_id))


def with_stale_nonce(client: Client, connection_id: bytes) -> Message:
    client.nonce = "0" * len(client.nonce)
    return client.credentials(client.bind_request(connection_id))


def without_id(client: Client, _: bytes) -> Message:
    return client.credentials(client.bare(Method.CONNECTION_BIND))


def bind_of_unknown_id(server: Server) -> object:
    with control(server) as client, client.open_data() as data:
        data.sock.settimeout(2)
        try:
            return code(data.ask(data.bind_request(b"\x01\x02\x03\x04"))), read_all(data.sock)[1]
        except ConnectionResetError:
            return "reset"


def second_bind(server: Server) -> object:
    """Of an id that is bound already: it fails, and the stream goes on."""
    with control(server) as client, connect(client.relayed) as peer:
        attempt = client.attempt()
        with client.bind(attempt) as data, client.open_data() as again:
            again.sock.settimeout(2)
            second: object
            try:
                second = code(again.ask(again.bind_request(attempt.get(Attribute.CONNECTION_ID) or b"")))
            except ConnectionResetError:
                second = "reset"
            peer.sendall(b"hello")
            return second, data.sock.recv(10)


def bind_on_control(server: Server) -> object:
    with control(server) as client, connect(client.relayed):
        attempt = client.attempt()
        refused = client.ask(client.bind_request(attempt.get(Attribute.CONNECTION_ID) or b""))
        with client.bind(attempt):
            return code(refused)


def many_at_once(server: Server) -> object:
    """A hundred peers from one address, bound in reverse, each stream its own."""
    with control(server) as client:
        peers = {peer.getsockname(): peer for peer in (connect(client.relayed) for _ in range(100))}
        attempts = [client.attempt() for _ in peers]
        ids = {attempt.get(Attribute.CONNECTION_ID) for attempt in attempts}
        matched = 0
        for attempt in reversed(attempts):
            address = attempt.xor_address(Attribute.XOR_PEER_ADDRESS)
            assert address is not None
            peer = peers[address]
            with client.bind(attempt) as data:
                peer.sendall(b"%d" % address[1])
                matched += (data.rest() or data.sock.recv(10)) == b"%d" % address[1]
        for peer in peers.values():
            peer.close()
        return len(ids), matched


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


SHORT_LIFE = {"limits": Limits(default_lifetime_s=1.0, max_lifetime_s=1.0)}
GOOD = (0, b"hello")

TABLE: dict[str, Case] = {
    "challenge": same(challenge, (401, "lab", True, False)),
    "wrong password": same(wrong_password, 401),
    "unknown user": same(unknown_user, 401),
    "stale nonce": same(stale_nonce, (438, True, 0), "--stale-nonce=1", nonce_lifetime_s=1.0),
    "allocate": same(allocate, (MessageClass.SUCCESS, "127.0.0.1", True, 600)),
    "lifetimes": same(lifetimes, [600, 3600, 3600]),
    "second allocate": same(second_allocate, 437),
    "retransmitted allocate": same(retransmitted_allocate, True),
    "unknown attribute": same(allocate_with(0x7777, b"x"), (420, (0x7777,))),
    "even port": same(allocate_with(Attribute.EVEN_PORT, b"\x80"), (400, ())),
    "dont fragment": same(allocate_with(Attribute.DONT_FRAGMENT, b""), (400, ())),
    "family not supported": same(
        allocate_with(Attribute.REQUESTED_ADDRESS_FAMILY, bytes((FAMILY_IPV6, 0, 0, 0))), (440, ())
    ),
    "udp allocation": Case(run=transport(TRANSPORT_UDP), coturn=0, embedded=442),
    "unknown transport": Case(run=transport(132), coturn=400, embedded=442),
    "no transport": same(no_transport, 400),
    "refresh without allocation": same(refresh_without_allocation, 437),
    "quota": same(quota, (486, True, 0), "--user-quota=2", limits=Limits(max_allocations_per_account=2)),
    "refresh 0": same(refresh_zero, (0, 0, True, True, True, b"")),
    "expiry": same(expiry, (True, True, True, b""), "--max-allocate-lifetime=1", **SHORT_LIFE),
    "control lost": same(control_lost, (True, True, True)),
    "control closed": same(control_closed, (True, True, True)),
    "other user": same(other_user, (441, 441), "--user=v:q"),
    "permissions": same(permissions, (0, 400, 443)),
    "peer without permission": same(peer_without_permission, (True, True)),
    "expired permission": same(
        expired_permission,
        (True, b"still here"),
        "--permission-lifetime=1",
        limits=Limits(permission_lifetime_s=1.0),
    ),
    "forbidden methods": Case(run=forbidden_methods, coturn=(403, 447), embedded=(403, 403)),
    "send indication": same(send_indication, 0),
    "attempt and bind": same(
        attempt_and_bind, (MessageClass.INDICATION, False, True, b"to the client", b"to the peer")
    ),
    "early 60 kB": same(early(60_000), (True, True)),
    "early 100 kB": Case(run=early(100_000), coturn=(False, True), embedded=(True, True)),
    "early 4 MB": Case(run=early(4_000_000), coturn=(False, True), embedded=(True, True)),
    "early in 20 writes": Case(run=dribbled, coturn=16, embedded=20),
    "pipelined behind bind": Case(run=pipelined_behind_bind, coturn=b"late", embedded=b"early, late"),
    "peer sends 1 MB and closes": Case(
        run=close_after(1_000_000, "peer"), coturn=Either("truncated", "reset"), embedded="fin"
    ),
    "client sends 1 MB and closes": Case(
        run=close_after(1_000_000, "client"), coturn=Either("truncated", "reset"), embedded="fin"
    ),
    "half-close": Case(
        run=half_close,
        coturn=(b"question", "reset", True),
        embedded=(b"question", "fin", (b"answer", "fin")),
    ),
    "peer resets": same(peer_reset, (b"", "reset")),
    "backpressure": same(backpressure, (True, True)),
    "unsigned bind": Case(run=failed_bind(unsigned), coturn=("reset", "reset"), embedded=((401, "fin"), GOOD)),
    "bind with a wrong password": Case(
        run=failed_bind(with_wrong_password), coturn=("reset", "reset"), embedded=((401, "fin"), GOOD)
    ),
    "bind with a stale nonce": Case(
        run=failed_bind(with_stale_nonce), coturn=("reset", "reset"), embedded=((438, "fin"), GOOD)
    ),
    "bind without an id": Case(run=failed_bind(without_id), coturn=("reset", GOOD), embedded=((400, "fin"), GOOD)),
    "bind of an unknown id": Case(run=bind_of_unknown_id, coturn="reset", embedded=(400, "fin")),
    "second bind": Case(run=second_bind, coturn=("reset", b"hello"), embedded=(400, b"hello")),
    "bind on the control connection": same(bind_on_control, 400),
    "many at once": same(many_at_once, (100, 100)),
    "binding": same(binding_request, True),
    "requests in one write": same(requests_in_one_write, [0, 0, 0]),
    "request byte by byte": same(request_byte_by_byte, 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_embedded(name: str) -> None:
    case = TABLE[name]
    with embedded(**case.embedded_options) as server:
        assert case.run((server.address, server.port)) == case.embedded


@pytest.mark.interop
@pytest.mark.needs("turnserver")
@pytest.mark.parametrize("name", TABLE)
def test_coturn(name: str) -> None:
    case = TABLE[name]
    with coturn(extra=case.coturn_options) as server:
        assert case.run((server.address, server.port)) == case.coturn
