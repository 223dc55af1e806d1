"""The TURN server as a role of a process: its drain on SIGTERM."""

import time
from pathlib import Path

from tests.crossnet.running import free_port, running
from tests.turnreg.server.wireclient import Client, code, connect

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
