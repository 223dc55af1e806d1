"""Reconfiguring a running server, and the shares of accounts."""

import contextlib
import dataclasses
import logging
import socket
import threading
import time
from typing import Any

import pytest

from discovery.model.addresses import TargetList
from tests.support.embedded_turn import Embedded, embedded
from tests.support.turn_client import Client, code, connect, read_all
from tests.support.waiting import wait_until
from tests.turnreg.server.test_server import at
from turnreg.server import Limits
from turnreg.stun.auth import rest_credentials


class TestReconfigure:
    @staticmethod
    def reconfigure(server: Embedded, **changes: Any) -> None:
        done = threading.Event()

        def change() -> None:
            server.server.reconfigure(dataclasses.replace(server.server.config, **changes))
            done.set()

        server.loop.call_soon_threadsafe(change)
        assert done.wait(5)

    def test_a_secret_is_rotated_under_a_stream(self) -> None:
        old, new = (rest_credentials(secret, "gw", time.time() + 60) for secret in ("old", "new"))
        with (
            embedded(users={}, secrets=("old",)) as server,
            Client(at(server), user=old[0], password=old[1]) as client,
        ):
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer, client.bind(client.attempt()) as data:
                self.reconfigure(server, secrets=("new", "old"))
                assert code(client.refresh(600)) == 0
                client.user, client.password = new
                assert code(client.refresh(600)) == 0
                self.reconfigure(server, secrets=("new",))
                assert code(client.refresh(600)) == 0
                client.user, client.password = old
                assert code(client.refresh(600)) == 401
                peer.sendall(b"still here")
                assert data.sock.recv(20) == b"still here"

    def test_bytes_per_second(self) -> None:
        with embedded() as server, Client(at(server)) as client:
            client.allocate()
            client.permit("127.0.0.1")
            assert self.paced(server) == [None]
            self.reconfigure(server, limits=Limits(max_bytes_per_second_per_account=200_000))
            assert self.paced(server) == [200_000]
            with connect(client.relayed) as peer, client.bind(client.attempt()) as data:
                sender = threading.Thread(target=peer.sendall, args=(bytes(600_000),))
                began = time.monotonic()
                sender.start()
                left = 600_000
                while left:
                    left -= len(data.sock.recv(65536))
                    if left < 300_000:  # the rest at once
                        self.reconfigure(server, limits=Limits())
                assert time.monotonic() - began > 0.2  # what is beyond a second's worth was waited for
                sender.join()
            assert self.paced(server) == [None]

    @staticmethod
    def paced(server: Embedded) -> list[float | None]:
        return [None if one.pace is None else one.pace.rate for one in server.server._state.table]

    def test_counts_and_peers(self) -> None:
        with embedded() as server, Client(at(server)) as first, Client(at(server)) as second:
            first.allocate()
            self.reconfigure(
                server,
                limits=Limits(max_allocations_per_account=1),
                allowed_peers=TargetList.parse([]),
                users={"u": "p"},
            )
            second.login()
            assert code(second.ask(second.allocate_request())) == 486
            assert code(first.permit("127.0.0.1")) == 403
            second.user, second.password = "v", "q"
            assert code(second.ask(second.allocate_request())) == 401


class TestAccounts:
    def test_metrics_count_while_a_stream_runs(self) -> None:
        with embedded() as server, Client(at(server)) as client:
            client.allocate()
            client.permit("127.0.0.1")
            assert server.metric("crossnet_turn_allocations") == 1
            assert server.metric("crossnet_turn_allocations_opened_total") == 1
            assert server.metric("crossnet_turn_refusals_total", reason="no_credentials") == 1
            with connect(client.relayed) as peer, client.bind(client.attempt()) as data:
                peer.sendall(b"12345")
                assert data.sock.recv(10) == b"12345"
                assert server.metric("crossnet_turn_connections", state="bound") == 1
                assert wait_until(lambda: server.metric("crossnet_turn_bytes_total", direction="to_client") == 5)
                assert server.metric("crossnet_turn_bytes_total", direction="to_peer") == 0

    def test_every_reason_is_registered_at_the_start(self) -> None:
        with embedded() as server:
            reasons = {
                sample.labels["reason"]
                for metric in server.registry.collect()
                for sample in metric.samples
                if sample.name == "crossnet_turn_refusals_total"
            }
            assert reasons >= {"wrong_password", "stale_nonce", "quota", "peer_not_permitted", "too_slow"}

    def test_logs_tell_the_story_without_secrets(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        with (
            embedded(users={"user-1": "hidden-password"}) as server,
            Client(at(server), user="user-1", password="hidden-password") as client,
        ):
            client.allocate()
            client.permit("127.0.0.1")
            with connect(client.relayed) as peer, client.bind(client.attempt()) as data:
                peer.sendall(b"hidden payload")
                data.sock.recv(20)
                data.sock.close()
                peer.close()
                assert wait_until(lambda: "turn_stream" in caplog.messages)
            with socket.socket() as stranger:
                stranger.bind(("127.0.0.2", 0))
                source = stranger.getsockname()
                with contextlib.suppress(ConnectionResetError):  # as early as that, if the server is quick
                    stranger.connect(client.relayed)
                    read_all(stranger)
            client.password = "wrong"
            client.refresh(600)
            client.sock.close()
            assert wait_until(lambda: "turn_allocation_ended" in caplog.messages)
        events = {record.message: vars(record).get("event", {}) for record in caplog.records}
        assert events["turn_allocation"]["account"] == "user-1"
        assert events["turn_allocation"]["lifetime_s"] == 600
        assert events["turn_stream"]["bytes_to_client"] == 14
        assert events["turn_peers_refused"] == {
            "account": "user-1",
            "relayed": f"127.0.0.1:{client.relayed[1]}",
            "peer": f"127.0.0.2:{source[1]}",
            "refused": 1,
            "reason": "peer_not_permitted",
        }
        assert events["turn_refused"]["reason"] == "wrong_password"
        assert events["turn_allocation_ended"]["reason"] == "client_closed"
        assert "hidden" not in caplog.text + str(events)
