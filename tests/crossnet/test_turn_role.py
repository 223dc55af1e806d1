"""The TURN server as a role of a process: its drain on SIGTERM."""

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.running import free_port, running
from tests.support.turn_client import Client, code, connect
from turnreg.stun.auth import rest_credentials

CONFIG = """
network: a
discovery: http://127.0.0.1:{nowhere}
admin: 127.0.0.1:0
drain: 15s
domain: lab
turn: {{id: turn-1, listen: "127.0.0.1:0", relay_address: 127.0.0.1, ports: 20000-32000, users: {{u: {{file: u}}}}, realm: lab,
       allow_peers: [127.0.0.0/8]}}
"""


def test_a_signal_lets_streams_end_and_takes_no_new_allocation(tmp_path: Path) -> None:
    (tmp_path / "u").write_text("p")
    with running(tmp_path, CONFIG.format(nowhere=free_port())) as process:
        address, _, port = process.started()["turn"][0].rpartition(":")
        server = (address, int(port))
        with Client(server) as client, Client(server) as late:
            client.allocate()
            assert code(client.permit("127.0.0.1")) == 0
            with connect(client.relayed) as peer, client.bind(client.attempt()) as data:
                process.process.terminate()
                assert process.wait_for("draining")["streams"] == 1
                late.login()
                deadline = time.monotonic() + 5
                while code(late.ask(late.allocate_request())) != 508:
                    assert time.monotonic() < deadline
                assert code(client.refresh(600)) == 0
                peer.sendall(b"still here")
                assert data.sock.recv(100) == b"still here"
                assert process.process.poll() is None
            began = time.monotonic()
            assert process.process.wait(15) == 143
            assert time.monotonic() - began < 10
        assert not process.events("cut")
        ended = process.events("turn_allocation_ended")[-1]
        assert (ended["bytes_to_client"], ended["reason"]) == (10, "server_stopped")


SHARED = """
network: a
discovery: http://127.0.0.1:{nowhere}
admin: 127.0.0.1:0
drain: 0
turn: {{id: turn-1, listen: "127.0.0.1:0", relay_address: 127.0.0.1, ports: {first}-{last}, secret: {{file: secret}}, realm: lab,
       allow_peers: [127.0.0.0/8]{more}}}
"""


def test_one_network_cannot_take_all_ports(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    first, nowhere = 31_000, free_port()

    def text(more: str) -> str:
        return SHARED.format(nowhere=nowhere, first=first, last=first + 7, more=more)

    with ExitStack() as stack:
        process = stack.enter_context(running(tmp_path, text("")))
        address, _, port = process.started()["turn"][0].rpartition(":")

        def allocate(name: str, expires_in_s: float) -> int:
            user, password = rest_credentials("s", name, time.time() + expires_in_s)
            client = stack.enter_context(Client((address, int(port)), user=user, password=password))
            client.login()
            return code(client.ask(client.allocate_request()))

        # The account is the name without the timestamp.
        assert [allocate("b.gw-1", 60 + number) for number in range(5)] == [0, 0, 0, 0, 486]
        assert [allocate("c.gw-1", 60) for _ in range(5)] == [0, 0, 0, 0, 486]
        metrics = process.ask("/metrics")[1]
        assert 'crossnet_turn_refusals_total{reason="port_share"} 2.0' in metrics
        assert "crossnet_turn_largest_account_allocations 4.0" in metrics
    with ExitStack() as stack:
        process = stack.enter_context(running(tmp_path, text(", max_port_share_per_user: 25%")))
        address, _, port = process.started()["turn"][0].rpartition(":")
        assert [allocate("b.gw-1", 60) for _ in range(3)] == [0, 0, 486]
        (tmp_path / "new").write_text(text(", max_port_share_per_user: 75%"))
        os.replace(tmp_path / "new", tmp_path / "crossnet.yaml")
        process.process.send_signal(signal.SIGHUP)
        assert process.wait_for("config_read")["applied"] == ["turn.max_port_share_per_user"]
        assert [allocate("b.gw-1", 60) for _ in range(5)] == [0, 0, 0, 0, 486]
