"""UDP allocations from end to end: over UDP and TCP, by indications and channels, IPv4 and IPv6, with their bounds."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from discovery.model.addresses import TargetList
from tests.support.embedded_turn import Embedded, embedded
from tests.support.turn_client import Client, DatagramClient, code
from tests.support.waiting import wait_until
from turnreg.server import Limits
from turnreg.server.pace import ANSWER_BURST
from turnreg.stun.message import FAMILY_IPV6, TRANSPORT_UDP, Attribute, Message, MessageClass, Method

OVER = ("udp", "tcp")


@contextlib.contextmanager
def server(**more: Any) -> Iterator[Embedded]:
    options: dict[str, Any] = {"listen_udp": (("127.0.0.1", 0),), "udp_allocations": True} | more
    with embedded(**options) as running:
        yield running


def client_of(running: Embedded, over: str) -> Client:
    return DatagramClient(running.udp) if over == "udp" else Client((running.address, running.port))


@contextlib.contextmanager
def peer_socket(address: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 0))
        sock.settimeout(10)
        yield sock


def name_of(sock: socket.socket) -> tuple[str, int]:
    name = sock.getsockname()
    return name[0], name[1]


def dropped(running: Embedded, reason: str) -> float:
    return running.metric("crossnet_turn_datagrams_dropped_total", reason=reason)


@pytest.mark.parametrize("over", OVER)
class TestRelaying:
    def test_by_indications(self, over: str) -> None:
        with server() as running, client_of(running, over) as client, peer_socket() as peer:
            relayed = client.allocate(client.allocate_request(TRANSPORT_UDP))
            assert code(client.permit("127.0.0.1")) == 0
            for data in (b"to the peer", b"", bytes(1200), b"odd"):
                client.send_indication(name_of(peer), data)
                assert peer.recvfrom(4096) == (data, relayed)
                peer.sendto(data, relayed)
                assert client.data_indication() == (name_of(peer), data)
            assert running.metric("crossnet_turn_datagrams_total", direction="to_client") == 4
            assert running.metric("crossnet_turn_bytes_total", direction="to_peer") == 1214

    def test_by_channels(self, over: str) -> None:
        with server() as running, client_of(running, over) as client, peer_socket() as peer:
            relayed = client.allocate(client.allocate_request(TRANSPORT_UDP))
            assert code(client.channel_bind(0x4000, name_of(peer))) == 0
            for data in (b"abc", b"", bytes(1201), b"four"):
                frame = b"\x40\x00" + len(data).to_bytes(2, "big") + data
                client.send(frame + (bytes(-len(data) % 4) if over == "tcp" else b""))
                assert peer.recvfrom(4096) == (data, relayed)
                peer.sendto(data, relayed)
                assert client.channel_data() == (0x4000, data)

    def test_the_largest_datagram(self, over: str) -> None:
        data = bytes(65_000)
        with server() as running, client_of(running, over) as client, peer_socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            relayed = client.allocate(client.allocate_request(TRANSPORT_UDP))
            assert code(client.permit("127.0.0.1")) == 0
            client.send_indication(name_of(peer), data)
            assert peer.recvfrom(65_536) == (data, relayed)
            peer.sendto(data, relayed)
            assert client.data_indication() == (name_of(peer), data)

    def test_not_without_permission(self, over: str) -> None:
        with server() as running, client_of(running, over) as client, peer_socket() as peer, peer_socket() as other:
            relayed = client.allocate(client.allocate_request(TRANSPORT_UDP))
            client.send_indication(name_of(peer), b"early")
            assert wait_until(lambda: dropped(running, "no_permission") == 1)
            peer.sendto(b"early", relayed)
            assert wait_until(lambda: dropped(running, "no_permission") == 2)
            assert code(client.permit("127.0.0.1")) == 0
            other.sendto(b"any port", relayed)
            assert client.data_indication() == (name_of(other), b"any port")

    def test_gone_with_the_allocation(self, over: str) -> None:
        with server() as running, client_of(running, over) as client, peer_socket() as peer:
            relayed = client.allocate(client.allocate_request(TRANSPORT_UDP))
            assert code(client.refresh(0)) == 0
            assert wait_until(lambda: running.metric("crossnet_turn_allocations") == 0)
            peer.connect(relayed)
            with pytest.raises(ConnectionRefusedError):
                for _ in range(100):
                    peer.send(b"?")
                    peer.settimeout(0.05)
                    with contextlib.suppress(TimeoutError):
                        peer.recv(10)

    def test_expiry(self, over: str) -> None:
        with (
            server(limits=Limits(default_lifetime_s=0.2, max_lifetime_s=0.2)) as running,
            client_of(running, over) as client,
        ):
            client.allocate(client.allocate_request(TRANSPORT_UDP))
            assert wait_until(lambda: running.metric("crossnet_turn_allocations") == 0)

    def test_it_stays_if_refreshed_in_time(self, over: str) -> None:
        limits = Limits(default_lifetime_s=1.0, max_lifetime_s=5.0)
        with server(limits=limits) as running, client_of(running, over) as client, peer_socket() as peer:
            relayed = client.allocate(client.allocate_request(TRANSPORT_UDP))
            assert client.refresh(5).number(Attribute.LIFETIME) == 5
            with client_of(running, over) as short:
                short.allocate(short.allocate_request(TRANSPORT_UDP))
                assert wait_until(lambda: running.metric("crossnet_turn_allocations") == 1)
            client.permit("127.0.0.1")
            peer.sendto(b"still here", relayed)
            assert client.data_indication() == (name_of(peer), b"still here")

    def test_an_account_has_its_pace(self, over: str) -> None:
        limits = Limits(max_bytes_per_second_per_account=1000.0)
        with server(limits=limits) as running, client_of(running, over) as client, peer_socket() as peer:
            client.allocate(client.allocate_request(TRANSPORT_UDP))
            client.permit("127.0.0.1")
            for _ in range(5):
                client.send_indication(name_of(peer), bytes(600))
            assert wait_until(lambda: dropped(running, "pace") == 3)

    def test_an_even_port_and_the_one_above_it(self, over: str) -> None:
        with server() as running, client_of(running, over) as first, client_of(running, over) as second:
            first.login()
            request = first.allocate_request(TRANSPORT_UDP).with_bytes(Attribute.EVEN_PORT, b"\x80")
            answer = first.ask(request)
            relayed, token = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS), answer.get(Attribute.RESERVATION_TOKEN)
            assert relayed is not None
            assert token is not None
            assert relayed[1] % 2 == 0
            second.login()
            claim = second.allocate_request(TRANSPORT_UDP).with_bytes(Attribute.RESERVATION_TOKEN, token)
            assert second.ask(claim).xor_address(Attribute.XOR_RELAYED_ADDRESS) == (relayed[0], relayed[1] + 1)
            with client_of(running, over) as third:
                third.login()
                claim = third.allocate_request(TRANSPORT_UDP).with_bytes(Attribute.RESERVATION_TOKEN, token)
                assert code(third.ask(claim)) == 508

    def test_ipv6_from_an_ipv4_client(self, over: str) -> None:
        with (
            server(relay_addresses=("127.0.0.1", "::1")) as running,
            client_of(running, over) as client,
            peer_socket("::1") as peer,
        ):
            request = client.allocate_request(TRANSPORT_UDP)
            relayed = client.allocate(request.with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6))
            assert relayed[0] == "::1"
            assert code(client.permit("127.0.0.1")) == 443
            assert code(client.permit("::1")) == 0
            peer.sendto(b"hello", relayed)
            assert client.data_indication() == (name_of(peer), b"hello")


class TestOverUdp:
    def test_a_server_on_all_addresses_answers_from_the_one_that_was_asked(self) -> None:
        for anywhere, address in (("0.0.0.0", "127.0.0.9"), ("::", "::1")):
            # A connected socket takes no answer from elsewhere.
            with (
                server(listen_udp=((anywhere, 0),)) as running,
                DatagramClient((address, running.udp[1])) as client,
            ):
                assert code(client.ask(client.bare(Method.BINDING), sign=False)) == 0

    def test_two_clients_do_not_hear_each_other(self) -> None:
        with server() as running, DatagramClient(running.udp) as first, DatagramClient(running.udp) as second:
            relayed = [client.allocate(client.allocate_request(TRANSPORT_UDP)) for client in (first, second)]
            with peer_socket() as peer:
                for client, address, data in zip((first, second), relayed, (b"1", b"2"), strict=True):
                    client.permit("127.0.0.1")
                    peer.sendto(data, address)
                    assert client.data_indication()[1] == data

    def test_a_retransmitted_allocate_makes_no_second_one(self) -> None:
        with server() as running, DatagramClient(running.udp) as client:
            client.login()
            request = client.allocate_request(TRANSPORT_UDP)
            answers = [client.ask(request).xor_address(Attribute.XOR_RELAYED_ADDRESS) for _ in range(2)]
            assert answers[0] == answers[1]
            assert running.metric("crossnet_turn_allocations") == 1

    def test_garbage_is_dropped_in_silence(self) -> None:
        with server() as running, DatagramClient(running.udp) as client:
            for data in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\x40\0\0\5abc", b"\xff" * 100, bytes(20)):
                client.send(data)
            client.send(Message(Method.BINDING, MessageClass.SUCCESS, bytes(12)).pack())
            assert code(client.ask(client.bare(Method.BINDING), sign=False)) == 0
            assert dropped(running, "not_stun") == 6

    def test_a_defect_of_ours_ends_nobody_else(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken(TargetList):
            @property
            def networks(self) -> NoReturn:
                raise RuntimeError("a defect of ours")

        with server(allowed_peers=Broken()) as running, DatagramClient(running.udp) as client:
            client.allocate(client.allocate_request(TRANSPORT_UDP))
            request = client.bare(Method.CREATE_PERMISSION)
            request = request.with_xor_address(Attribute.XOR_PEER_ADDRESS, ("127.0.0.1", 0))
            client.send(client.credentials(request).pack(integrity_key=client.key))
            assert wait_until(lambda: "turn_datagram_error" in caplog.messages)
            assert code(client.ask(client.bare(Method.BINDING), sign=False)) == 0

    def test_a_stranger_is_answered_up_to_a_rate(self) -> None:
        """A forged source address must not be flooded. Other clients are still answered, and so is a client with the nonce."""
        with server() as running, DatagramClient(running.udp) as client:
            relayed = client.allocate(client.allocate_request(TRANSPORT_UDP))
            for _ in range(int(ANSWER_BURST) * 3):
                client.send(client.bare(Method.BINDING).pack())
            assert wait_until(lambda: dropped(running, "answer_rate") > ANSWER_BURST)
            assert relayed
            request = client.bare(Method.REFRESH).with_number(Attribute.LIFETIME, 600)
            client.send(client.credentials(request).pack(integrity_key=client.key))
            assert client.answer_to(request).message_class is MessageClass.SUCCESS

    def test_too_long_for_the_path_without_fragments(self) -> None:
        with server() as running, DatagramClient(running.udp) as client, peer_socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            client.allocate(client.allocate_request(TRANSPORT_UDP))
            client.permit("127.0.0.1")
            for dont_fragment in (True, False, True):  # loopback's MTU is 65,536 with 20 bytes of IP header in it
                client.send_indication(name_of(peer), bytes(1000), dont_fragment=dont_fragment)
                assert len(peer.recv(65_536)) == 1000

    def test_the_end_of_the_server_closes_every_port(self) -> None:
        with server() as running, DatagramClient(running.udp) as client:
            relayed = client.allocate(client.allocate_request(TRANSPORT_UDP))
        for address in (running.udp, relayed):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(address)

    def test_a_client_that_does_not_read_costs_datagrams_and_no_memory(self) -> None:
        """Over a stream: datagrams that do not fit into the kernel's buffers are dropped; the others arrive whole."""
        with server() as running, Client((running.address, running.port)) as client, peer_socket() as peer:
            relayed = client.allocate(client.allocate_request(TRANSPORT_UDP))
            client.permit("127.0.0.1")
            for number in range(10_000):
                peer.sendto(number.to_bytes(4, "big") * 300, relayed)
            seen = [0]
            while True:
                _, data = client.data_indication()
                assert data is not None
                if len(seen) > 50:
                    break
                number = int.from_bytes(data[:4], "big")
                assert data == number.to_bytes(4, "big") * 300
                seen.append(number)
            assert seen == sorted(seen)
            assert code(client.refresh(600)) == 0


def test_a_request_whose_answer_would_not_fit_is_dropped_without_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """A stranger must not be able to fill the log: a 420 would have to list thirty kilobytes of attribute types."""
    with server() as running, DatagramClient(running.udp) as client:
        request = client.bare(Method.BINDING)
        body = b"".join(kind.to_bytes(2, "big") + b"\0\0" for kind in range(0x1000, 0x4800))
        client.send(request.pack()[:2] + len(body).to_bytes(2, "big") + request.pack()[4:20] + body)
        assert wait_until(lambda: dropped(running, "not_stun") == 1)
        assert "turn_datagram_error" not in caplog.messages
