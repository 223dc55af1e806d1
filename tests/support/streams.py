"""Connected pairs of real TCP sockets, plain or with TLS over them."""

import asyncio
import functools
import gc
import select
import socket
import ssl
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from sniproxy.engine import ByteStream, SocketStream, TlsStream
from sniproxy.engine.byte_stream import Buffer

TLS_NAME = "turn.example"


@functools.cache
def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a client's context that trusts the server's, and the server's. The certificate is for TLS_NAME."""
    authority = trustme.CA()
    client, server = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.configure_trust(client)
    authority.issue_cert(TLS_NAME).configure_cert(server)
    return client, server


class RecordingSocket(socket.socket):
    """A socket that adds to a list what each call to write has written."""

    def __init__(self, sock: socket.socket, writes: list[bytes]) -> None:
        """Take over `sock`."""
        super().__init__(fileno=sock.detach())
        self._writes = writes

    def sendmsg(self, buffers: Iterable[Buffer], *arguments: Any) -> int:  # type: ignore[override]
        """Write as `socket.sendmsg` does, and add what was written."""
        data = b"".join(buffers)
        size = super().sendmsg([data], *arguments)
        self._writes.append(data[:size])
        return size


def sockets() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


@contextmanager
def silent_listener(address: str = "127.0.0.1") -> Iterator[int]:
    """Give the port of a listener whose queue is full: Linux drops further SYNs, as a firewall does."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind((address, 0))
        server.listen(0)
        is_full = False
        while not is_full:
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
            is_full = not select.select((), (waiting,), (), 0.1)[1]
        yield server.getsockname()[1]


async def pair(kind: str = "plain", *, writes: list[bytes] | None = None) -> tuple[SocketStream, SocketStream]:
    """Return the two ends of a TCP connection over loopback; `kind` "tls": with TLS over it.

    Args:
        writes: gets what each call to write has written, at either end.
    """
    one, other = sockets()
    if writes is not None:
        one, other = RecordingSocket(one, writes), RecordingSocket(other, writes)
    if kind == "plain":
        return SocketStream(one), SocketStream(other)
    contexts = tls_contexts()
    client = TlsStream(one, contexts[0], server_hostname=TLS_NAME)
    server = TlsStream(other, contexts[1], server_side=True)
    await shake(client, server)
    return client, server


async def shake(*streams: TlsStream) -> None:
    """Complete the handshake of both ends."""
    async with asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(stream.handshake(20))


@contextmanager
def nothing_large_kept() -> Iterator[None]:
    """Check that nothing of 16 KiB or more that the block allocates is left at its end."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        gc.collect()
        kept = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
    finally:
        tracemalloc.stop()
    assert [str(trace) for trace in kept.traces if trace.size >= 16 * 1024] == []


async def read_all(stream: ByteStream, limit_s: float = 20) -> bytes:
    """Read to the end of the stream; a reset is an error."""
    chunks = []
    async with asyncio.timeout(limit_s):
        while data := await stream.recv():
            chunks.append(data)
    return b"".join(chunks)


def peer_waits(closed: ByteStream) -> bool:
    """Return whether the kernel keeps the far end of a closed connection over loopback in TIME_WAIT (state 06)."""

    def packed(end: tuple[str, int]) -> str:
        return f"{socket.inet_aton(end[0])[::-1].hex()}:{end[1]:04x}".upper()

    lines = [line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()]
    return [packed(closed.peer), packed(closed.local), "06"] in [line[1:4] for line in lines]


async def turns(count: int = 10) -> None:
    """Let the event loop make this many passes."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until_reset(stream: ByteStream, limit_s: float = 20) -> None:
    """Read until the peer's reset; a clean end fails the test."""
    async with asyncio.timeout(limit_s):
        with pytest.raises(ConnectionResetError):
            while await stream.recv():
                pass
            pytest.fail("a clean end instead of a reset")
