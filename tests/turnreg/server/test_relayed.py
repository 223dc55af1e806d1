"""The active Connect, pace, NAT, TLS and drain, over real sockets."""

import shutil
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.support.embedded_turn import embedded
from tests.support.turn_client import Client, code, connect, noise, read_all
from tests.support.waiting import wait_until
from tests.turnreg.server.test_server import at
from turnreg.server import Limits
from turnreg.stun.message import Attribute, MessageClass, Method

CA = trustme.CA()


class TestConnect:
    def test_to_a_peer_from_the_relayed_port(self) -> None:
        with (
            embedded(active_connect=True) as server,
            Client(at(server)) as client,
            socket.create_server(("127.0.0.1", 0)) as listener,
        ):
            client.allocate()
            request = client.bare(Method.CONNECT).with_xor_address(Attribute.XOR_PEER_ADDRESS, listener.getsockname())
            answer = client.ask(request)
            assert answer.message_class is MessageClass.SUCCESS
            peer, name = listener.accept()
            with peer, client.bind(answer) as data:
                assert name == client.relayed
                peer.sendall(b"from the peer")
                assert data.sock.recv(100) == b"from the peer"
                data.sock.sendall(b"from the client")
                assert peer.recv(100) == b"from the client"
                assert (
                    code(
                        client.ask(
                            client.bare(Method.CONNECT).with_xor_address(
                                Attribute.XOR_PEER_ADDRESS, listener.getsockname()
                            )
                        )
                    )
                    == 446
                )
                # Peers still come by themselves to the same port.
                client.permit("127.0.0.1")
                with connect(client.relayed) as other, client.bind(client.attempt()) as second:
                    other.sendall(b"hello")
                    assert second.sock.recv(10) == b"hello"
            assert wait_until(lambda: server.metric("crossnet_turn_connections", state="bound") == 0)
            assert code(client.ask(request)) == 0  # the first is over

    def test_a_peer_that_refuses(self) -> None:
        with embedded(active_connect=True) as server, Client(at(server)) as client:
            client.allocate()
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                request = client.bare(Method.CONNECT).with_xor_address(Attribute.XOR_PEER_ADDRESS, closed.getsockname())
                answer = client.ask(request)
                assert code(answer) == 447
                assert answer.verify_integrity(client.key)
                assert code(client.ask(request)) == 447
            assert server.metric("crossnet_turn_refusals_total", reason="connect_failed") == 2

    def test_a_peer_that_does_not_answer(self) -> None:
        with (
            embedded(active_connect=True, limits=Limits(connect_timeout_s=0.2)) as server,
            Client(at(server)) as client,
            socket.socket() as full,
        ):
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            with connect(full.getsockname()):  # its backlog is full now: SYNs are dropped
                client.allocate()
                request = client.bare(Method.CONNECT).with_xor_address(Attribute.XOR_PEER_ADDRESS, full.getsockname())
                assert code(client.ask(request)) == 447

    def test_one_relayed_port_has_one_allocation(self) -> None:
        """Although the port is shared with our own outgoing connections, nobody else can listen on it."""
        with embedded(active_connect=True) as server, Client(at(server)) as client, socket.socket() as thief:
            client.allocate()
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                thief.bind(client.relayed)


class TestPace:
    def test_a_stream_is_slowed_down_and_loses_nothing(self) -> None:
        limits = Limits(max_bytes_per_second_per_account=1_000_000.0)
        with embedded(limits=limits) as server, Client(at(server)) as client:
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer, client.bind(client.attempt()) as data:
                payload = noise(1_500_000)
                began = time.monotonic()
                peer.sendall(payload)
                peer.shutdown(socket.SHUT_WR)
                assert read_all(data.sock) == (payload, "fin")
                assert time.monotonic() - began > 0.4  # 1 MB at once, half a second for the rest


class TestNat:
    def test_clients_get_the_advertised_address(self) -> None:
        with embedded(advertised={"127.0.0.1": "203.0.113.7"}) as server, Client(at(server)) as client:
            address, port = client.allocate()
            assert address == "203.0.113.7"
            client.permit("127.0.0.1")
            with connect(("127.0.0.1", port)):
                assert client.attempt().xor_address(Attribute.XOR_PEER_ADDRESS) is not None

    def test_the_advertised_address_counts_as_our_own(self) -> None:
        options: dict[str, Any] = {"advertised": {"127.0.0.1": "203.0.113.7"}, "udp_allocations": True}
        with embedded(**options) as server, Client(at(server)) as client:
            client.allocate(client.allocate_request(17))
            assert code(client.permit("203.0.113.7")) == 403
            assert code(client.permit("203.0.113.8")) == 0


