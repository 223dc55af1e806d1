"""Cases of the behaviour table about peers and streams: attempts, binds, early bytes, ends.

Each takes the server's address and returns what it saw.
"""

import hashlib
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.turn_client import Client, code, connect, noise, read_all, reset
from tests.support.waiting import wait_until
from tests.turnreg.server.situations import Server, control, sees_reset, stream
from turnreg.stun.message import Attribute, Message, Method

# -- streams


def unread(sock: socket.socket) -> int:
    """Bytes that the process at the other end of a connection within this host has not read yet."""
    ends = [
        f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
        for host, port in (sock.getpeername(), sock.getsockname())
    ]
    for line in Path("/proc/net/tcp").read_text().splitlines():
        fields = line.split()
        if fields[1:3] == ends:
            return int(fields[4].partition(":")[2], 16)
    raise LookupError(ends)


def attempt_and_bind(server: Server) -> object:
    with control(server) as client, connect(client.relayed) as peer:
        attempt = client.attempt()
        assert attempt.xor_address(Attribute.XOR_PEER_ADDRESS) == peer.getsockname()
        assert len(attempt.get(Attribute.CONNECTION_ID) or b"") == 4
        with client.open_data() as data:
            answer = data.ask(data.bind_request(attempt.get(Attribute.CONNECTION_ID) or b""))
            peer.sendall(b"to the client")
            data.sock.sendall(b"to the peer")
            return (
                attempt.message_class,
                attempt.has_integrity,
                answer.verify_integrity(data.key),
                data.sock.recv(100),
                peer.recv(100),
            )


def early(size: int) -> Callable[[Server], object]:
    """The peer sends at once, the client binds a little later; then the peer sends an end mark.

    Returns whether all arrived before the mark, and whether at least the 64 KiB did that coturn keeps.
    """

    def run(server: Server) -> object:
        sent, mark = noise(size), noise(16)
        with control(server) as client, connect(client.relayed) as peer:
            attempt = client.attempt()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(peer.sendall, sent)
                time.sleep(0.2)  # for coturn to read, and drop, what it will: it says nothing that one could wait for
                with client.bind(attempt) as data:
                    pool.submit(peer.sendall, mark)
                    got = bytearray(data.rest())
                    while not got.endswith(mark):
                        more = data.sock.recv(1 << 20)
                        assert more
                        got += more
        kept = min(size, 65_536)
        return got == sent + mark, got[:kept] == sent[:kept]

    return run


def dribbled(server: Server) -> object:
    """Twenty small writes before the bind, each a read of its own: coturn keeps sixteen, the embedded server reads none."""
    with control(server) as client, connect(client.relayed) as peer:
        attempt = client.attempt()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reads_early = True
        for number in range(20):
            peer.sendall(b"%03d\n" % number)
            if number == 0:
                try:
                    wait_until(lambda: unread(peer) == 0, 1.0)
                except AssertionError:
                    reads_early = False
            elif reads_early:
                assert wait_until(lambda: unread(peer) == 0)
        with client.bind(attempt) as data:
            got = data.rest()
            data.sock.settimeout(0.5)
            peer.sendall(b"end\n")
            while not got.endswith(b"end\n"):
                got += data.sock.recv(100)
        return len(got.split()) - 1


def pipelined_behind_bind(server: Server) -> object:
    """Bytes that the client sends together with its ConnectionBind."""
    with control(server) as client, connect(client.relayed) as peer:
        attempt = client.attempt()
        with client.open_data() as data:
            request = data.credentials(data.bind_request(attempt.get(Attribute.CONNECTION_ID) or b""))
            data.send(request.pack(integrity_key=data.key) + b"early, ")
            assert code(data.answer_to(request)) == 0
            data.send(b"late")
            data.sock.shutdown(socket.SHUT_WR)
            return read_all(peer)[0]


def close_after(size: int, who: str) -> Callable[[Server], object]:
    """One side sends and closes at once, the other reads a little later: does all of it arrive, and as what end?"""

    def run(server: Server) -> object:
        sent = noise(size)
        with stream(server) as (peer, data, _):
            source, sink = (peer, data) if who == "peer" else (data, peer)
            source.sendall(sent)
            source.close()
            time.sleep(0.2)  # for coturn to close the connection before all is read: nothing announces that it does not
            got, end = read_all(sink)
            return end if got == sent else "truncated"

    return run


def half_close(server: Server) -> object:
    """The peer ends its direction; the client answers only then."""
    with stream(server) as (peer, data, _):
        peer.sendall(b"question")
        peer.shutdown(socket.SHUT_WR)
        asked, end = read_all(data)
        if end != "fin":
            return asked, end, sees_reset(peer)
        data.sendall(b"answer")
        data.close()
        return asked, end, read_all(peer)


