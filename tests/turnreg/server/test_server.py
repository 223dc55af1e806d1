"""The embedded server over real sockets: limits, ports, families, and its end."""

import asyncio
import contextlib
import hashlib
import resource
import select
import socket
import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from tests.support.embedded_turn import Embedded, embedded
from tests.support.turn_client import Client, code, connect, noise, read_all, until_refused
from tests.support.waiting import wait_until
from turnreg.server import Limits, TurnServer, TurnServerConfig
from turnreg.server.config import CLIENT_REQUESTS, MAX_REFUSALS, UNAUTHENTICATED_REQUESTS
from turnreg.stun.auth import rest_credentials
from turnreg.stun.message import FAMILY_IPV6, TRANSPORT_UDP, Attribute, Message, MessageClass, Method


def at(server: Embedded) -> tuple[str, int]:
    return server.address, server.port


class TestStrangers:
    def test_a_client_without_credentials_is_disconnected(self) -> None:
        with embedded(unauthenticated_timeout_s=0.2) as server, Client(at(server)) as idle, Client(at(server)) as busy:
            assert [code(busy.ask(busy.bare(Method.BINDING), sign=False)) for _ in range(3)] == [0, 0, 0]
            assert read_all(idle.sock) == (b"", "fin")
            assert wait_until(lambda: server.metric("crossnet_turn_refusals_total", reason="too_slow") == 2)
            assert wait_until(lambda: server.metric("crossnet_turn_connections", state="unauthenticated") == 0)

    def test_a_client_with_an_allocation_stays(self) -> None:
        with (
            embedded(unauthenticated_timeout_s=0.2) as server,
            Client(at(server)) as client,
            Client(at(server)) as idle,
        ):
            client.allocate()
            assert read_all(idle.sock) == (b"", "fin")
            assert code(client.refresh(600)) == 0

    def test_a_client_with_a_stream_stays(self) -> None:
        with embedded(unauthenticated_timeout_s=0.2) as server, Client(at(server)) as client:
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer, client.bind(client.attempt()) as data, Client(at(server)) as idle:
                assert read_all(idle.sock) == (b"", "fin")
                peer.sendall(b"hello")
                assert data.sock.recv(10) == b"hello"

    def test_the_oldest_is_closed_when_there_are_too_many(self) -> None:
        with embedded(max_unauthenticated=2) as server, Client(at(server)) as first, Client(at(server)) as second:
            assert code(first.ask(first.bare(Method.BINDING), sign=False)) == 0
            assert code(second.ask(second.bare(Method.BINDING), sign=False)) == 0
            with Client(at(server)) as third:
                third.allocate()
                assert read_all(first.sock) == (b"", "reset")
                second.allocate()
            assert server.metric("crossnet_turn_refusals_total", reason="crowded_out") == 1

    @pytest.mark.parametrize(
        "data", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0\1\xff\xff"]
    )
    def test_a_client_of_another_protocol_is_disconnected(self, data: bytes) -> None:
        with embedded() as server, Client(at(server)) as client:
            client.send(data)
            assert read_all(client.sock)[0] == b""
            assert server.metric("crossnet_turn_refusals_total", reason="not_stun") == 1

    def test_a_client_that_guesses_passwords_is_disconnected(self) -> None:
        with embedded() as server, Client(at(server), password="wrong") as client:
            answers = [client.ask(client.allocate_request()) for _ in range(MAX_REFUSALS)]
            assert {code(answer) for answer in answers} == {401}
            assert read_all(client.sock) == (b"", "fin")

    def test_a_client_that_does_not_read_is_disconnected(self) -> None:
        with embedded(send_timeout_s=0.2) as server:
            # One of the usual size takes tens of thousands of answers to fill: on a busy machine longer than the client waits.
            server.server._listening.tcp[0]._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            with Client(at(server), receive_buffer=4096) as client:
                client.allocate()
                requests = (
                    client.bare(Method.REFRESH).pack() * 100
                )  # 20 bytes, a challenge of 150 is the answer to each
                with pytest.raises((ConnectionResetError, BrokenPipeError)):
                    for _ in range(10_000):
                        client.send(requests)
                assert until_refused(client.relayed)
                assert wait_until(lambda: server.metric("crossnet_turn_allocations") == 0)


