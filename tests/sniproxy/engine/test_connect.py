"""Connecting to real listeners, to none, and to one that never answers."""

import errno
import socket

import pytest

from sniproxy.engine import SocketStream, connect

pytestmark = pytest.mark.anyio


async def test_connect_refused_names_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match=f"127.0.0.1 port {port}"):
        await connect("127.0.0.1", port, timeout_s=5)


async def test_connect_takes_no_names() -> None:
    with pytest.raises(ValueError, match="localhost"):
        await connect("localhost", 1, timeout_s=5)


async def test_connect_gives_up_in_time() -> None:
    with socket.socket() as server:  # a full backlog: SYNs are dropped, nothing answers
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address, port = server.getsockname()
        waiting: list[SocketStream] = []
        with pytest.raises(TimeoutError):
            while len(waiting) < 8:
                waiting += [await connect(address, port, timeout_s=0.1)]
        for stream in waiting:
            stream.close()


@pytest.mark.parametrize("port", [0, -1, 65536])
async def test_an_invalid_port_is_an_oserror(port: int) -> None:
    with pytest.raises(OSError, match=f"port {port}") as failed:
        await connect("127.0.0.1", port, timeout_s=1)
    assert failed.value.errno == errno.EADDRNOTAVAIL


async def test_connect_over_ipv6() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        stream = await connect("::1", server.getsockname()[1], timeout_s=5)
        assert stream.peer == ("::1", server.getsockname()[1])
        stream.close()
