"""What the kernel holds for a TCP socket: limits of both queues, on real sockets."""

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sniproxy.engine import socket_memory
from sniproxy.engine.socket_memory import OVERHEAD, USUAL_RMEM_MAX, SocketMemory, largest_receive
from tests.support.streams import sockets
from tests.support.waiting import wait_until

MIB = 1024 * 1024
SMALL = 256 * 1024


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A sender that does not block, and its receiver."""
    one, other = sockets()
    one.setblocking(False)
    with one, other:
        yield one, other


def pour(sock: socket.socket, most: int = 64 * MIB) -> int:
    """Write until the kernel takes no more, for a while. Returns how many bytes it took."""
    piece, sent = bytes(65536), 0
    refused = 0
    while refused < 20 and sent < most:
        try:
            sent += sock.send(piece)
            refused = 0
        except BlockingIOError:
            refused += 1
            threading.Event().wait(0.01)
    return sent


def test_unsent_bytes_are_bounded(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    memory = SocketMemory(one)
    memory.limit_unsent(SMALL)
    pour(one)
    held = memory.held()[1]
    assert 0 < held <= 2 * SMALL
    memory.limit_unsent(None)
    assert pour(one) > 0
    assert memory.held()[1] > held
    other.close()


def test_a_receive_queue_is_bounded_and_can_grow_again(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    memory = SocketMemory(other)
    SocketMemory(one).limit_unsent(SMALL)
    assert memory.limit_receive(SMALL)
    pour(one)
    assert 0 < memory.held()[0] <= 2 * SMALL
    before = memory.held()[0]
    assert memory.limit_receive(4 * SMALL) or largest_receive() < 4 * SMALL
    pour(one)
    assert before < memory.held()[0] <= 2 * 4 * SMALL


def test_a_receive_queue_that_is_tuned_again_outgrows_its_limit(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    memory = SocketMemory(other)
    memory.limit_receive(SMALL)
    sending = threading.Thread(target=_send_all, args=(one, bytes(32 * MIB)))
    sending.start()
    for _ in range(8):
        _receive(other, MIB)
    assert memory.receive_limit <= 2 * SMALL
    memory.tune_receive()
    _receive(other, 24 * MIB)
    sending.join()
    assert memory.receive_limit > 2 * SMALL


def test_a_full_queue_is_made_small_and_loses_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    """It is made small while the sender goes on. (Linux drops packets of a full queue now and then, with or without this.)"""
    one, other = ends
    payload = os.urandom(MIB) * 24
    memory = SocketMemory(other)
    sending = threading.Thread(target=_send_all, args=(one, payload))
    sending.start()
    arrived = hashlib.sha256(_receive(other, 8 * MIB))
    grown = memory.receive_limit
    for _ in range(64):
        memory.limit_receive(SMALL)
        arrived.update(_receive(other, 4 * MIB // 64))

    def is_small() -> bool:
        memory.limit_receive(SMALL)
        return memory.receive_limit == SMALL

    wait_until(is_small)
    arrived.update(_receive(other, 12 * MIB))
    sending.join()
    assert arrived.digest() == hashlib.sha256(payload).digest()
    assert grown > SMALL


def test_what_was_announced_is_not_taken_back(ends: tuple[socket.socket, socket.socket]) -> None:
    """The window is open and empty, since the sender is idle: it may still send all of it."""
    one, other = ends
    sending = threading.Thread(target=_send_all, args=(one, bytes(8 * MIB)))
    sending.start()
    _receive(other, 8 * MIB)
    sending.join()
    memory = SocketMemory(other)
    grown = memory.receive_limit
    for _ in range(3):
        memory.limit_receive(SMALL)
    announced = int.from_bytes(other.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 236)[232:236], "little")
    assert min(grown, announced) <= memory.receive_limit <= grown


def test_a_limit_above_what_the_system_allows_is_refused(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket_memory, "largest_receive", lambda: 2 * SMALL)
    memory = SocketMemory(ends[1])
    assert memory.limit_receive(SMALL)
    assert not memory.limit_receive(4 * SMALL)
    assert memory.receive_limit == 2 * SMALL
    memory.tune_receive()
    assert memory.receive_limit == 2 * SMALL, "it is not made smaller"


def test_the_largest_receive_buffer_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    largest_receive.cache_clear()
    assert largest_receive() >= OVERHEAD * 4096
    largest_receive.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda _: "hidden")
    assert largest_receive() == OVERHEAD * USUAL_RMEM_MAX
    largest_receive.cache_clear()


def test_a_round_trip_is_known(ends: tuple[socket.socket, socket.socket]) -> None:
    assert 0 <= SocketMemory(ends[0]).min_rtt_s() < 10


def test_a_closed_socket_holds_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    one, _ = ends
    memory = SocketMemory(one)
    one.close()
    memory.limit_unsent(SMALL)
    memory.limit_receive(SMALL)
    memory.tune_receive()
    assert memory.held() == (0, 0)
    assert memory.min_rtt_s() == 0
    assert memory.receive_limit == 0


def _send_all(sock: socket.socket, payload: bytes) -> None:
    sock.setblocking(True)
    sock.sendall(payload)


def _receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += sock.recv(min(MIB, count - len(data)))
    return bytes(data)