class TestFloods:
    """A client that sends too many requests delays no other client, and is disconnected with a reason."""

    BINDING = Message(Method.BINDING, MessageClass.REQUEST, bytes(12)).pack()

    def test_a_stranger_that_pipelines_is_cut(self) -> None:
        with embedded() as server, Client(at(server)) as flood, Client(at(server)) as other:
            flood.send(self.BINDING * 10_000)
            assert code(other.ask(other.bare(Method.BINDING), sign=False)) == 0
            answers, end = read_all(flood.sock)
            assert end == "reset"
            assert 0 < len(answers) < 10_000
            assert server.metric("crossnet_turn_refusals_total", reason="flood") == 1

    def test_indications_without_an_answer_count(self) -> None:
        indication = Message(Method.BINDING, MessageClass.INDICATION, bytes(12)).pack()
        with embedded() as server, Client(at(server)) as flood:
            flood.send(indication * 1000)
            assert read_all(flood.sock)[1] in ("fin", "reset")
            assert server.metric("crossnet_turn_refusals_total", reason="flood") == 1

    def test_a_client_with_an_allocation_has_a_limit_of_its_own(self) -> None:
        with embedded() as server, Client(at(server)) as client:
            relayed = client.allocate()
            refresh = client.bare(Method.BINDING)
            for _ in range(int(UNAUTHENTICATED_REQUESTS[1]) * 2):
                assert code(client.ask(refresh, sign=False)) == 0
            client.send(self.BINDING * 5000)
            assert read_all(client.sock)[1] == "reset"
            assert until_refused(relayed)

    def test_payload_is_not_counted(self) -> None:
        """Payload to peers is limited only by the pace of the account."""
        with (
            embedded(udp_allocations=True) as server,
            Client(at(server)) as client,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
        ):
            peer.bind(("127.0.0.1", 0))
            peer.settimeout(5)
            client.allocate(client.allocate_request(TRANSPORT_UDP))
            client.permit("127.0.0.1")
            for number in range(int(CLIENT_REQUESTS[1]) * 2):
                client.send_indication(peer.getsockname(), b"%d" % number)
                assert peer.recv(100) == b"%d" % number
            assert code(client.refresh(600)) == 0

    def test_the_time_limit_holds_for_a_client_that_keeps_sending(self) -> None:
        """A client that keeps sending at an allowed rate is still disconnected."""
        with embedded(unauthenticated_timeout_s=0.5) as server, Client(at(server)) as client:
            ended = False
            try:
                for _ in range(1000):
                    for half in (self.BINDING[:10], self.BINDING[10:]):
                        client.send(half)
                        readable, _, _ = select.select([client.sock], [], [], 0.01)
                        ended = ended or bool(readable and not client.sock.recv(1000))
                    if ended:
                        break
            except OSError:
                ended = True
            assert ended
            assert server.metric("crossnet_turn_refusals_total", reason="too_slow") + server.metric(
                "crossnet_turn_refusals_total", reason="flood"
            )

    def test_a_flood_of_datagrams_does_not_delay_connections(self) -> None:
        with embedded(listen_udp=(("127.0.0.1", 0),)) as server, Client(at(server)) as client:
            stop = threading.Event()

            def flood() -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.connect(server.udp)
                    while not stop.is_set():
                        with contextlib.suppress(OSError):
                            sock.send(self.BINDING)

            flooding = threading.Thread(target=flood)
            flooding.start()
            try:
                client.allocate()
                assert code(client.refresh(600)) == 0
            finally:
                stop.set()
                flooding.join()


