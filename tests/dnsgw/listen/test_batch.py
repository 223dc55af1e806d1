"""Replies sent many at a time; test_udp has the rest, with real questions."""

import socket
import struct

from dnsgw.listen.batch import Batch


def test_a_reply_that_cannot_be_sent_is_counted_and_holds_up_no_other() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as to,
    ):
        sock.bind(("127.0.0.1", 0))
        to.bind(("127.0.0.1", 0))
        batch = Batch(sock, v6=False, wildcard=False)
        good = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", to.getsockname()[1], b"\x7f\0\0\1")
        bad = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", 0, b"\x7f\0\0\1")
        for where in (bad, good, bad, good):
            assert batch.put(b"reply", where) == 0
        assert batch.put(b"x" * 1233, good) == 1
        assert batch.flush() == 2
        to.setblocking(False)
        assert [to.recv(100) for _ in range(2)] == [b"reply", b"reply"]
