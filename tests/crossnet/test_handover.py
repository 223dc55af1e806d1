"""An upgrade: a second process takes over the listening sockets while clients keep connecting, and no connection is lost."""

import asyncio
import os
import socket
import threading
from pathlib import Path

import pytest
import uvloop

from crossnet.app.app import App
from crossnet.config.file import load
from crossnet.handover import Inherited
from crossnet.process import leaves
from discovery.api.tokens import make_token
from tests.support.hellos import client_hello
from tests.support.running import Running, running

FILE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:{admin}
drain: 30s
handover: over.sock
relay: {{id: relay-1, listen: "127.0.0.1:{port}", deliver: ["127.0.0.1/32"]}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}]")
    return tmp_path


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


class Service:
    """Echoes what it reads, with a thread per connection."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port: int = self.listening.getsockname()[1]
        self.hello = client_hello(f"p{self.port}-127-0-0-1.a.svc.mesh.internal")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                wire, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(wire,), daemon=True).start()

    def _echo(self, wire: socket.socket) -> None:
        with wire:
            try:
                while data := wire.recv(65536):
                    wire.sendall(data)
            except OSError:
                pass

    def through(self, relay: tuple[str, int]) -> socket.socket:
        """Open a stream through a relay and wait for its first answer."""
        client = socket.create_connection(relay, 10)
        client.sendall(self.hello)
        received = b""
        while len(received) < len(self.hello):
            more = client.recv(65536)
            if not more:
                raise ConnectionError("the relay ended it")
            received += more
        return client


class Load(threading.Thread):
    """Opens one stream after the other until it is stopped."""

    def __init__(self, service: Service, relay: tuple[str, int], ending: threading.Event) -> None:
        super().__init__()
        self.service, self.relay, self.ending = service, relay, ending
        self.served = 0
        self.failed: list[str] = []

    def run(self) -> None:
        while not self.ending.is_set():
            try:
                self.service.through(self.relay).close()
                self.served += 1
            except OSError as error:
                self.failed.append(repr(error))


def test_an_upgrade_under_load_loses_no_connection(folder: Path) -> None:
    port, admin = free_ports()
    service = Service()
    relay = ("127.0.0.1", port)
    ending = threading.Event()
    load = [Load(service, relay, ending) for _ in range(8)]
    config = FILE.format(port=port, admin=admin)
    with running(folder, config) as first:
        first.started()
        held = service.through(relay)
        for thread in load:
            thread.start()
        before = 0
        processes: list[Running] = [first]
        try:
            for generation in (2, 3):
                name = f"generation{generation}"
                successor = Running(folder, config, name=name)
                processes.append(successor)
                successor.started()
                processes[-2].wait_for("handed_over")
                assert successor.process.poll() is None
                served = sum(thread.served for thread in load)
                while sum(thread.served for thread in load) < served + 50:
                    assert any(thread.is_alive() for thread in load)
                assert sum(thread.served for thread in load) > before
                before = sum(thread.served for thread in load)
            ending.set()
            for thread in load:
                thread.join(20)
            assert [thread.failed for thread in load] == [[]] * len(load)
            # The first process still carries its stream, and exits when that ends.
            held.sendall(b"still here")
            assert held.recv(100) == b"still here"
            assert first.process.poll() is None
            held.close()
            assert first.process.wait(20) == 0
            assert processes[1].process.wait(20) == 0
            assert '"relay-1"' in processes[2].ask("/config")[1]
            assert processes[2].end() == 143
        finally:
            ending.set()
            for process in processes:
                process.kill()
            service.listening.close()


def test_a_successor_that_cannot_start_changes_nothing(folder: Path) -> None:
    port, admin = free_ports()
    service = Service()
    with running(folder, FILE.format(port=port, admin=admin)) as first, socket.create_server(("127.0.0.1", 0)) as taken:
        first.started()
        bad = FILE.format(port=port, admin=admin).replace(
            f'"127.0.0.1:{port}"', f'["127.0.0.1:{port}", "127.0.0.1:{taken.getsockname()[1]}"]'
        )
        successor = Running(folder, bad, name="bad")
        assert successor.process.wait(20) == 1
        assert "cannot listen" in successor.wait_for("cannot_start")["detail"]
        first.wait_for("handover_failed")
        service.through(("127.0.0.1", port)).close()
        assert first.ask("/healthz")[0] == 200
    service.listening.close()


def test_without_a_predecessor_nothing_is_inherited(tmp_path: Path) -> None:
    assert not Inherited.receive(tmp_path / "absent")
    path = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    inherited = Inherited.receive(path)
    assert not inherited
    assert inherited.take("relay", "127.0.0.1", 443) is None
    asyncio.run(inherited.started())


def test_an_invalid_offer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    with socket.socket(socket.AF_UNIX) as odd, socket.create_server(("127.0.0.1", 0)) as other:
        odd.bind(str(path))
        odd.listen()
        for line in (
            b"",
            b"\n",
            b"[]x\n",
            b'[["relay", "127.0.0.1"]]\n',
            b'[["relay", "127.0.0.1", 1], ["a", "b", 2]]\n',
        ):

            def answer(line: bytes = line) -> None:
                connection, _ = odd.accept()
                with connection:
                    socket.send_fds(connection, [line or b" "], [other.fileno()])

            thread = threading.Thread(target=answer)
            thread.start()
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(OSError, match="hands nothing over"):
                Inherited.receive(path)
            thread.join()
            assert len(os.listdir("/proc/self/fd")) <= before


ADAPTIVE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:{admin}
drain: 5s
handover: over.sock
import: [{{names: [orders.shop.example], from: [b]}}]
relay: {{id: relay-1, listen: "127.0.0.1:{port}", ports: auto, port_range: {of_service}-{of_service}}}
"""