class TestPeers:
    def test_a_peer_that_is_not_bound_in_time_is_reset(self) -> None:
        with embedded(limits=Limits(bind_timeout_s=0.2)) as server, Client(at(server)) as client:
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer:
                attempt = client.attempt()
                assert server.metric("crossnet_turn_connections", state="unbound") == 1
                assert read_all(peer) == (b"", "reset")
            assert server.metric("crossnet_turn_refusals_total", reason="peer_not_bound") == 1
            assert server.metric("crossnet_turn_connections", state="unbound") == 0
            with client.open_data() as data:
                assert code(data.ask(data.bind_request(attempt.get(Attribute.CONNECTION_ID) or b""))) == 400

    def test_the_oldest_goes_when_too_many_wait(self) -> None:
        """A stranger behind the relay's NAT that only connects must not keep the relay out."""
        with embedded(limits=Limits(max_unbound_per_allocation=2)) as server, Client(at(server)) as client:
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as first, connect(client.relayed) as second:
                attempts = [client.attempt(), client.attempt()]
                with connect(client.relayed):
                    client.attempt()
                    assert read_all(first) == (b"", "reset")
                    assert server.metric("crossnet_turn_refusals_total", reason="peer_limit") == 1
                    with client.bind(attempts[1]) as data:
                        second.sendall(b"hello")
                        assert data.sock.recv(10) == b"hello"

    def test_a_client_that_is_lost_while_it_binds(self) -> None:
        with embedded() as server, Client(at(server)) as client:
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer:
                client.bind(client.attempt()).sock.close()
                assert read_all(peer)[0] == b""
            assert wait_until(lambda: server.metric("crossnet_turn_connections", state="bound") == 0)
            assert code(client.refresh(600)) == 0

    @pytest.mark.parametrize("permitted", ["127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0"])
    def test_refused_addresses(self, permitted: str) -> None:
        with embedded(allowed_peers=()) as server, Client(at(server)) as client:
            client.allocate()
            assert code(client.permit(permitted)) == 403

    def test_bulk_both_ways_at_once(self) -> None:
        """More than any buffer holds, so that both directions are spliced and have to pause."""
        up, down = noise(24_000_000), noise(24_000_000)
        got: dict[str, str] = {}

        def read(name: str, sock: socket.socket) -> None:
            data, end = read_all(sock)
            got[name] = hashlib.sha256(data).hexdigest() + end

        def write(sock: socket.socket, data: bytes) -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        with embedded() as server, Client(at(server)) as client:
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer, client.bind(client.attempt()) as bound:
                data = bound.sock
                readers = [
                    threading.Thread(target=read, args=("up", data)),
                    threading.Thread(target=read, args=("down", peer)),
                    threading.Thread(target=write, args=(data, down)),
                ]
                for thread in readers:
                    thread.start()
                write(peer, up)
                for thread in readers:
                    thread.join()
            assert got == {
                "up": hashlib.sha256(up).hexdigest() + "fin",
                "down": hashlib.sha256(down).hexdigest() + "fin",
            }
            assert wait_until(lambda: server.metric("crossnet_turn_connections", state="bound") == 0)
            assert server.metric("crossnet_turn_bytes_total", direction="to_client") == 24_000_000
            assert server.metric("crossnet_turn_bytes_total", direction="to_peer") == 24_000_000


