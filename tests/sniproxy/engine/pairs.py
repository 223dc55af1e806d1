"""Connected pairs of real TCP sockets."""

import asyncio
import socket

import pytest

from sniproxy.engine import Wire


async def pair() -> tuple[Wire, Wire]:
    """Give the two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return Wire(one), Wire(other)


async def read_all(wire: Wire, limit_s: float = 20) -> bytes:
    """Read to the end of the stream; a reset is an error."""
    chunks = []
    async with asyncio.timeout(limit_s):
        while data := await wire.recv():
            chunks.append(data)
    return b"".join(chunks)


async def until_reset(wire: Wire, limit_s: float = 20) -> None:
    """Read until the peer's reset; a clean end fails the test."""
    async with asyncio.timeout(limit_s):
        with pytest.raises(ConnectionResetError):
            while await wire.recv():
                pass
            pytest.fail("a clean end instead of a reset")
