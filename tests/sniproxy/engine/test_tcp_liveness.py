"""Whether a peer answers, between two network namespaces: while it is there, while it pauses, and once its host is lost."""

import socket
import time
from collections.abc import Callable

import pytest

from sniproxy.engine import Listener
from sniproxy.engine.socket_stream import tune
from sniproxy.engine.tcp_liveness import RTO_MAX_MS, TCP_RTO_MAX_MS, bound_retransmissions, unanswered_s
from tests.support.streams import sockets
from tests.support.two_hosts import HERE, THERE, blackhole, two_hosts

LIMIT_S = 20.0


def rto_max_ms(sock: socket.socket) -> int | None:
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS)
    except OSError:
        return None


def supports_rto_max() -> bool:
    with socket.socket() as sock:
        return rto_max_ms(sock) is not None


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_is_unanswered_where_nothing_is_lost() -> None:
    one, other = sockets()
    with one, other:
        assert unanswered_s(one) == 0
        one.sendall(b"x")
        other.recv(1)
        assert unanswered_s(one) == 0


def test_what_is_no_tcp_connection_loses_nobody() -> None:
    one, other = socket.socketpair()
    with one, other:
        bound_retransmissions(one)
        assert unanswered_s(one) == 0
    assert unanswered_s(one) == 0, "closed"


@pytest.mark.anyio
@pytest.mark.skipif(not supports_rto_max(), reason="Linux before 6.15 has no TCP_RTO_MAX_MS")
async def test_dialled_and_accepted_sockets_are_bounded() -> None:
    with socket.socket() as sock:
        tune(sock)
        assert rto_max_ms(sock) == RTO_MAX_MS
    listener = await Listener.open("127.0.0.1", 0)
    try:
        with socket.create_connection(listener.address):
            accepted, _ = listener._sock.accept()
            with accepted:
                assert rto_max_ms(accepted) == RTO_MAX_MS
    finally:
        listener.close()


@pytest.mark.netns
@pytest.mark.needs("netns", "nft")
@pytest.mark.parametrize("paused", [False, True])
def test_a_lost_host_leaves_what_is_in_flight_unanswered(paused: bool) -> None:
    with two_hosts() as (here, there):
        with there.entered():
            server = socket.create_server((THERE, 0))
        with here.entered():
            one = socket.create_connection(server.getsockname())
        other, source = server.accept()
        assert source[0] == HERE
        tune(one)
        with server, one, other:
            if paused:
                one.setblocking(False)
                with pytest.raises(BlockingIOError):
                    while True:
                        one.send(bytes(65536))
                time.sleep(2)  # probes of the closed window have been answered
                assert unanswered_s(one) == 0
            blackhole(there, "both")
            if not paused:
                one.sendall(b"x")
            until(lambda: unanswered_s(one) > 1)