class TestPorts:
    def test_busy_ports_are_skipped_and_none_left_is_508(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as busy:
            port = busy.getsockname()[1]
            with embedded(ports=(port, port)) as server, Client(at(server)) as client:
                client.login()
                answer = client.ask(client.allocate_request())
                assert code(answer) == 508
                assert answer.verify_integrity(client.key)
                busy.close()
                assert code(client.ask(client.allocate_request())) == 0

    def test_a_port_is_free_again_when_its_allocation_ends(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with embedded(ports=(port, port)) as server, Client(at(server)) as second:
            with Client(at(server)) as first:
                assert first.allocate() == ("127.0.0.1", port)
                second.login()
                assert code(second.ask(second.allocate_request())) == 508
            assert until_refused(("127.0.0.1", port))
            assert wait_until(lambda: code(second.ask(second.allocate_request())) == 0)


class TestFamilies:
    def test_ipv6_relay_over_an_ipv4_control_connection(self) -> None:
        with embedded(relay_addresses=("127.0.0.1", "::1")) as server, Client(at(server)) as client:
            client.login()
            request = client.allocate_request().with_first_byte(Attribute.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6)
            relayed = client.ask(request).xor_address(Attribute.XOR_RELAYED_ADDRESS)
            assert relayed is not None
            assert relayed[0] == "::1"
            assert code(client.permit("127.0.0.1")) == 443
            assert code(client.permit("::ffff:127.0.0.1")) == 403
            assert code(client.permit("::1")) == 0
            with connect(relayed, source="::1") as peer:
                attempt = client.attempt()
                assert attempt.xor_address(Attribute.XOR_PEER_ADDRESS) == peer.getsockname()[:2]
                with client.bind(attempt) as data:
                    data.sock.sendall(b"over IPv6")
                    assert peer.recv(20) == b"over IPv6"

    def test_ipv4_relay_over_an_ipv6_control_connection(self) -> None:
        with embedded(address="::1") as server, Client(at(server)) as client:
            assert client.allocate()[0] == "127.0.0.1"


class TestRest:
    def test_a_valid_rest_name(self) -> None:
        username, password = rest_credentials("north", "gw", time.time() + 60)
        with (
            embedded(users={}, secrets=("south", "north")) as server,
            Client(at(server), user=username, password=password) as client,
        ):
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed), client.bind(client.attempt()):
                pass
            client.user, client.password = rest_credentials("south", "gw", time.time() + 90)
            assert code(client.refresh(600)) == 0

    def test_an_expired_rest_name(self) -> None:
        username, password = rest_credentials("north", "gw", time.time() - 1)
        with (
            embedded(users={}, secrets=("north",)) as server,
            Client(at(server), user=username, password=password) as client,
        ):
            client.login()
            assert code(client.ask(client.allocate_request())) == 401


class TestEnd:
    def test_stopping_cuts_what_runs(self) -> None:
        with embedded() as server:
            client = Client(at(server))
            client.allocate()
            client.permit("127.0.0.1")
            peer, waiting = connect(client.relayed), connect(client.relayed)
            data = client.bind(client.attempt())
            stranger = Client(at(server))
            stranger.ask(stranger.bare(Method.BINDING), sign=False)
        assert read_all(peer)[1] == "reset"
        assert read_all(waiting)[1] == "reset"
        assert read_all(data.sock)[1] == "reset"
        assert read_all(client.sock)[1] in ("fin", "reset")
        assert read_all(stranger.sock)[1] in ("fin", "reset")
        for address in (client.relayed, at(server)):
            with pytest.raises(ConnectionRefusedError):
                connect(address)
        for sock in (peer, waiting, data.sock, client.sock, stranger.sock):
            sock.close()

    @pytest.mark.anyio
    async def test_a_relay_address_that_is_not_ours(self) -> None:
        config = TurnServerConfig(
            listen=(("127.0.0.1", 0),), relay_addresses=("192.0.2.7",), realm="lab", users={"u": "p"}
        )
        with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.7"):
            await TurnServer.open(config)

    @pytest.mark.anyio
    async def test_an_address_that_is_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as busy:
            config = TurnServerConfig(
                listen=(("127.0.0.1", 0), busy.getsockname()),
                relay_addresses=("127.0.0.1",),
                realm="lab",
                users={"u": "p"},
            )
            with pytest.raises(OSError, match=f"port {busy.getsockname()[1]}"):
                await TurnServer.open(config)

    @pytest.mark.anyio
    async def test_serving_ends_with_its_block(self) -> None:
        config = TurnServerConfig(
            listen=(("127.0.0.1", 0), ("127.0.0.1", 0)), relay_addresses=("127.0.0.1",), realm="lab", users={"u": "p"}
        )
        with pytest.raises(LookupError):
            async with TurnServer.serving(config, registry=CollectorRegistry()) as server:
                first, second = server.addresses
                for address in (first, second):
                    _, writer = await asyncio.open_connection(*address)
                    writer.close()
                    await writer.wait_closed()
                assert server.allocations == 0
                raise LookupError
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*first)


def test_few_open_files_are_said_at_the_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _limit: (1024, 1024))
    with embedded():
        assert "1024 open files are allowed" in caplog.text
