"""Connected pairs of real TCP sockets, plain or with TLS over them."""

import asyncio
import functools
import gc
import socket
import ssl
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trustme

from sniproxy.engine import ByteStream, SocketStream, TlsStream

TLS_NAME = "turn.example"


@functools.cache
def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Give a client's and a server's context that trust each other; the certificate is for TLS_NAME."""
    authority = trustme.CA()
    client, server = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.configure_trust(client)
    authority.issue_cert(TLS_NAME).configure_cert(server)
    return client, server


def sockets() -> tuple[socket.socket, socket.socket]:
    """Give the two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


async def pair(kind: str = "plain") -> tuple[SocketStream, SocketStream]:
    """Give the two ends of a TCP connection over loopback; `kind` "tls": with TLS over it."""
    one, other = sockets()
    if kind == "plain":
        return SocketStream(one), SocketStream(other)
    contexts = tls_contexts()
    client = TlsStream(one, contexts[0], server_hostname=TLS_NAME)
    server = TlsStream(other, contexts[1], server_side=True)
    await shake(client, server)
    return client, server


async def shake(*wires: TlsStream) -> None:
    """Let both ends shake hands."""
    async with asyncio.TaskGroup() as group:
        for wire in wires:
            group.create_task(wire.handshake(20))


@contextmanager
def nothing_large_kept() -> Iterator[None]:
    """Hold that of what the block allocates no piece of 16 KiB or more is there at its end."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        gc.collect()
        kept = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
    finally:
        tracemalloc.stop()
    assert [str(trace) for trace in kept.traces if trace.size >= 16 * 1024] == []


async def read_all(wire: ByteStream, limit_s: float = 20) -> bytes:
    """Read to the end of the stream; a reset is an error."""
    chunks = []
    async with asyncio.timeout(limit_s):
        while data := await wire.recv():
            chunks.append(data)
    return b"".join(chunks)


async def until_reset(wire: ByteStream, limit_s: float = 20) -> None:
    """Read until the peer's reset; a clean end fails the test."""
    async with asyncio.timeout(limit_s):
        with pytest.raises(ConnectionResetError):
            while await wire.recv():
                pass
            pytest.fail("a clean end instead of a reset")