def peer_reset(server: Server) -> object:
    with stream(server) as (peer, data, _):
        reset(peer)
        return read_all(data)


def backpressure(server: Server) -> object:
    """A reader that pauses blocks the sender, once the kernel's buffers are full; nothing is lost.

    They hold 4 MB where little is allowed, and more than 32 MB where tcp_rmem allows that.
    """
    block = noise(1 << 20)
    sent = hashlib.sha256()
    got = hashlib.sha256()
    with stream(server) as (peer, data, _):
        data.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        peer.settimeout(0.2)
        total = 0
        blocked = False
        while not blocked and total < 256 << 20:
            try:
                size = peer.send(block)
            except TimeoutError:
                blocked = True
            else:
                sent.update(block[:size])
                total += size
        while total > 0:
            more = data.recv(1 << 20)
            got.update(more)
            total -= len(more) or total
        return blocked, got.digest() == sent.digest()


# -- binds that fail


def failed_bind(spoil: Callable[[Client, bytes], Message]) -> Callable[[Server], object]:
    """A bind that must fail, then a good one on a new connection; returns the results of both."""

    def run(server: Server) -> object:
        with control(server) as client, connect(client.relayed) as peer:
            attempt = client.attempt()
            connection_id = attempt.get(Attribute.CONNECTION_ID) or b""
            with client.open_data() as bad:
                bad.sock.settimeout(2)
                request = spoil(bad, connection_id)
                signed = request.get(Attribute.USERNAME) is not None
                bad.send(request.pack(integrity_key=bad.key if signed else None))
                first: object
                try:
                    first = code(bad.answer_to(request)), read_all(bad.sock)[1]
                except ConnectionResetError:
                    first = "reset"
            with client.open_data() as data:
                try:
                    good: object = code(data.ask(data.bind_request(connection_id)))
                    peer.sendall(b"hello")
                    good = good, data.rest() or data.sock.recv(10)
                except ConnectionResetError:
                    good = "reset"
            return first, good

    return run


def unsigned(client: Client, connection_id: bytes) -> Message:
    return client.bind_request(connection_id)


def with_wrong_password(client: Client, connection_id: bytes) -> Message:
    client.password = "wrong"
    return client.credentials(client.bind_request(connection_id))


def with_stale_nonce(client: Client, connection_id: bytes) -> Message:
    client.nonce = "0" * len(client.nonce)
    return client.credentials(client.bind_request(connection_id))


def without_id(client: Client, _: bytes) -> Message:
    return client.credentials(client.bare(Method.CONNECTION_BIND))


def bind_of_unknown_id(server: Server) -> object:
    with control(server) as client, client.open_data() as data:
        data.sock.settimeout(2)
        try:
            return code(data.ask(data.bind_request(b"\x01\x02\x03\x04"))), read_all(data.sock)[1]
        except ConnectionResetError:
            return "reset"


def second_bind(server: Server) -> object:
    """A second bind of the same id fails, and the stream continues."""
    with control(server) as client, connect(client.relayed) as peer:
        attempt = client.attempt()
        with client.bind(attempt) as data, client.open_data() as again:
            again.sock.settimeout(2)
            second: object
            try:
                second = code(again.ask(again.bind_request(attempt.get(Attribute.CONNECTION_ID) or b"")))
            except ConnectionResetError:
                second = "reset"
            peer.sendall(b"hello")
            return second, data.sock.recv(10)


def bind_on_control(server: Server) -> object:
    with control(server) as client, connect(client.relayed):
        attempt = client.attempt()
        refused = client.ask(client.bind_request(attempt.get(Attribute.CONNECTION_ID) or b""))
        with client.bind(attempt):
            return code(refused)


def many_at_once(server: Server) -> object:
    """A hundred peers from one address, bound in reverse order; each stream goes to its own peer."""
    with control(server) as client:
        peers = {peer.getsockname(): peer for peer in (connect(client.relayed) for _ in range(100))}
        attempts = [client.attempt() for _ in peers]
        ids = {attempt.get(Attribute.CONNECTION_ID) for attempt in attempts}
        matched = 0
        for attempt in reversed(attempts):
            address = attempt.xor_address(Attribute.XOR_PEER_ADDRESS)
            assert address is not None
            peer = peers[address]
            with client.bind(attempt) as data:
                peer.sendall(b"%d" % address[1])
                matched += (data.rest() or data.sock.recv(10)) == b"%d" % address[1]
        for peer in peers.values():
            peer.close()
        return len(ids), matched
