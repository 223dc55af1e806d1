"""Cases of the behaviour table about datagrams and the active Connect. Each takes the server's address and returns what it saw."""

import contextlib
import socket
from collections.abc import Iterator

from tests.support.turn_client import Client, DatagramClient, code, connect
from tests.turnreg.server.situations import Server
from turnreg.stun.message import TRANSPORT_TCP, TRANSPORT_UDP, Attribute, Message, MessageClass, Method


@contextlib.contextmanager
def udp(server: Server, kind: type[Client] = Client) -> Iterator[tuple[Client, socket.socket, tuple[str, int]]]:
    """A client with a UDP allocation, a peer, and the peer's address."""
    with kind(server) as client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        client.allocate(client.allocate_request(TRANSPORT_UDP))
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5)
        yield client, peer, peer.getsockname()


def by_indications(server: Server) -> object:
    with udp(server) as (client, peer, name):
        client.permit("127.0.0.1")
        client.send_indication(name, b"to the peer")
        data, source = peer.recvfrom(100)
        peer.sendto(b"to the client", client.relayed)
        return data, source == client.relayed, client.data_indication() == (name, b"to the client")


def by_channel(server: Server) -> object:
    with udp(server) as (client, peer, name):
        bound = code(client.channel_bind(0x4000, name))
        client.send(b"\x40\0\0\5hello\0\0\0")
        data = peer.recv(100)
        peer.sendto(b"odd", client.relayed)
        return bound, data, client.channel_data()


def over_udp(server: Server) -> object:
    with udp(server, DatagramClient) as (client, peer, name):
        bound = code(client.channel_bind(0x4000, name))
        client.send(b"\x40\0\0\5hello")
        data = peer.recv(100)
        peer.sendto(b"odd", client.relayed)
        return bound, data, client.channel_data()


def channel_numbers(server: Server) -> object:
    """Out of range at either end, bound to another peer, and a second channel for the peer."""
    with udp(server) as (client, _, name):
        other = (name[0], 9)
        return [
            code(client.channel_bind(channel, peer))
            for channel, peer in ((0x3FFF, name), (0x8000, name), (0x4000, name), (0x4000, other), (0x4001, name))
        ]


def without_permission(server: Server) -> object:
    """Nothing is relayed in either direction, and the client can continue."""
    with udp(server) as (client, peer, name):
        client.send_indication(name, b"?")
        peer.sendto(b"?", client.relayed)
        client.permit("127.0.0.1")
        client.send_indication(name, b"!")
        data = peer.recv(100)
        peer.sendto(b"!", client.relayed)
        return data, client.data_indication()[1]


def pair_of_ports(server: Server) -> object:
    with Client(server) as first, Client(server) as second:
        first.login()
        answer = first.ask(first.allocate_request(TRANSPORT_UDP).with_bytes(Attribute.EVEN_PORT, b"\x80"))
        relayed, token = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS), answer.get(Attribute.RESERVATION_TOKEN)
        assert relayed is not None
        second.login()
        claim = second.allocate_request(TRANSPORT_UDP).with_bytes(Attribute.RESERVATION_TOKEN, token or b"")
        claimed = second.ask(claim).xor_address(Attribute.XOR_RELAYED_ADDRESS)
        return relayed[1] % 2, claimed == (relayed[0], relayed[1] + 1)


def streams_over_udp(server: Server) -> object:
    with DatagramClient(server) as client:
        client.login()
        return code(client.ask(client.allocate_request(TRANSPORT_TCP)))


def allocate_again_over_udp(server: Server) -> object:
    """A retransmission gets the same address, another request 437."""
    with DatagramClient(server) as client:
        client.login()
        request = client.allocate_request(TRANSPORT_UDP)
        addresses = [client.ask(request).xor_address(Attribute.XOR_RELAYED_ADDRESS) for _ in range(2)]
        return addresses[0] == addresses[1], code(client.ask(client.allocate_request(TRANSPORT_UDP)))


def refresh_zero_over_udp(server: Server) -> object:
    with udp(server, DatagramClient) as (client, _, _name):
        return code(client.refresh(0)), code(client.refresh(600))


def challenge_size(server: Server) -> object:
    """The length of a 401 over UDP, relative to that of the shortest Allocate."""
    with DatagramClient(server) as client:
        request = client.allocate_request(TRANSPORT_UDP).pack()
        client.send(request)
        return len(client.sock.recv(2000)) <= 4 * len(request)


def connect_request(client: Client, peer: tuple[str, int]) -> Message:
    return client.bare(Method.CONNECT).with_xor_address(Attribute.XOR_PEER_ADDRESS, peer)


def active_connect(server: Server) -> object:
    """From the relayed address, without a permission. A second one to the same peer gets 446, one that is refused 447."""
    with Client(server) as client, socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client.allocate()
        answer = client.ask(connect_request(client, listener.getsockname()))
        assert answer.message_class is MessageClass.SUCCESS, answer.error
        peer, source = listener.accept()
        with peer, client.bind(answer) as data:
            peer.sendall(b"hello")
            seen = data.sock.recv(10)
            codes = [code(client.ask(connect_request(client, to.getsockname()))) for to in (listener, closed)]
            return source == client.relayed, seen, codes


def connect_beside_peers(server: Server) -> object:
    """Peers can still connect to an allocation that has connected to one."""
    with Client(server) as client, socket.create_server(("127.0.0.1", 0)) as listener:
        client.allocate()
        client.permit("127.0.0.1")
        answer = client.ask(connect_request(client, listener.getsockname()))
        peer, _ = listener.accept()
        with peer, client.bind(answer), connect(client.relayed) as other, client.bind(client.attempt()) as data:
            other.sendall(b"hello")
            return data.sock.recv(10)