def listening_sockets(port: int) -> list[str]:
    """The inodes of the sockets that listen on a port, from the kernel."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port]


def test_ports_opened_for_services_are_handed_over_too(tmp_path: Path) -> None:
    port, admin = free_ports()
    of_service, _ = free_ports()
    (tmp_path / "mesh.yaml").write_text(
        "networks: [{id: a}, {id: b}]\n"
        f"services: [{{name: orders.shop.example, network: b, ports: {{{of_service}: ['10.0.0.1:1']}}}}]\n"
    )
    config = ADAPTIVE.format(port=port, admin=admin, of_service=of_service)
    with running(tmp_path, config) as first:
        assert of_service in first.wait_for("ports")["ports"]
        before = listening_sockets(of_service)
        assert len(before) == 1
        second = Running(tmp_path, config, name="second")
        try:
            first.wait_for("handed_over")
            assert first.process.wait(20) == 0
            assert of_service in second.wait_for("ports")["ports"]
            assert listening_sockets(of_service) == before, "the same socket, with whoever waits in its queue"
            with socket.create_connection(("127.0.0.1", of_service), 10) as client:
                client.sendall(client_hello("orders.shop.example"))
                assert client.recv(100)[:1] == b"\x15"
            assert second.wait_for("stream")["local"] == f"127.0.0.1:{of_service}"
        finally:
            second.kill()


BLIND = """
network: a
discovery: http://127.0.0.1:{nobody}
token: {{file: token}}
admin: 127.0.0.1:{admin}
handover: over.sock
relay: {{id: relay-1, listen: "127.0.0.1:{port}", deliver: ["127.0.0.1/32"]}}
"""


def test_a_successor_without_a_view_of_discovery_does_not_take_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse clients because it knows no network."""
    port, admin = free_ports()
    nobody, _ = free_ports()
    service = Service()
    (folder / "token").touch(0o600)
    (folder / "token").write_text(make_token())
    successor = folder / "blind.yaml"
    monkeypatch.chdir(folder)
    with running(folder, FILE.format(port=port, admin=admin)) as first:
        first.started()
        successor.write_text(BLIND.format(port=port, admin=admin, nobody=nobody))

        async def serve() -> None:
            await App(load(successor), ["relay"], ready_timeout_s=0.2).serve()

        with pytest.raises(ExceptionGroup) as failed:
            uvloop.run(serve())
        assert "without a view of discovery" in str(list(leaves(failed.value)))
        first.wait_for("handover_failed")
        service.through(("127.0.0.1", port)).close()
        assert first.ask("/healthz")[0] == 200
    service.listening.close()
