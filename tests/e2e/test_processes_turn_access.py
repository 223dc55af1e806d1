"""Changes of `gateway.turn` in a running gateway, and limits on where other networks' TURN records lead it, with real processes."""

import contextlib
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from discovery.api.tokens import format_entry, make_entry, make_token
from discovery.model.mesh import Kind
from sniproxy.engine import SocketStream
from tests.support.processes import Loopback, Mesh, running_mesh
from tests.support.running import Running, free_port, running
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

Document = dict[str, Any]


def rewrite(path: Path, **turn: Any) -> None:
    """Replace `gateway.turn` in a gateway's file, atomically."""
    document = yaml.safe_load(path.read_text())
    document["gateway"]["turn"] = turn
    (path.parent / "new").write_text(yaml.safe_dump(document))
    os.replace(path.parent / "new", path)


async def test_credentials_networks_and_cas_change_without_interrupting_streams(tmp_path: Path) -> None:
    async def echo(stream: SocketStream) -> None:
        with contextlib.suppress(OSError):
            while data := await stream.recv(65536):
                await stream.send(data)

    loopback = ["127.0.0.0/8"]
    by_secret = {"secret": {"file": "gw.secret"}, "allow": loopback}

    def begin(document: Document) -> None:
        document["gateway"]["turn"] = {"a": by_secret}

    def two_secrets(document: Document) -> None:
        document["turn"]["secret"] = [document["turn"]["secret"], {"file": "second.secret"}]

    (tmp_path / "second.secret").write_text("a second secret")
    (tmp_path / "gw.secret").write_text("replaced below")
    mesh = Mesh(tmp_path, Loopback(), changes={"gateway": begin, "turn": two_secrets})
    (tmp_path / "gw.secret").write_text(mesh.turn_secret)
    with running_mesh(mesh):
        gateway = mesh._parts.path("gateway")
        reads = 0

        async def apply(what: str) -> dict[str, Any]:
            """Wait until the gateway has read its file, and check that it has applied the change."""
            nonlocal reads
            reads += 1
            await mesh.eventually(what, lambda: len(mesh.events("gateway", "config_read")) >= reads)
            read = mesh.events("gateway", "config_read")[-1]
            assert (read["applied"], read["restart_needed"]) == (["gateway.turn"], []), what
            return read

        def ports() -> set[int]:
            return {line["relayed"][1] for line in mesh.registrations()}

        async with mesh.serving(echo) as port:
            clients = [await mesh.dial(mesh.name(port))]
            hello = await clients[0].recv(65536)
            assert hello

            async def all_live() -> None:
                for client in clients:
                    await client.send(b"still here")
                    assert await client.recv(100) == b"still here"

            async def one_more() -> None:
                """Open another stream, and check all."""
                client = await mesh.dial(mesh.name(port))
                assert await client.recv(65536)
                clients.append(client)
                await all_live()

            first = ports()
            assert len(first) == 2
            # The file of a secret is replaced: there is a new allocation, and the old one stays with its streams.
            (tmp_path / "gw.secret.new").write_text("a second secret")
            os.replace(tmp_path / "gw.secret.new", tmp_path / "gw.secret")
            await apply("a secret's file")
            await mesh.eventually("new allocations", lambda: len(ports()) == 2 and not ports() & first)
            await mesh.eventually("the relay has the new records", mesh.converged)
            await one_more()
            second = ports()
            # A network is added and removed; allocations for the other network do not change.
            rewrite(gateway, a=by_secret, c={"issue": True})
            mesh["gateway"].send_signal(signal.SIGHUP)
            await apply("an added network")
            await mesh.eventually(
                "network c is in the status",
                lambda: any(line["via"] == "c" for line in mesh.ask("gateway", "/status")["registrations"]),
            )
            rewrite(gateway, a=by_secret)
            mesh["gateway"].send_signal(signal.SIGHUP)
            await apply("a removed network")
            assert ports() == second
            await one_more()
            # The CA changes: new allocations are made with it.
            rewrite(gateway, a=by_secret | {"ca": "ca.pem"})
            mesh["gateway"].send_signal(signal.SIGHUP)
            await apply("a CA")
            await mesh.eventually("new allocations", lambda: len(ports()) == 2 and not ports() & second)
            await mesh.eventually("the relay has the new records", mesh.converged)
            await one_more()
            third = ports()
            # The server refuses the new credentials: the existing allocations stay in use.
            (tmp_path / "bad.secret").write_text("none of theirs")
            rewrite(gateway, a={"secret": {"file": "bad.secret"}, "allow": loopback})
            mesh["gateway"].send_signal(signal.SIGHUP)
            await apply("a wrong secret")
            await mesh.eventually("a refusal", lambda: mesh.events("gateway", "registration_failed"))
            assert ports() == third
            await one_more()
            # Other pinned addresses: the records are withdrawn, and streams stay. Changed back, the same allocations are used.
            rewrite(gateway, a=by_secret | {"ca": "ca.pem", "allow": ["10.0.0.0/8"]})
            mesh["gateway"].send_signal(signal.SIGHUP)
            await apply("a pinned address")
            await mesh.eventually("the records are withdrawn", lambda: not mesh.registrations())
            states = {line["state"] for line in mesh.ask("gateway", "/status")["registrations"]}
            assert states <= {"refused_address", "waiting", "registering"}
            await all_live()
            rewrite(gateway, a=by_secret | {"ca": "ca.pem"})
            mesh["gateway"].send_signal(signal.SIGHUP)
            await apply("the previous addresses")
            await mesh.eventually("the same allocations", lambda: ports() == third)
            await mesh.eventually("the relay has the new records", mesh.converged)
            await one_more()
            # The network through which all streams came is removed: the streams stay.
            rewrite(gateway)
            mesh["gateway"].send_signal(signal.SIGHUP)
            await apply("no network")
            await mesh.eventually("the records are withdrawn", lambda: not mesh.registrations())
            await all_live()