class TlsClient(Client):
    """A blocking client over TLS."""

    def __init__(self, server: tuple[str, int], **more: Any) -> None:
        super().__init__(server, **more)
        context = ssl.create_default_context()
        context.set_alpn_protocols(["stun.turn"])
        CA.configure_trust(context)
        self.sock = context.wrap_socket(self.sock, server_hostname="127.0.0.1")

    def open_data(self) -> "Client":
        return TlsClient(self.server, user=self.user, password=self.password, realm=self.realm, nonce=self.nonce)

    @property
    def tls(self) -> ssl.SSLSocket:
        assert isinstance(self.sock, ssl.SSLSocket)
        return self.sock


def certificate(directory: Path) -> dict[str, Path]:
    issued = CA.issue_cert("127.0.0.1")
    cert, key = directory / "cert.pem", directory / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    return {"tls_cert": cert, "tls_key": key}


class TestTls:
    def options(self, tmp_path: Path) -> dict[str, Any]:
        return {"listen_tls": (("127.0.0.1", 0),), **certificate(tmp_path)}

    def test_a_stream_with_both_ends(self, tmp_path: Path) -> None:
        with embedded(**self.options(tmp_path)) as server, TlsClient(server.tls) as client:
            assert client.tls.selected_alpn_protocol() == "stun.turn"
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer, client.bind(client.attempt()) as data:
                up, down = noise(300_000), noise(300_000)
                peer.sendall(down)
                peer.shutdown(socket.SHUT_WR)
                assert read_all(data.sock) == (down, "fin")
                data.sock.sendall(up)
                assert isinstance(data.sock, ssl.SSLSocket)
                data.sock.unwrap()  # close_notify: an end, where a bare FIN would be a cut
                assert read_all(peer) == (up, "fin")

    def test_control_over_tls_and_data_over_tcp(self, tmp_path: Path) -> None:
        with embedded(**self.options(tmp_path)) as server, TlsClient(server.tls) as client:
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer, Client(at(server), nonce=client.nonce) as data:
                request = data.bind_request(client.attempt().get(Attribute.CONNECTION_ID) or b"")
                assert code(data.ask(request)) == 0
                peer.sendall(b"hello")
                assert data.sock.recv(10) == b"hello"

    def test_a_client_without_tls(self, tmp_path: Path) -> None:
        with embedded(**self.options(tmp_path)) as server, Client(server.tls) as client:
            client.send(client.bare(Method.BINDING).pack())
            assert read_all(client.sock)[1] != "silence"
            assert wait_until(lambda: server.metric("crossnet_turn_refusals_total", reason="tls_failed") == 1)

    def test_a_handshake_that_never_comes(self, tmp_path: Path) -> None:
        with (
            embedded(unauthenticated_timeout_s=0.2, **self.options(tmp_path)) as server,
            Client(server.tls) as client,
        ):
            assert read_all(client.sock)[1] != "silence"
            assert server.metric("crossnet_turn_connections", state="unauthenticated") == 0

    def test_old_tls_is_refused(self, tmp_path: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with embedded(**self.options(tmp_path)) as server, pytest.raises(ssl.SSLError):
            context.wrap_socket(connect(server.tls))

    def test_a_new_certificate_is_used(self, tmp_path: Path) -> None:
        with embedded(certificate_poll_s=0.05, **self.options(tmp_path)) as server, TlsClient(server.tls) as client:
            first = client.tls.getpeercert(binary_form=True)
            (tmp_path / "next").mkdir()
            for path in certificate(tmp_path / "next").values():
                shutil.copy(path, tmp_path / path.name)

            def shown() -> bytes | None:
                with TlsClient(server.tls) as other:
                    return other.tls.getpeercert(binary_form=True)

            assert wait_until(lambda: shown() != first)
            client.allocate()  # who was connected before stays


class TestDrain:
    def test_no_new_allocations_but_existing_ones_keep_working(self) -> None:
        with embedded() as server, Client(at(server)) as client, Client(at(server)) as late:
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer, client.bind(client.attempt()) as data:
                server.loop.call_soon_threadsafe(server.server.drain)
                late.login()  # by the answer the loop has been round
                assert server.server.streams == 1
                assert code(late.ask(late.allocate_request())) == 508
                assert server.metric("crossnet_turn_refusals_total", reason="draining") == 1
                assert code(client.refresh(600)) == 0
                peer.sendall(b"still here")
                assert data.sock.recv(100) == b"still here"
            assert wait_until(lambda: server.server.streams == 0)