def test_a_first_network_is_added_to_a_gateway(tmp_path: Path, stranger: "Port") -> None:
    with contextlib.ExitStack() as stack:
        harness = Harness(tmp_path, stack, {}, PIN)
        harness.publish_turn(f"turn:127.0.0.1:{stranger.port}")
        file = tmp_path / "gateway.yaml"
        turn = yaml.safe_load(file.read_text())["gateway"]["turn"]
        rewrite(file)
        harness.gateway.process.send_signal(signal.SIGHUP)
        assert harness.gateway.wait_for("config_read")["applied"] == ["gateway.turn"]
        harness.until("ready without a network", lambda: harness.gateway.ask("/readyz")[0] == 200)
        without = file.read_text()
        second = stack.enter_context(running(tmp_path, without.replace("gw-1", "gw-2"), name="second"))
        harness.until("the second one is ready without a network too", lambda: second.ask("/readyz")[0] == 200)
        rewrite(tmp_path / "second.yaml", **turn)
        before = stranger.connects
        second.process.send_signal(signal.SIGHUP)
        assert second.wait_for("config_read")["applied"] == ["gateway.turn"]
        harness.until("an attempt", lambda: second.events("registration_failed") and stranger.connects > before)
        assert second.ask("/readyz")[0] == 503


class Port:
    """A port that does not speak TURN, and counts connections."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listening.getsockname()[1])
        self.connects = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._count)
        self._thread.start()

    def _count(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.listening, selectors.EVENT_READ)
            while not self._ended.is_set():
                if selector.select(0.1):
                    connection, _ = self.listening.accept()
                    self.connects += 1
                    connection.sendall(b"-ERR unknown command\r\n")
                    connection.close()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self.listening.close()


@pytest.fixture
def stranger() -> Iterator[Port]:
    port = Port()
    yield port
    port.close()


class Harness:
    """A gateway of network b, a discovery server, and network c's token for writing records of TURN servers."""

    def __init__(
        self,
        folder: Path,
        stack: contextlib.ExitStack,
        services: dict[str, Any],
        access: Document,
        discovery: str = "127.0.0.1",
    ) -> None:
        self.folder = folder
        self.port = free_port()
        tokens = {network: make_token() for network in ("b", "c")}
        entries = []
        for network, token in tokens.items():
            (folder / f"{network}.token").write_text(token)
            entry = make_entry(token, name=network, network=network, kinds=list(Kind), names=["**"])
            entries.append(format_entry(entry))
        (folder / "tokens.yaml").write_text("\n".join(entries))
        server = {
            "network": "b",
            "admin": "127.0.0.1:0",
            "discovery_server": {
                "listen": f"127.0.0.1:{self.port}",
                "tokens": {"file": "tokens.yaml"},
                "allow_addresses": ["127.0.0.0/8"],
            },
        }
        stack.enter_context(running(folder, yaml.safe_dump(server), name="discovery")).started()
        (folder / "secret").write_text("a secret")
        gateway = {
            "network": "b",
            "discovery": f"http://{discovery}:{self.port}",
            "token": {"file": "b.token"},
            "admin": "127.0.0.1:0",
            "drain": 0,
            "gateway": {
                "id": "gw-1",
                "allow": ["127.0.0.0/8"],
                "turn": {"c": {"secret": {"file": "secret"}} | access},
            },
        }
        for name, spec in services.items():
            self.put("b", Kind.SERVICE, name, spec)
        self.gateway: Running = stack.enter_context(running(folder, yaml.safe_dump(gateway), name="gateway"))
        self.gateway.started()

    def put(self, network: str, kind: Kind, id_: str, spec: Document) -> None:
        """Write a record with the network's token."""
        token = (self.folder / f"{network}.token").read_text()
        body = json.dumps({"spec": spec})
        with socket.create_connection(("127.0.0.1", self.port), 10) as server:
            request = (
                f"PUT /v1/records/{kind.value}/{network}/{id_} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}"
            )
            server.sendall(request.encode())
            answer = server.makefile("rb").read()
        assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")), answer

    def publish_turn(self, url: str, id_: str = "turn-1") -> None:
        """Write a TURN record of network c with this URL."""
        self.put("c", Kind.TURN, id_, {"url": url, "relay_addresses": ["127.0.0.1"], "port_min": 1, "port_max": 65535})

    def lines(self, reason: str) -> list[Document]:
        return [line for line in self.gateway.events("registration_failed") if line["reason"] == reason]

    def until(self, what: str, holds: Any) -> None:
        wait_until(holds, what=what, details=lambda: self.gateway.log.read_text()[-3000:])


PIN = {"allow": ["127.0.0.0/8"]}


def test_a_turn_record_that_names_our_service_causes_no_connection(tmp_path: Path, stranger: Port) -> None:
    with contextlib.ExitStack() as stack:
        endpoint = {"name": "redis.shop.example", "ports": {"443": [f"127.0.0.1:{stranger.port}"]}}
        harness = Harness(tmp_path, stack, {"redis": endpoint}, PIN)
        admin = harness.gateway.started()["admin"][0]
        harness.publish_turn(f"turn:127.0.0.1:{stranger.port}", "turn-1")
        harness.publish_turn(f"turn:127.0.0.1:{harness.port}", "turn-2")
        harness.publish_turn(f"turn:{admin}", "turn-3")
        harness.publish_turn(f"turn:localhost:{stranger.port}", "turn-4")
        harness.until("two refusals for each server", lambda: len(harness.lines("refused_address")) >= 8)
        status = json.loads(harness.gateway.ask("/status")[1])["registrations"]
        assert {line["state"] for line in status} == {"refused_address"}
        details = {line["turn"]: line["last_error"]["detail"] for line in status}
        assert "a service, relay or gateway" in details["turn-1"]
        assert "a discovery server or a listener" in details["turn-2"]
        assert "a discovery server or a listener" in details["turn-3"]
        assert "a service, relay or gateway" in details["turn-4"]
        metrics = harness.gateway.ask("/metrics")[1]
        assert "crossnet_registrar_refused_addresses 8.0" in metrics
        # Each refusal is logged once, however often it is repeated.
        harness.until("more refusals", lambda: _refusals(harness) > 16)
        assert len(harness.lines("refused_address")) == 8
        assert stranger.connects == 0


def _refusals(harness: Harness) -> float:
    metrics = harness.gateway.ask("/metrics")[1]
    return float(metrics.partition('registrations_total{reason="refused_address"} ')[2].split()[0])


def test_a_discovery_server_configured_by_name_is_refused_by_address(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        harness = Harness(tmp_path, stack, {}, PIN, discovery="localhost")
        harness.publish_turn(f"turn:127.0.0.1:{harness.port}")
        harness.until("a refusal", lambda: harness.lines("refused_address"))
        assert "is a discovery server" in harness.lines("refused_address")[0]["detail"]


def test_loopback_needs_the_setting(tmp_path: Path, stranger: Port) -> None:
    with contextlib.ExitStack() as stack:
        harness = Harness(tmp_path, stack, {}, {})
        harness.publish_turn(f"turn:127.0.0.1:{stranger.port}")
        harness.until("a refusal", lambda: harness.lines("refused_address"))
        assert "loopback" in harness.lines("refused_address")[0]["detail"]
        assert stranger.connects == 0


def test_changing_records_cause_few_connections(tmp_path: Path, stranger: Port) -> None:
    """An address that does not speak TURN is tried at growing intervals, whatever the records say."""
    with contextlib.ExitStack() as stack:
        harness = Harness(tmp_path, stack, {}, PIN)
        for number in range(40):
            harness.publish_turn(
                f"turn:127.0.0.1:{stranger.port}" + ("?transport=tcp" if number % 2 else ""), f"turn-{number % 4}"
            )
            time.sleep(0.1)
        # Two immediately, then after 1, 2 and 4 s.
        assert 2 <= stranger.connects <= 5
        assert harness.gateway.process.poll() is None


def test_the_error_for_the_old_setting_names_its_replacement(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret")
    text = """
network: b
discovery: http://127.0.0.1:1
gateway: {id: gw-1, allow: [], allow_turn_servers: [127.0.0.0/8], turn: {c: {secret: {file: secret}}}}
"""
    with running(tmp_path, text) as process:
        assert process.process.wait(20) == 2
        assert "gateway.allow_turn_servers: expected turn.NETWORK.allow" in process.log.read_text()
